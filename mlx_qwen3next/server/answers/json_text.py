"""JSON as models write it: its end, its mistakes, its text as it comes."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

NOTHING: Any = object()  # no value
MOST_DIGITS = 4000  # of an integer: Python's own limit is 4,300
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_TOKEN = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_PYTHON_ESCAPE = re.compile(r"\\(.|$)", re.DOTALL)


class JSONEnd:
    """Finds the end of the first JSON object or list in a text, which grows."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._in_string = False
        self._end: int | None = None

    def find(self, text: str) -> int | None:
        """The position after it, or None if it has not ended."""
        if self._end is not None:
            return self._end
        if not self._depth:
            starts = [at for at in map(text.find, "{[") if at >= 0]
            self._at = min(starts, default=len(text))
        for match in _TOKEN.finditer(text, self._at):
            token = match[0]
            self._at = match.end()
            if token == '"':
                self._in_string = not self._in_string
            elif not self._in_string and token in "{[":
                self._depth += 1
            elif not self._in_string and token in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._end = match.end()
                    break
        return self._end


# --- JSON as it comes ----------------------------------------------------------------------------
_CLOSERS = {"{": "}", "[": "]"}
_WORDS = ("true", "false", "null")
_MOST_BRACKETS = 200  # within each other: Python's own limit is near 1,000
_BLANKS = re.compile(r"\s*")
_BARE = re.compile(r"""[^\s,:{}\[\]"'<]+""")
_KEY = re.compile(rf""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|{_BARE.pattern}""", re.DOTALL)
_IN_STRING = re.compile(r"""\\(?:u[0-9a-fA-F]{0,4}|.)?|["']|\n\s*""", re.DOTALL)
_UNFINISHED = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_HIGH_HALF = re.compile(r"\\u[dD][89abAB]..")  # of a surrogate pair
_HALF = 6  # characters of either half
_ESCAPE = re.compile(r"""\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\\'|\\|\"""")
_END_OF_CALL = "</tool_call>"


class MendedJSON:
    """Makes valid JSON from a model's, which comes piece by piece, as soon as it is certain.

    Trailing commas are left out, escapes that JSON has not get their backslash doubled, raw line
    breaks are escaped, halves of surrogate pairs become U+FFFD. Numbers keep their digits. Beyond
    these usual mistakes it guesses: Python's literals and strings are taken for JSON's, and other
    bare words for strings; a quote within a string belongs to it unless a comma, a closing bracket
    or the call's end follows; a string without its last quote ends before a line with the call's
    end after which another call or nothing follows; a missing value is null; missing closing
    brackets are added. Any other text ends the JSON, and whatever is open is closed.

    What comes out depends on the text alone, not on its pieces.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_guess = False  # whether there was more than usual mistakes
        self.is_cut = False  # whether the text has ended before the JSON
        self._out: list[str] = []
        self._closers: list[str] = []  # of the open brackets
        self._expected = "value"  # or "item", or "comma" after one
        self._is_first = True  # whether the item is its bracket's first
        self._quote = ""  # that began the string that is being read

    def read(self, text: str, final: bool) -> tuple[str, int]:
        """Reads on.

        Args:
            text: what has not been read yet.
            final: whether no more text will come.

        Returns:
            The JSON text that is certain, and how much of ``text`` has been read.
        """
        at = 0
        while not self.is_done:
            read = self._read_string if self._quote else self._read_token
            end = read(text, at, final)
            if end is not None:
                at = end
            elif final:
                self.is_cut = True
                self._stop()
            else:
                break
        certain, self._out = "".join(self._out), []
        return certain, at

    def _stop(self) -> None:
        """Closes whatever is open."""
        if self._quote:
            self._out.append('"')
        elif self._expected == "value":
            self._out.append("null")
        self._out += reversed(self._closers)
        self.is_done = self.is_guess = True

    def _add_value(self, text: str) -> None:
        self._out.append(text)
        self._expected, self._is_first = "comma", False
        self.is_done = not self._closers

    def _read_token(self, text: str, at: int, final: bool) -> int | None:
        """Returns the end of a bracket, comma, key, word or opening quote at a place; None if that
        takes more text."""
        at = _blanks_end(text, at)
        if at == len(text):
            return None
        character = text[at]
        if self._expected == "comma" and character == ",":
            self._expected = "item"
            return at + 1
        if self._expected != "value" and character in self._closers:
            while (closer := self._closers.pop()) != character:
                self._out.append(closer)
                self.is_guess = True
            self._add_value(character)
            return at + 1
        if self._expected == "comma":
            self._stop()
            return at
        if self._expected == "item" and self._closers[-1] == "}":
            return self._read_key(text, at)
        return self._read_value(text, at, final)

    def _read_key(self, text: str, at: int) -> int | None:
        match = _KEY.match(text, at)
        if match is None and text[at] in "\"'":
            return None
        colon = _blanks_end(text, match.end()) if match else at
        if colon == len(text):
            return None
        if match is None or text[colon] != ":":
            self._stop()
            return at
        key = match[0]
        quote = key[0] if key[0] in "\"'" else ""
        self.is_guess |= quote != '"'
        key = _string_text(key[1:-1] if quote else key, quote)
        self._out.append(f'{"" if self._is_first else ", "}"{key}": ')
        self._expected = "value"
        return colon + 1

    def _read_value(self, text: str, at: int, final: bool) -> int | None:
        character, match = text[at], _BARE.match(text, at)
        if match and match.end() == len(text) and not final:
            return None
        is_bracket = character in _CLOSERS and len(self._closers) < _MOST_BRACKETS
        if not (match or is_bracket or character in "\"'"):
            self.is_guess = True
            if self._expected == "value" and self._closers and character in ",}]":
                self._add_value("null")
            else:
                self._stop()
            return at
        if self._expected == "item" and not self._is_first:
            self._out.append(", ")
        if match:
            word = match[0]
            is_json = word in _WORDS or _is_number(word)
            self.is_guess |= not is_json
            self._add_value(word if is_json else _dumped(_guessed(word)))
            return match.end()
        if is_bracket:
            self._out.append(character)
            self._closers.append(_CLOSERS[character])
            self._expected, self._is_first = "item", True
        else:
            self._out.append('"')
            self._quote = character
            self.is_guess |= character == "'"
        return at + 1

    def _read_string(self, text: str, at: int, final: bool) -> int | None:
        """Returns the end of the certain part of a string; None if that takes more text."""
        end, after = self._string_end(text, at, final)
        self._out.append(_string_text(text[at:end], self._quote))
        if after is not None:
            self._quote = ""
            self._add_value('"')
            return after
        return end if end > at else None

    def _string_end(self, text: str, at: int, final: bool) -> tuple[int, int | None]:
        """The end of the certain part of a string, and where the JSON goes on if that is all."""
        for match in _IN_STRING.finditer(text, at):
            token, start, end = match[0], *match.span()
            if token == self._quote:
                ends = _follows(text, end, (",", "}", "]", _END_OF_CALL), final)
                self.is_guess |= ends is False
            elif token[0] == "\n":  # a line break that is not escaped, so not JSON's
                ends = _follows(text, end, (_END_OF_CALL,), final, or_end=False) and _follows(
                    text, end + len(_END_OF_CALL), ("<tool_call>",), final
                )
                end = start
            elif (end == len(text) and _UNFINISHED.fullmatch(token)) or (
                len(text) - end < _HALF and _HIGH_HALF.fullmatch(token)
            ):
                ends = False if final else None
            else:
                continue
            if ends is not False:
                return start, end if ends else None
        return len(text), None


def _blanks_end(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    assert match is not None
    return match.end()


def _follows(
    text: str, at: int, words: Sequence[str], final: bool, *, or_end: bool = True
) -> bool | None:
    """Whether one of some words, or the text's end, comes after blanks; None if that is not known
    yet."""
    at = _blanks_end(text, at)
    if at == len(text):
        return or_end if final else None
    if text.startswith(tuple(words), at):
        return True
    is_part = any(word.startswith(text[at : at + len(word)]) for word in words)
    return None if is_part and not final else False


def _is_number(word: str) -> bool:
    match = NUMBER.fullmatch(word)
    if match is None or len(word) > MOST_DIGITS:
        return False
    return not (match[2] or match[3]) or math.isfinite(float(word))


def _guessed(word: str) -> Any:
    """The value of a word that JSON has not: Python's if it is a plain one, else the word."""
    value = NOTHING if NUMBER.fullmatch(word) else _python_value(word)
    return value if value is None or isinstance(value, (int, float)) else word


def _string_text(text: str, quote: str) -> str:
    """The JSON text, without quotes, of a string's text that stood in such quotes."""
    mended = {"\\": "\\\\", '"': '\\"', "\\'": "'" if quote == "'" else "\\\\'"}
    text = _ESCAPE.sub(lambda escape: mended.get(escape[0], escape[0]), text)
    return _dumped(json.loads(f'"{text}"', strict=False))[1:-1]


def _dumped(value: Any) -> str:
    return json.dumps(_whole(value), ensure_ascii=False)


# --- whole values --------------------------------------------------------------------------------
def load_mended(text: str) -> Any:
    """The JSON value of a text, with a model's usual mistakes mended.

    Mended are raw line breaks in strings, escapes that JSON has not, trailing commas, Python's
    literals, and halves of surrogate pairs, which become U+FFFD.

    Returns:
        The value, or :data:`NOTHING` if there is none.
    """
    try:
        return _whole(json.loads(text, strict=False, parse_constant=_finite, parse_float=_finite))
    except (ValueError, RecursionError):
        pass
    json_text = MendedJSON()
    mended, end = json_text.read(text, final=True)
    if not json_text.is_guess and not text[end:].strip():
        return json.loads(mended)
    return _python_value(text)


def _python_value(text: str) -> Any:
    """The value of a Python literal that JSON can hold; NOTHING if it is none."""
    try:
        value = ast.literal_eval(_PYTHON_ESCAPE.sub(_doubled, text))
        json.dumps(value, allow_nan=False)
        return _whole(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return NOTHING


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _doubled(escape: re.Match[str]) -> str:
    """An escape, whose backslash is doubled if Python has no such escape."""
    return escape[0] if escape[1] and escape[1] in "\\'\"abfnrtv01234567\n" else "\\" + escape[0]


def _whole(value: Any) -> Any:
    """The value, in which halves of surrogate pairs are replaced."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(str(key)): _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value
