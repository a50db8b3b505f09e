"""OpenAI's form of an answer: chat completions and completions, whole or streamed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..events import ArgumentText, CallBegun, Event, Reasoning, Text


class Completion:
    """Makes the objects of one answer from its events.

    Args:
        common: the fields that all objects have, such as ``id`` and ``model``.
        is_chat: whether it is a chat completion.
        is_streamed: whether the answer is sent in chunks.
    """

    def __init__(self, common: dict[str, Any], *, is_chat: bool, is_streamed: bool):
        self._common, self._is_chat, self._is_streamed = common, is_chat, is_streamed
        self._calls = 0
        self._has_begun = False  # whether a chunk was made

    def choice(
        self, events: Sequence[Event], finish_reason: str | None = None, *, is_cut: bool = False
    ) -> dict[str, Any]:
        """The object of a chunk, or of the whole answer.

        Args:
            finish_reason: "stop" or "length" at the end; a chat with calls says "tool_calls" in
                place of "stop".
            is_cut: whether the last call was cut off. It must not be run, so that "stop" stays.
        """
        message = self._message(events)
        if finish_reason == "stop" and self._calls and not is_cut:
            finish_reason = "tool_calls"
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if not self._is_chat:
            choice["text"] = message.get("content") or ""
        elif self._is_streamed:
            # Clients join the strings of all deltas, the role's too: it comes once.
            known = {"role"} if self._has_begun else set()
            self._has_begun = True
            choice["delta"] = {
                key: value
                for key, value in message.items()
                if value is not None and key not in known
            }
        else:
            choice["message"] = message
        return self._common | {"choices": [choice]}

    def usage(
        self, prompt: int, cached: int | None, generated: int, accepted: Mapping[str, int]
    ) -> dict[str, Any]:
        """The counts of tokens.

        Args:
            cached: None if not known.
            accepted: drafts by their source, a field that OpenAI's answers have not.
        """
        counts: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }
        if cached is not None:
            counts["prompt_tokens_details"] = {"cached_tokens": cached}
        if accepted:
            details = {"accepted_prediction_tokens": sum(accepted.values())}
            counts["completion_tokens_details"] = details | {"accepted_drafts": dict(accepted)}
        return {"usage": counts}

    def last_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last choice, which has the counts alone."""
        return self._common | {"choices": []} | usage

    def _message(self, events: Sequence[Event]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None}
        calls: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Reasoning(text):
                    message["reasoning"] = message.get("reasoning", "") + text
                case Text(text):
                    message["content"] = (message["content"] or "") + text
                case CallBegun(name):
                    identity = {"id": f"call_{uuid.uuid4().hex}", "type": "function"}
                    calls.append(identity | {"function": {"name": name, "arguments": ""}})
                    if self._is_streamed:
                        calls[-1]["index"] = self._calls
                    self._calls += 1
                case ArgumentText(text):
                    if not calls:  # of a call that an earlier chunk has begun
                        calls.append({"index": self._calls - 1, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        if calls:
            message["tool_calls"] = calls
        return message
