"""Reading an answer: reasoning, text and tool calls, from the text as it comes.

Qwen's models write a call in one of two forms, whichever their template teaches::

    <tool_call>                             <tool_call>
    {"name": "f", "arguments": {"n": 1}}    <function=f>
    </tool_call>                            <parameter=n>
                                            1
                                            </parameter>
                                            </function>
                                            </tool_call>

The reader takes both. It loses nothing: text that is no call stays text, to the letter, but for
blanks before the content and before calls that no text follows. Its decisions depend on the text
alone, so every way of cutting the text into pieces gives the same answer, and it decides as soon as
no continuation could change the decision.

A parameter's value may hold anything, tags and whole calls included. It ends at the closing tag
after which the grammar goes on as it must; see :class:`.calls.ValueEnd`. Of a call in JSON, the
name of a tool and then the arguments' first bracket make a call for certain. What is wrong after
that is mended, and what cannot be mended ends the call and is text; see
:class:`.json_text.MendedJSON`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .argument_values import Parameters
from .calls import (
    FENCE,
    JSON_HEAD,
    TAG,
    Format,
    Tag,
    ValueEnd,
    calls_of,
    held_from,
    next_tag,
    parameters_of,
    tag_of,
)
from .events import Answer, ArgumentText, CallBegun, CallEnded, Event, Reasoning, Text
from .json_text import JSONEnd, MendedJSON, load_mended


def parse(
    text: str, *, format: Format, tools: Sequence[Any] | None, reasoning_open: bool = False
) -> Answer:
    """Reads a whole answer; arguments as for :class:`Reader`. Any text gives an answer."""
    reader = Reader(format=format, tools=tools, reasoning_open=reasoning_open)
    return Answer.of(reader.add(text) + reader.end())


_THINK, _END_THINK = "<think>", "</think>"


# --- the reader ----------------------------------------------------------------------------------
class Reader:
    """Reads an answer piece by piece.

    Args:
        format: the form of calls that the model's template teaches; the other one is read as well.
        tools: the tools that were asked for, in OpenAI's form; None if none were, and then
            everything is text.
        reasoning_open: whether the template has opened the reasoning.
    """

    def __init__(
        self, *, format: Format, tools: Sequence[Any] | None, reasoning_open: bool = False
    ):
        self._format = format
        self._tools = None if tools is None else parameters_of(tools)
        self._text = ""  # not consumed yet
        self._events: list[Event] = []
        self._final = False
        self._state = self._read_opened if reasoning_open else self._read_beginning
        self.is_cut = False  # whether the answer has ended within an argument of a call
        self._begun = False  # whether there is content
        self._has_content = False  # whether any was sent
        self._blanks = ""  # before the last calls, which only matter if content follows them
        self._call = ""  # the consumed text of the call that is being read
        self._parameters = Parameters(None)
        self._argument = ""  # the name of the value that is being read
        self._arguments = 0  # of the call so far
        self._values: dict[str, str] = {}  # the texts of those that are no strings
        self._wrapped = True  # whether the call began with <tool_call>
        self._value: ValueEnd | None = None
        self._streams = False  # whether the value is sent as it comes

    @property
    def is_holding(self) -> bool:
        """Whether some text has been added that no event has told of yet."""
        return bool(self._text)

    @property
    def is_reasoning(self) -> bool:
        """Whether the answer is within its reasoning."""
        return self._state in (self._read_opened, self._read_reasoning)

    def add(self, text: str) -> list[Event]:
        """The events that are certain once more text has come."""
        self._text += text
        return self._advance()

    def end(self) -> list[Event]:
        """The events that remain when the answer has ended."""
        self._final = True
        return self._advance()

    def _advance(self) -> list[Event]:
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def _consume(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    # --- reasoning -------------------------------------------------------------------------------
    def _read_beginning(self) -> bool:
        """The answer itself may begin with its reasoning."""
        text = self._text.lstrip()
        if text.startswith(_THINK):
            self._state = self._read_opened
            return True
        if _THINK.startswith(text) and not self._final:
            return False
        self._state = self._read_content
        return True

    def _read_opened(self) -> bool:
        """Reasoning may repeat the tag that the template has written already."""
        text = self._text.lstrip()
        if text.startswith(_THINK):
            self._consume(self._text.index(_THINK) + len(_THINK))
        elif _THINK.startswith(text) and not self._final:
            return False
        self._state = self._read_reasoning
        return True

    def _read_reasoning(self) -> bool:
        at = self._text.find(_END_THINK)
        body = self._text[: at if at >= 0 else held_from(self._text, 0, [_END_THINK])]
        if at < 0 and self._final:
            body = self._text
        # Line breaks before it and blanks after it are the template's.
        start = 0 if self._begun else len(body) - len(body.lstrip("\n"))
        end = len(body.rstrip())
        if end > start:
            self._begun = True
            self._events.append(Reasoning(body[start:end]))
            self._consume(end)
            at -= end
        if at >= 0:
            self._consume(at + len(_END_THINK))
            self._begun, self._state = False, self._read_after_reasoning
        elif self._final:
            self._text = ""
        return at >= 0

    def _read_after_reasoning(self) -> bool:
        self._text = self._text.lstrip("\n")
        if not self._text:
            return False
        self._state = self._read_content
        return True

    # --- content ---------------------------------------------------------------------------------
    def _read_content(self) -> bool:
        if self._tools is None:
            self._send_content(len(self._text), before_call=False)
            return False
        at = 0
        while True:
            match = TAG.search(self._text, at)
            if match is None:
                break
            tag = tag_of(match)
            if tag.kind in ("<call", "<function"):
                begins = self._begins(tag)
                if begins is None:
                    self._send_content(tag.start, before_call=True)
                    return False
                if begins:
                    self._send_content(tag.start, before_call=True)
                    blanks = self._consume(len(self._text) - len(self._text.lstrip()))
                    self._blanks += blanks if self._has_content else ""
                    self._state = begins
                    return True
            at = tag.end
        self._send_content(held_from(self._text, at) if not self._final else len(self._text), False)
        return False

    def _send_content(self, end: int, before_call: bool) -> None:
        """Sends the content up to ``end``, but blanks that may prove to be before a call."""
        content = self._text[:end]
        if self._tools is not None and (before_call or not self._final):
            content = content.rstrip()
        if not self._begun and not content.strip():
            if self._final and not before_call:
                self._text = ""
            return
        if content:
            self._begun = self._has_content = True
            self._events.append(Text(self._blanks + content))
            self._blanks = ""
            self._consume(len(content))

    def _begins(self, tag: Tag) -> Any:
        """The state that reads the call at a tag; False if there is none, None if it is not known
        yet."""
        if tag.kind == "<function":
            before = self._text[: tag.start]
            begins_line = not before.rpartition("\n")[2].strip()
            begins_line = begins_line and ("\n" in before or not self._begun)
            if self._format != "xml" or tag.name not in (self._tools or {}) or not begins_line:
                return False
            return self._begins_function(tag, wrapped=False)
        after = next_tag(self._text, tag.end, self._final)
        if after is None:
            return None
        if after.kind == "<function":
            return self._begins_function(after, wrapped=True)
        if after.kind != "text":
            return False
        rest = self._text[after.start :]
        if rest[0] in "{[":
            return self._begin_json
        if rest.startswith("```"):
            fence = FENCE.match(rest)
            opened = rest[fence.end() :].lstrip() if fence else ""
            if not opened or "```json".startswith(rest):
                return None if not self._final else False
            return self._begin_json if opened[0] in "{[" else False
        return None if "```".startswith(rest) and not self._final else False

    def _begins_function(self, tag: Tag, wrapped: bool) -> Any:
        after = next_tag(self._text, tag.end, self._final)
        if after is None:
            return None
        if after.kind not in ("<parameter", "</function", "</call"):
            return False
        self._wrapped = wrapped
        return self._begin_function

    # --- calls of the XML form -------------------------------------------------------------------
    def _begin_function(self) -> bool:
        match = TAG.search(self._text)
        assert match is not None
        if match[0] == "<tool_call>":
            self._call += self._consume(match.end())
            match = TAG.search(self._text)
            assert match is not None
        name = tag_of(match).name
        self._call += self._consume(match.end())
        self._parameters = (self._tools or {}).get(name, Parameters(None))
        self._arguments = 0
        self._events.append(CallBegun(name))
        self._state = self._read_parameter
        return True

    def _read_parameter(self) -> bool:
        tag = next_tag(self._text, 0, self._final)
        if tag is None:
            return False
        if tag.kind == "<parameter":
            if tag.end == len(self._text) and not self._final:
                return False  # a line break after it is not part of the value
            self._call += self._consume(tag.end)
            is_block = self._text.startswith("\n")
            self._call += self._consume(int(is_block))
            self._argument = tag.name
            is_json = self._parameters.is_json(tag.name)
            self._value = ValueEnd(self._parameters, is_json, is_block)
            self._streams = self._parameters.is_text(tag.name)
            comma = ", " if self._arguments else "{"
            self._arguments += 1
            opening = '"' if self._streams else ""
            key = json.dumps(tag.name, ensure_ascii=False)
            self._events.append(ArgumentText(f"{comma}{key}: {opening}"))
            self._state = self._read_value
            return True
        self._events.append(ArgumentText("}" if self._arguments else "{}"))
        if tag.kind == "</function":
            self._call += self._consume(tag.end)
            self._state = self._read_after_function
            return True
        if tag.kind == "</call":
            self._call += self._consume(tag.end)
        self._end_call()
        return True

    def _read_value(self) -> bool:
        assert self._value is not None
        end = self._value.find(self._text, self._final)
        if end is not None:
            value = self._text[:end]
            self._call += self._consume(end)
            value = value.removesuffix("\n")
            if self._text.startswith("</parameter>"):
                self._call += self._consume(len("</parameter>"))
            else:
                self.is_cut = self._final and not self._text
            if self._streams:
                self._send_string(value)
                self._events.append(ArgumentText('"'))
            else:
                self._values[self._argument] = value
                typed = self._parameters.value(self._argument, value)
                self._events.append(ArgumentText(json.dumps(typed, ensure_ascii=False)))
            self._state = self._read_parameter
            return True
        if self._streams:
            certain = self._text[: self._value.certain].removesuffix("\n")
            if certain:
                self._send_string(certain)
                self._call += self._consume(len(certain))
                self._value.shift(certain)
        return False

    def _send_string(self, text: str) -> None:
        if text:
            self._events.append(ArgumentText(json.dumps(text, ensure_ascii=False)[1:-1]))

    def _read_after_function(self) -> bool:
        """Another function may follow, or the end of the call."""
        tag = next_tag(self._text, 0, self._final)
        if tag is None:
            return False
        if tag.kind == "</call":
            self._call += self._consume(tag.end)
        elif tag.kind == "<function":
            begins = self._begins_function(tag, self._wrapped)
            if begins is None:
                return False
            if begins:
                self._end_call()
                self._consume(tag.start)
                self._state = begins
                return True
        self._end_call()
        return True

    def _end_call(self) -> None:
        self._events.append(CallEnded(self._call, self._values))
        self._call, self._values = "", {}
        self._begun = False  # blanks after a call are no content
        self._state = self._read_content

    # --- calls of the JSON form ------------------------------------------------------------------
    def _begin_json(self) -> bool:
        self._json = JSONEnd()
        self._state = self._read_json
        return True

    def _read_json(self) -> bool:
        """Arguments that come after the name of a tool are sent as they come; in any other order
        the call is known when it is complete."""
        head = JSON_HEAD.match(self._text)
        if head and head["name"] in (self._tools or {}):
            self._call += self._consume(head.end())
            self._events.append(CallBegun(head["name"]))
            self._mended, self._state = MendedJSON(), self._read_json_arguments
            return True
        end = self._json.find(self._text)
        if end is None and not self._final:
            return False
        calls: list[tuple[str, dict[str, Any]]] = []
        if end is None:  # quotes or brackets that do not match
            end = self._text.find("</tool_call>")
            end = len(self._text) if end < 0 else end
        start = min(i for i in map(self._text.find, "{[") if i >= 0)
        calls = calls_of(load_mended(self._text[start:end]))
        if calls:
            after = self._after_json(end)
            if after is None:
                return False
            self._call += self._consume(after)
            for name, arguments in calls:
                self._events.append(CallBegun(name))
                self._events.append(ArgumentText(json.dumps(arguments, ensure_ascii=False)))
                self._events.append(CallEnded(self._call))
                self._call = ""
            self._begun, self._state = False, self._read_content
            return True
        self._send_content(len("<tool_call>"), before_call=False)
        self._state = self._read_content
        return True

    def _read_json_arguments(self) -> bool:
        arguments, read = self._mended.read(self._text, self._final)
        self._call += self._consume(read)
        if arguments:
            self._events.append(ArgumentText(arguments))
        if not self._mended.is_done:
            return False
        self.is_cut = self._mended.is_cut
        self._mended, self._state = MendedJSON(), self._read_json_rest
        self._mended.read('{"arguments": {}', final=False)
        return True

    def _read_json_rest(self) -> bool:
        """Nothing that the object holds beside the arguments matters."""
        _, read = self._mended.read(self._text, self._final)
        self._call += self._consume(read)
        after = self._after_json(0) if self._mended.is_done else None
        if after is None:
            return False
        self._call += self._consume(after)
        self._end_call()
        return True

    def _after_json(self, at: int) -> int | None:
        """Where the call ends whose JSON ends at ``at``; None if that is not known yet."""
        text, end = self._text, at
        while end < len(text) and (text[end].isspace() or text[end] in "}]`"):
            end += 1
        if text.startswith("</tool_call>", end):
            return end + len("</tool_call>")
        if not self._final and "</tool_call>".startswith(text[end:]):
            return None
        return at
