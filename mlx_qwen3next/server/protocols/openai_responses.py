"""OpenAI's Responses, whole or streamed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from ..answers.events import End, Event
from ..answers.tokens import Context, SampledToken
from ..requests.checks import RequestError, boolean, list_of, mapping, string
from . import custom_tools, logprobs
from .form import About, Form, named
from .openai_responses_requests import LOGPROBS, chat_request, functions_of, items_of, sealed
from .parts import Part, Parts, Step
from .stored import Kept

# The fields of a request that its response repeats, and their values where it has none.
_REPEATED: dict[str, Any] = {
    **{"instructions": None, "max_output_tokens": None, "metadata": {}, "tools": []},
    **{"parallel_tool_calls": True, "previous_response_id": None, "tool_choice": "auto"},
    **{"reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}}},
    **{"temperature": None, "top_p": None, "truncation": "disabled", "user": None},
}


class ModelResponse(Form):
    """A response."""

    def __init__(self, body: dict[str, Any], about: About):
        body = mapping("the body", body)
        self._items = items_of(body, about.stored)
        self.request, self._about = chat_request(body, self._items), about
        include = list_of(string)("include", body.get("include", []))
        self._wants_logprobs = LOGPROBS in include
        self._logprobs: dict[int, list[dict[str, Any]]] = {}  # by a part's index
        self._told_inputs: dict[int, int] = {}  # characters, by a part's index
        self._seals = "reasoning.encrypted_content" in include
        self._stores = boolean("store", body.get("store", True))
        self._repeated = _REPEATED | {key: body[key] for key in _REPEATED if key in body}
        self._functions = {
            each.function["function"]["name"]: each for each in functions_of(body.get("tools", []))
        }
        self._id = f"resp_{uuid.uuid4().hex}"
        self._parts = Parts()
        self._ending = "completed"  # the status of the response and of its last item
        self._events = 0

    def begin(self, context: Context, fields: dict[str, Any]) -> bytes:
        self._context = context
        response = self._response("in_progress")
        return self._named("response.created", response=response) + self._named(
            "response.in_progress", response=response
        )

    def chunk(self, events: Sequence[Event], sampled: Sequence[SampledToken]) -> bytes:
        return self._sent(self._parts.add(events), sampled)

    def end(self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End) -> bytes:
        self._ending = "incomplete" if end.reason == "length" else "completed"
        rest = self._sent([*self._parts.add(events), *self._parts.end()], sampled)
        response = self._finished(end)
        return rest + self._named(f"response.{response['status']}", response=response)

    def whole(
        self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End
    ) -> dict[str, Any]:
        self._ending = "incomplete" if end.reason == "length" else "completed"
        self._sent(self._parts.add(events), sampled)
        return self._finished(end)

    def failed(self, error: RequestError) -> bytes:
        fault = {"code": error.code or "server_error", "message": str(error)}
        response = self._response("failed") | {"error": fault}
        return self._named("response.failed", response=response)

    def _finished(self, end: End) -> dict[str, Any]:
        """The whole response, which is kept if the request has not forbidden it."""
        response = self._response(self._ending)
        if self._ending == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = {
            "input_tokens": len(self._context.prompt),
            "input_tokens_details": {"cached_tokens": self._context.cached or 0},
            "output_tokens": end.generated,
            "output_tokens_details": {"reasoning_tokens": end.reasoning},
            "total_tokens": len(self._context.prompt) + end.generated,
        }
        if self._stores:
            self._about.stored.put(Kept([*self._items, *response["output"]], response))
        return response

    def _response(self, status: str) -> dict[str, Any]:
        begun = status == "in_progress"
        return {
            **{"id": self._id, "object": "response", "created_at": self._about.created},
            **{"status": status, "background": False, "error": None, "incomplete_details": None},
            **{"model": self._about.model, "store": self._stores, "usage": None},
            "output": [] if begun else [self._item(part, is_done=True) for part in self._parts],
            **self._repeated,
        }

    def _item(self, part: Part, *, is_done: bool) -> dict[str, Any]:
        """An item of the output; empty while it is in progress."""
        status = "in_progress"
        if is_done:
            status = self._ending if part is self._parts[-1] else "completed"
        item: dict[str, Any]
        content = [self._content(part, is_done=True)] if is_done else []
        match part.kind:
            case "text":
                item = {"type": "message", "id": f"msg_{part.key}", "role": "assistant"}
                return item | {"status": status, "content": content}
            case "reasoning":
                item = {"type": "reasoning", "id": f"rs_{part.key}", "summary": []}
                if self._seals and is_done:
                    item["encrypted_content"] = sealed(part.text)
                return item | {"content": content}
        space, is_custom = self._kind_of(part)
        name = part.name if space is None else part.name.removeprefix(f"{space}.")
        item = {"call_id": f"call_{part.key}", "name": name, "status": status}
        if is_custom:
            text = custom_tools.whole_text(part.text) if is_done else ""
            item |= {"type": "custom_tool_call", "id": f"ctc_{part.key}", "input": text}
        else:
            text = part.text if is_done else ""
            item |= {"type": "function_call", "id": f"fc_{part.key}", "arguments": text}
        return item if space is None else item | {"namespace": space}

    def _kind_of(self, part: Part) -> tuple[str | None, bool]:
        """The namespace of a call's function, and whether it stands for a custom tool."""
        known = self._functions.get(part.name)
        return (None, False) if known is None else (known.space, known.is_custom)

    def _named(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._events} | fields
        self._events += 1
        return named(event)

    def _sent(self, steps: Sequence[Step], sampled: Sequence[SampledToken]) -> bytes:
        """The events of steps.

        Args:
            sampled: the tokens that the steps come from.
        """
        sent = b""
        for step, part, text in steps:
            told: list[dict[str, Any]] = []
            if self._wants_logprobs and step == "more" and part.kind != "call":
                own, sampled = logprobs.split(sampled, text)
                if part.kind == "text":
                    told = logprobs.chat_form(self._context.tokenizer, own)["content"]
                    self._logprobs.setdefault(part.index, []).extend(told)
            sent += self._step(step, part, text, told)
        return sent

    def _step(self, step: str, part: Part, text: str, told: list[dict[str, Any]]) -> bytes:
        item = self._item(part, is_done=step == "end")
        place = {"item_id": item["id"], "output_index": part.index}
        at = place if part.kind == "call" else place | {"content_index": 0}
        stem, key = {
            "message": ("response.output_text", "text"),
            "reasoning": ("response.reasoning_text", "text"),
            "function_call": ("response.function_call_arguments", "arguments"),
            "custom_tool_call": ("response.custom_tool_call_input", "input"),
        }[item["type"]]
        if step == "more":
            if key == "input":
                text = self._more_input(part, custom_tools.begun_text(part.text))
            entries = {"logprobs": told} if part.kind == "text" else {}
            return self._named(f"{stem}.delta", **at, delta=text, **entries) if text else b""
        added = {"output_index": part.index, "item": item}
        if step == "begin":
            begun = self._named("response.output_item.added", **added)
            if part.kind == "call":
                return begun
            content = self._content(part, is_done=False)
            return begun + self._named("response.content_part.added", **at, part=content)
        done = b""
        if part.kind == "call":
            if key == "input" and (rest := self._more_input(part, item["input"])):
                done = self._named(f"{stem}.delta", **at, delta=rest)
            done += self._named(f"{stem}.done", **at, **{key: item[key]})
        else:
            (content,) = item["content"]
            entries = {"logprobs": content["logprobs"]} if part.kind == "text" else {}
            done = self._named(f"{stem}.done", **at, text=content["text"], **entries)
            done += self._named("response.content_part.done", **at, part=content)
        return done + self._named("response.output_item.done", **added)

    def _more_input(self, part: Part, text: str) -> str:
        """Returns the part of a custom tool's input that the stream has not told yet."""
        told = self._told_inputs.get(part.index, 0)
        self._told_inputs[part.index] = len(text)
        return text[told:]

    def _content(self, part: Part, *, is_done: bool) -> dict[str, Any]:
        """The content of a text or of reasoning; empty while it is in progress."""
        text = part.text if is_done else ""
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        entries = self._logprobs.get(part.index, []) if is_done else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": entries}
