"""The grammar of calls in an answer: tags, the end of a value, JSON that describes calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .argument_values import Parameters
from .json_text import NOTHING, JSONEnd, load_mended

Format = Literal["xml", "json"]


class Tag(NamedTuple):
    """A tag, or the absence of one."""

    kind: str  # "<call", "</call", "<function", "</function", "<parameter", "</parameter", or
    # "text" for other text, "end" for the answer's end
    name: str
    start: int
    end: int


TAG = re.compile(
    r"<tool_call>|</tool_call>|</function>|</parameter>"
    r"|<function=(?P<function>[^<>\n]{1,256})>|<parameter=(?P<parameter>[^<>\n]{1,256})>"
)
_FIXED = ("<tool_call>", "</tool_call>", "</function>", "</parameter>", "<function=", "<parameter=")
_OPEN_ENDED = re.compile(r"<(function|parameter)=[^<>\n]{0,256}")
_LONGEST = 280  # characters of a tag
FENCE = re.compile(r"```(json)?[ \t]*\n?")
# From a tag to the arguments of a call of the JSON form that has its parts in the usual order.
JSON_HEAD = re.compile(
    r'[^{\[]*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)'
)


def call_format(template: str) -> Format:
    """The form of calls that a chat template teaches."""
    return "xml" if "<function=" in template else "json"


def call_opening(format: Format, name: str) -> str:
    """The beginning of a call, which no answer but a call can continue.

    It ends where a token ends in any call, so that the model goes on as it has learnt.

    Args:
        name: of the tool; "" for any.
    """
    if format == "xml":
        return f"<tool_call>\n<function={name}>\n" if name else "<tool_call>\n<function"
    quoted = json.dumps(name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {quoted}, "arguments":' if name else '<tool_call>\n{"name": "'


def tag_of(match: re.Match[str]) -> Tag:
    for kind in ("function", "parameter"):
        if match[kind] is not None:
            return Tag(f"<{kind}", match[kind].strip().strip("\"'"), match.start(), match.end())
    kind = match[0].strip("<>").replace("tool_call", "call")
    kind = "<call" if kind == "call" else f"<{kind}"
    return Tag(kind, "", match.start(), match.end())


def _may_become_tag(text: str, start: int) -> bool:
    """Whether the text from ``start`` on is the beginning of a tag whose end may still come."""
    rest = text[start : start + _LONGEST]
    if any(fixed.startswith(rest) for fixed in _FIXED):
        return True
    return start + len(rest) == len(text) and _OPEN_ENDED.fullmatch(rest) is not None


def next_tag(text: str, start: int, final: bool) -> Tag | None:
    """The tag after blanks from ``start`` on; None if that cannot be known yet."""
    at = start
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text):
        return Tag("end", "", at, at) if final else None
    if match := TAG.match(text, at):
        return tag_of(match)
    if not final and _may_become_tag(text, at):
        return None
    return Tag("text", "", at, at)


def held_from(text: str, start: int, words: Sequence[str] = _FIXED) -> int:
    """Where, from ``start`` on, an unfinished tag at the text's end begins; else the text's end."""
    at = text.rfind("<", max(start, len(text) - _LONGEST))
    if at >= start:
        rest = text[at:]
        if any(word.startswith(rest) for word in words) or (
            words is _FIXED and _OPEN_ENDED.fullmatch(rest)
        ):
            return at
    return len(text)


# --- values --------------------------------------------------------------------------------------
# How well a place is fit to be a value's end, if none is certain.
_GOOD, _POOR = 0, 1


class ValueEnd:
    """Finds the end of a parameter's value, which may hold tags itself.

    A closing ``</parameter>`` is the end for certain if it belongs to no call within the value and
    the grammar goes on after it: with a parameter of the tool, or with the call's end and then
    another call or the answer's end. Other tags, and missing ones, leave a doubt that only the rest
    of the answer resolves: they are remembered, and the first good one is taken at the end. A JSON
    value ends with its last bracket.

    Args:
        parameters: those of the tool.
        is_json: whether the value is to be an object or a list.
        is_block: whether the value begins on a line of its own. Tags in the middle of a line are
            then the value's own.
    """

    def __init__(self, parameters: Parameters, is_json: bool, is_block: bool):
        self._parameters, self._is_block = parameters, is_block
        self._json = JSONEnd() if is_json else None
        self._at = 0  # all tags before are looked at
        self._before = "\n"  # the character before the text
        self._opened: list[str] = []  # within the value
        self.doubts: list[tuple[int, int]] = []  # (how fit, where)

    def find(self, text: str, final: bool) -> int | None:
        """The value's end; None if it is not known yet, which it always is if ``final``."""
        if self._json is not None:
            end = self._json.find(text)
            if end is None and not final:
                return None
            after = None if end is None else next_tag(text, end, final)
            if end is not None and after is None:
                return None
            if after is not None and after.kind not in ("text", "<parameter", "</function"):
                return after.start
            self._json = None  # a text that looks like JSON
        while match := TAG.search(text, self._at):
            tag = tag_of(match)
            if tag.kind.startswith("</"):
                verdict = self._judge(text, tag, final)
                if verdict is None:
                    return None
                if verdict:
                    return tag.start
            elif (self._begins_line(text, tag) or not self._is_block) and (
                tag.kind != "<parameter" or "function" in self._opened
            ):
                self._opened.append(tag.kind[1:])
            self._at = tag.end
        self._at = max(self._at, held_from(text, self._at))
        if not final:
            return None
        fit = [place for fitness, place in self.doubts if fitness == _GOOD]
        fit += [place for _, place in self.doubts]
        return fit[0] if fit else len(text)

    def shift(self, taken: str) -> None:
        """Takes account of text that was taken away from the beginning."""
        count, self._before = len(taken), taken[-1]
        self._at -= count
        self.doubts = [(fitness, place - count) for fitness, place in self.doubts]

    @property
    def certain(self) -> int:
        """The end of the text that belongs to the value for certain."""
        return self.doubts[0][1] if self.doubts else self._at

    def _judge(self, text: str, tag: Tag, final: bool) -> bool | None:
        """Whether the value ends at a closing tag for certain; None if that is not known yet."""
        follow = self._follow(text, tag, final)
        if follow is None:
            return None
        kind = tag.kind[2:]
        if kind in self._opened:
            while self._opened.pop() != kind:
                pass
            if kind == "parameter" and follow in ("parameter", "end of call"):
                self.doubts.append((_GOOD, tag.start))
            return False
        if kind == "parameter" and follow in ("parameter", "end of call"):
            before = self._begins_line(text, tag)
            after = text[tag.end : tag.end + 1] == "\n"
            own_line = before or after if follow == "parameter" else before and after
            if own_line or not self._is_block:
                return True
        elif kind != "parameter" and self._is_block and not self._begins_line(text, tag):
            return False
        if follow in ("parameter", "end of call", "other parameter", "text after call"):
            self.doubts.append((_GOOD, tag.start))
            return False
        alone = follow == "text" and kind != "parameter" and self._begins_line(text, tag)
        if alone or follow == "text after function":
            self.doubts.append((_POOR, tag.start))
        return False

    def _begins_line(self, text: str, tag: Tag) -> bool:
        return (text[tag.start - 1] if tag.start else self._before) == "\n"

    def _follow(self, text: str, tag: Tag, final: bool) -> str | None:
        """Names the continuation after a closing tag; None if it is not known yet."""
        if tag.kind == "</parameter":
            after = next_tag(text, tag.end, final)
            if after is None:
                return None
            if after.kind == "<parameter":
                return "parameter" if after.name in self._parameters else "other parameter"
            if after.kind == "end":
                return "end of call"
            if after.kind in ("</function", "</call"):
                return self._follow(text, after, final)
            return "other parameter" if after.kind in ("<call", "<function") else "text"
        after = next_tag(text, tag.end, final)
        if after is None:
            return None
        if after.kind in ("end", "<call"):
            return "end of call"
        if tag.kind == "</function":
            if after.kind == "</call":
                return self._follow(text, after, final)
            if after.kind != "<function":
                return "text after function"
            inside = next_tag(text, after.end, final)
            if inside is None:
                return None
            is_call = inside.kind in ("<parameter", "</function", "</call")
            return "end of call" if is_call else "text after function"
        return "text after call" if after.kind == "text" else "text"


# --- tools and calls as JSON values ---------------------------------------------------------------
def parameters_of(tools: Sequence[Any]) -> dict[str, Parameters]:
    """Function name -> its parameters; tools that are none are left out."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            found[function["name"]] = Parameters(function.get("parameters"))
    return found


def calls_of(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The names and arguments of the calls that a JSON value describes; none if it is no call."""
    if value is NOTHING:
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name:
            return []
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = load_mended(arguments) if arguments.strip() else {}
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            return []
        calls.append((name, arguments))
    return calls
