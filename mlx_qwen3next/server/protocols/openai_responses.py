"""OpenAI's Responses, whole or streamed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from ..checks import RequestError, boolean, list_of, mapping, string
from ..events import End, Event
from ..responses import Context, Response
from .form import About, Form, named
from .openai_responses_requests import chat_request, functions_of, items_of, sealed
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
        if "message.output_text.logprobs" in include:
            message = "include must not hold message.output_text.logprobs: it is not supported"
            raise RequestError(message, "include")
        self._seals = "reasoning.encrypted_content" in include
        self._stores = boolean("store", body.get("store", True))
        self._repeated = _REPEATED | {key: body[key] for key in _REPEATED if key in body}
        self._spaces = {
            tool["function"]["name"]: space
            for tool, space in functions_of(body.get("tools", []))
            if space is not None
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

    def chunk(self, events: Sequence[Event], sampled: Sequence[Response]) -> bytes:
        return self._sent(self._parts.add(events))

    def end(self, events: Sequence[Event], sampled: Sequence[Response], end: End) -> bytes:
        self._ending = "incomplete" if end.reason == "length" else "completed"
        rest = self._sent([*self._parts.add(events), *self._parts.end()])
        response = self._finished(end)
        return rest + self._named(f"response.{response['status']}", response=response)

    def whole(
        self, events: Sequence[Event], sampled: Sequence[Response], end: End
    ) -> dict[str, Any]:
        self._ending = "incomplete" if end.reason == "length" else "completed"
        self._parts.add(events)
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
        match part.kind:
            case "text":
                item = {"type": "message", "id": f"msg_{part.key}", "role": "assistant"}
                return item | {"status": status, "content": [_content(part, part.text)] * is_done}
            case "reasoning":
                item = {"type": "reasoning", "id": f"rs_{part.key}", "summary": []}
                if self._seals and is_done:
                    item["encrypted_content"] = sealed(part.text)
                return item | {"content": [_content(part, part.text)] * is_done}
        item = {"type": "function_call", "id": f"fc_{part.key}", "call_id": f"call_{part.key}"}
        space = self._spaces.get(part.name)
        name = part.name if space is None else part.name.removeprefix(f"{space}.")
        item |= {"name": name, "arguments": part.text if is_done else "", "status": status}
        return item if space is None else item | {"namespace": space}

    def _named(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._events} | fields
        self._events += 1
        return named(event)

    def _sent(self, steps: Sequence[Step]) -> bytes:
        return b"".join(self._step(*step) for step in steps)

    def _step(self, step: str, part: Part, text: str) -> bytes:
        item = self._item(part, is_done=step == "end")
        place = {"item_id": item["id"], "output_index": part.index}
        at = place if part.kind == "call" else place | {"content_index": 0}
        stem, key = {
            "call": ("response.function_call_arguments", "arguments"),
            "text": ("response.output_text", "text"),
            "reasoning": ("response.reasoning_text", "text"),
        }[part.kind]
        logprobs: dict[str, Any] = {"logprobs": []} if part.kind == "text" else {}
        if step == "more":
            return self._named(f"{stem}.delta", **at, delta=text, **logprobs)
        added = {"output_index": part.index, "item": item}
        content = at | {"part": _content(part, part.text if step == "end" else "")}
        if step == "begin":
            begun = self._named("response.output_item.added", **added)
            if part.kind == "call":
                return begun
            return begun + self._named("response.content_part.added", **content)
        done = self._named(f"{stem}.done", **at, **{key: part.text}, **logprobs)
        if part.kind != "call":
            done += self._named("response.content_part.done", **content)
        return done + self._named("response.output_item.done", **added)


def _content(part: Part, text: str) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
