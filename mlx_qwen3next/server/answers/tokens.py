"""The answer to a request, token by token: as the engine hands it over, and read to events."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .calls import Format
from .events import ArgumentText, CallBegun, CallEnded, End, Event, Text
from .reader import Reader
from .written_calls import WrittenCalls


@dataclass
class Context:
    """The facts of a request that both sides read.

    Args:
        tokenizer: the model's.
        prompt: the prompt's token ids.
        reasoning_open: whether the answer begins within reasoning that the template has opened.
        opening: the answer's beginning, if the prompt holds it already.
        format: the form of its calls; None if it goes on with a text, which is no chat.
        cached: how many of the prompt's tokens were in the prompt cache; None until that is known.
        accepted: the right drafts among the tokens of the answer so far, by their source.
        stopped: whether the client has gone.
    """

    tokenizer: TokenizerWrapper
    prompt: list[int]
    reasoning_open: bool = False
    opening: str = ""
    format: Format | None = None
    cached: int | None = None
    accepted: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    def stop(self) -> None:
        """Tells the engine to drop the request."""
        self.stopped = True


@dataclass(frozen=True)
class SampledToken:
    """A generated token.

    Args:
        text: what it adds to the answer's text.
        token: its id.
        logprob: its log-probability, or 0 if that was not asked for.
        finish_reason: "stop" or "length" with the last token, otherwise None.
        top_tokens: the most probable tokens at its place and their log-probabilities, as many as
            were asked for, in any order.
        stop_word: the one that has ended the answer, if one has.
    """

    text: str
    token: int
    logprob: float = 0.0
    finish_reason: str | None = None
    top_tokens: tuple[tuple[int, float], ...] = ()
    stop_word: str | None = None


class TokenReader:
    """Reads one answer.

    Args:
        context: of the request.
        tools: the functions that the answer may call; None for none.
        one_call: whether the answer ends after its first call.
        template: the name of the chat template that the request has named.
        written: takes the calls.

    Attributes:
        is_over: whether no more is to be read, though the engine may generate more.
    """

    def __init__(
        self,
        context: Context,
        tools: Sequence[dict[str, Any]] | None,
        one_call: bool,
        template: str | None,
        written: WrittenCalls,
    ):
        self._reader: Reader | None = None
        self._opening: list[Event] = []
        if context.format is not None:
            self._reader = Reader(
                format=context.format, tools=tools, reasoning_open=context.reasoning_open
            )
            self._opening = self._reader.add(context.opening)
        self._context, self._one_call = context, one_call
        self._template, self._written = template, written
        self._name = self._json = ""  # of the call that is being read
        self._reason, self._by_itself = "stop", True
        self._stop_word: str | None = None
        self._generated = self._reasoning = 0  # tokens
        self.is_over = False

    def add(self, token: SampledToken) -> list[Event]:
        """The events that are certain once another token has come."""
        self._generated += 1
        self._reason = token.finish_reason or self._reason
        self._by_itself = token.token in self._context.tokenizer.eos_token_ids
        self._stop_word = token.stop_word
        if self._reader is None:
            return [Text(token.text)]
        self._reasoning += self._reader.is_reasoning
        opening, self._opening = self._opening, []
        return self._up_to_a_call([*opening, *self._reader.add(token.text)])

    def end(self) -> list[Event]:
        """The events that remain when the answer has ended."""
        if self._reader is None or self.is_over:
            return []
        return self._up_to_a_call([*self._opening, *self._reader.end()])

    @property
    def ending(self) -> End:
        """How the answer has ended, for certain after :meth:`end`."""
        # A call that a stop string has cut off must not be run.
        is_cut = not self._by_itself and self._reader is not None and self._reader.is_cut
        return End(self._reason, self._stop_word, not is_cut, self._generated, self._reasoning)

    def _up_to_a_call(self, events: Sequence[Event]) -> list[Event]:
        """The events, and no more after the end of a call if there is to be only one."""
        ends = [i for i, event in enumerate(events) if isinstance(event, CallEnded)]
        if self._one_call and ends:
            self.is_over, self._reason = True, "stop"
            events = events[: ends[0] + 1]
        for event in events:
            self._remember(event)
        return [*events]

    def _remember(self, event: Event) -> None:
        match event:
            case CallBegun(name):
                self._name, self._json = name, ""
            case ArgumentText(text):
                self._json += text
            case CallEnded(_, values):
                arguments = json.loads(self._json)
                self._written.put(self._template, self._name, arguments, dict(values))
