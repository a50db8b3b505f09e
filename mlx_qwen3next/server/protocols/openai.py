"""OpenAI's chat completions and completions, whole or streamed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..answers.events import ArgumentText, CallBegun, End, Event, Reasoning, Text
from ..answers.tokens import Context, SampledToken
from . import logprobs
from .form import About, Form, sent


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
        self,
        events: Sequence[Event],
        finish_reason: str | None = None,
        has_whole_calls: bool = True,
    ) -> dict[str, Any]:
        """The object of a chunk, or of the whole answer.

        Args:
            finish_reason: "stop" or "length" at the end; a chat that ended by itself with a call
                says "tool_calls", unless the call was cut off.
            has_whole_calls: whether the answer's last call may be run.
        """
        message = self._message(events)
        if finish_reason == "stop" and self._calls and has_whole_calls:
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


class ChatCompletion(Form):
    """A chat completion."""

    _kind, _prefix = "chat.completion", "chatcmpl"

    def __init__(self, body: dict[str, Any], about: About):
        self.request, self._about = body, about

    def begin(self, context: Context, fields: dict[str, Any]) -> bytes:
        self._context = context
        self._wants_logprobs = fields.get("logprobs", False)
        options = fields.get("stream_options", {})
        self._wants_usage = options.get("include_usage", False)
        self._wants_counts = self._wants_usage and options.get("continuous_usage_stats", False)
        self._generated = 0  # tokens that chunks have told of
        is_streamed = fields.get("stream", False)
        common = {
            "id": f"{self._prefix}-{uuid.uuid4()}",
            "system_fingerprint": self._about.fingerprint,
            "object": f"{self._kind}.chunk" if self.is_chat and is_streamed else self._kind,
            "model": self._about.model,
            "created": self._about.created,
        }
        self._completion = Completion(common, is_chat=self.is_chat, is_streamed=is_streamed)
        return b""

    def chunk(self, events: Sequence[Event], sampled: Sequence[SampledToken]) -> bytes:
        content = self._with_logprobs(self._completion.choice(events), sampled)
        self._generated += len(sampled)
        if self._wants_counts:
            content |= self._usage(self._generated)
        return sent(content)

    def end(self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End) -> bytes:
        chunks = sent(self._last(events, sampled, end))
        if self._wants_usage:
            chunks += sent(self._completion.last_chunk(self._usage(end.generated)))
        return chunks + b"data: [DONE]\n\n"

    def whole(
        self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End
    ) -> dict[str, Any]:
        return self._last(events, sampled, end) | self._usage(end.generated)

    def _last(
        self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End
    ) -> dict[str, Any]:
        content = self._completion.choice(events, end.reason, end.has_whole_calls)
        return self._with_logprobs(content, sampled)

    def _usage(self, generated: int) -> dict[str, Any]:
        context = self._context
        counts = len(context.prompt), context.cached, generated, context.accepted
        return self._completion.usage(*counts)

    def _with_logprobs(
        self, content: dict[str, Any], sampled: Sequence[SampledToken]
    ) -> dict[str, Any]:
        """Adds the log-probabilities, if they are wanted."""
        if self._wants_logprobs:
            content["choices"][0]["logprobs"] = self._logprobs(sampled)
        return content

    def _logprobs(self, sampled: Sequence[SampledToken]) -> dict[str, Any]:
        return logprobs.chat_form(self._context.tokenizer, sampled)


class TextCompletion(ChatCompletion):
    """A completion of a text."""

    is_chat = False
    _kind, _prefix = "text_completion", "cmpl"
    _text_offset = 0  # characters

    def _logprobs(self, sampled: Sequence[SampledToken]) -> dict[str, Any]:
        offset = self._text_offset
        self._text_offset += sum(len(token.text) for token in sampled)
        return logprobs.text_form(self._context.tokenizer, sampled, offset)
