"""The parts of an answer, for protocols that send each with a beginning and an end."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..answers.events import ArgumentText, CallBegun, CallEnded, Event, Reasoning, Text


@dataclass
class Part:
    """A reasoning, a text or a call.

    Args:
        kind: which of them.
        index: its place among the parts.
        name: of the tool, for a call.
        text: that it holds so far; a call's arguments in JSON.
        key: a name that no other part has.
    """

    kind: Literal["reasoning", "text", "call"]
    index: int
    name: str = ""
    text: str = ""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


# A part begins, goes on with more text, or ends.
Step = tuple[Literal["begin", "more", "end"], Part, str]


class Parts(list[Part]):
    """Cuts events into parts."""

    def __init__(self) -> None:
        super().__init__()
        self._is_open = False  # whether the last part goes on

    @property
    def has_calls(self) -> bool:
        """Whether one of them is a call."""
        return any(part.kind == "call" for part in self)

    def add(self, events: Sequence[Event]) -> list[Step]:
        """Adds events and returns the steps that they are."""
        steps: list[Step] = []
        for event in events:
            match event:
                case Reasoning(text) if text:
                    steps += [*self._continue("reasoning"), self._more(text)]
                case Text(text) if text:
                    steps += [*self._continue("text"), self._more(text)]
                case CallBegun(name):
                    steps += [*self.end(), self._begin(Part("call", len(self), name))]
                case ArgumentText(text):
                    steps.append(self._more(text))
                case CallEnded():
                    steps += self.end()
        return steps

    def end(self) -> list[Step]:
        """Ends the last part, unless it has ended."""
        was_open, self._is_open = self._is_open, False
        return [("end", self[-1], "")] if was_open else []

    def _continue(self, kind: Literal["reasoning", "text"]) -> list[Step]:
        if self._is_open and self[-1].kind == kind:
            return []
        return [*self.end(), self._begin(Part(kind, len(self)))]

    def _begin(self, part: Part) -> Step:
        self.append(part)
        self._is_open = True
        return "begin", part, ""

    def _more(self, text: str) -> Step:
        self[-1].text += text
        return "more", self[-1], text
