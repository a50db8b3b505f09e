"""Anthropic's Messages, whole or streamed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from ...errors import ContextLengthError
from ..answers.events import End, Event
from ..answers.tokens import Context, SampledToken
from ..requests.checks import RequestError
from .anthropic_requests import chat_request
from .form import About, Form, named
from .parts import Part, Parts, Step

_ERRORS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERRORS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


class Message(Form):
    """A message of the assistant."""

    def __init__(self, body: dict[str, Any], about: About):
        self.request, self._about = chat_request(body), about
        self._id = f"msg_{uuid.uuid4().hex}"
        self._parts = Parts()

    def begin(self, context: Context, fields: dict[str, Any]) -> bytes:
        self._context = context
        message = self._message([], None) | {"usage": self._usage(0)}
        return named({"type": "message_start", "message": message})

    def chunk(self, events: Sequence[Event], sampled: Sequence[SampledToken]) -> bytes:
        return self._sent(self._parts.add(events))

    def end(self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End) -> bytes:
        rest = self._sent([*self._parts.add(events), *self._parts.end()])
        delta = {"type": "message_delta", "delta": self._stop(end)}
        delta["usage"] = self._usage(end.generated)
        return rest + named(delta, {"type": "message_stop"})

    def whole(
        self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End
    ) -> dict[str, Any]:
        self._parts.add(events)
        content = [self._block(part, part.text) for part in self._parts]
        return self._message(content, end) | {"usage": self._usage(end.generated)}

    @staticmethod
    def error(error: RequestError) -> dict[str, Any]:
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        cause, message = error.__cause__, str(error)
        if isinstance(cause, ContextLengthError):  # Anthropic's words, by which clients know it
            message = f"prompt is too long: {cause.tokens} tokens > {cause.limit} maximum"
        kind = _ERRORS.get(error.status, kind)
        details = {} if error.code is None else {"details": {"error_code": error.code}}
        return {"type": "error", "error": {"type": kind, "message": message} | details}

    def failed(self, error: RequestError) -> bytes:
        return named(self.error(error))

    def _message(self, content: list[dict[str, Any]], end: End | None) -> dict[str, Any]:
        stop = {"stop_reason": None, "stop_sequence": None} if end is None else self._stop(end)
        return {
            **{"id": self._id, "type": "message", "role": "assistant"},
            **{"model": self._about.model, "content": content, **stop},
        }

    def _stop(self, end: End) -> dict[str, Any]:
        reason = {"length": "max_tokens"}.get(end.reason, "end_turn")
        if reason == "end_turn" and self._parts.has_calls and end.has_whole_calls:
            reason = "tool_use"
        elif end.stop_word is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_word}
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self, generated: int) -> dict[str, Any]:
        cached = self._context.cached or 0
        return {
            "input_tokens": len(self._context.prompt) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
        }

    def _block(self, part: Part, text: str) -> dict[str, Any]:
        match part.kind:
            case "reasoning":  # a signature that is empty may count as none
                return {"type": "thinking", "thinking": text, "signature": self._id if text else ""}
            case "text":
                return {"type": "text", "text": text}
        call_input = json.loads(text) if text else {}
        identity = {"type": "tool_use", "id": f"toolu_{part.key}"}
        return identity | {"name": part.name, "input": call_input}

    def _sent(self, steps: Sequence[Step]) -> bytes:
        return b"".join(self._step(*step) for step in steps)

    def _step(self, step: str, part: Part, text: str) -> bytes:
        place = {"index": part.index}
        if step == "begin":
            block = self._block(part, "")
            return named({"type": "content_block_start", **place, "content_block": block})
        kind, key = {
            "reasoning": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
            "call": ("input_json_delta", "partial_json"),
        }[part.kind]
        deltas = [{"type": kind, key: text}] if step == "more" else []
        if step == "end" and part.kind == "reasoning":
            deltas.append({"type": "signature_delta", "signature": self._id})
        events = [{"type": "content_block_delta", **place, "delta": delta} for delta in deltas]
        return named(*events, *([{"type": "content_block_stop", **place}] * (step == "end")))
