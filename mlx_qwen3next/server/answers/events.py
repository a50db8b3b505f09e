"""The parts of an answer, as the reader sends them and as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple


class Reasoning(NamedTuple):
    """More of the reasoning."""

    text: str


class Text(NamedTuple):
    """More of the content."""

    text: str


class CallBegun(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class ArgumentText(NamedTuple):
    """More of the JSON text of the call's arguments."""

    text: str


class CallEnded(NamedTuple):
    """The call is complete.

    Args:
        text: all of it, as the model wrote it.
        values: the text of each value that is no string, if the call is in the XML form.
    """

    text: str
    values: Mapping[str, str] = MappingProxyType({})


Event = Reasoning | Text | CallBegun | ArgumentText | CallEnded


class End(NamedTuple):
    """How an answer has ended.

    Args:
        reason: "stop" or "length".
        stop_word: the one that has ended it, if one has.
        has_whole_calls: whether its last call may be run.
        generated, reasoning: the number of its tokens, and of those in its reasoning.
    """

    reason: str
    stop_word: str | None
    has_whole_calls: bool
    generated: int
    reasoning: int


@dataclass
class ToolCall:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]
    text: str = ""  # as the model wrote it


@dataclass
class Answer:
    """A whole answer. Reasoning and content are None where there is nothing but blanks."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, events: Sequence[Event]) -> Answer:
        """The answer that events make."""
        answer, arguments = cls(), ""
        for event in events:
            match event:
                case Reasoning(text):
                    answer.reasoning = (answer.reasoning or "") + text
                case Text(text):
                    answer.content = (answer.content or "") + text
                case CallBegun(name):
                    answer.tool_calls.append(ToolCall(name, {}))
                    arguments = ""
                case ArgumentText(text):
                    arguments += text
                case CallEnded(text):
                    call = answer.tool_calls[-1]
                    call.arguments, call.text = json.loads(arguments), text
        return answer
