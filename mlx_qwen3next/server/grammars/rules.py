"""Rules and terminals of a grammar, in llguidance's variant of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# llguidance's options: JSON as Python writes it, without \u escapes, which may be half a character.
_OPTIONS = {
    **{"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "json_allowed_escapes": 'nrbtf\\"',
}
_TAGS = r"(<tool_call>|<\/tool_call>|<\/function>|<\/parameter>|<function=|<parameter=)"
PLAIN = rf"/(?s:.*)/ & ~/(?s:.*){_TAGS}(?s:.*)/"  # a text that is no call, nor a part of one


def literal(text: str) -> str:
    """A text as it is."""
    return json.dumps(text, ensure_ascii=False)


class Rules:
    """The rules of one grammar, which have numbers in their names."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}  # by their bodies, so that none is written twice

    def add(self, kind: str, body: str) -> str:
        """Adds a rule, or a terminal if ``kind`` is in upper case; returns its name."""
        if body not in self._lines:
            self._lines[body] = f"{kind}{len(self._lines)}"
        return self._lines[body]

    def plain(self) -> str:
        """Text without tags of calls."""
        return self.add("TEXT", PLAIN)

    def ended(self, terminal: str, *ends: str) -> str:
        """A text, then what ends it.

        Args:
            terminal: the text, which must not hold the first of the ends.
            ends: a tag that is a token of its own or a literal first, then texts.
        """
        first, *rest = ends
        if first.startswith('"'):
            return self.add("ENDED", f"({terminal}) " + " ".join([first, *map(literal, rest)]))
        return " ".join([self.add("TEXT", terminal), first, *map(literal, rest)])

    def json(self, schema: Any, is_strict: bool = True) -> str:
        """JSON that fits a schema.

        Args:
            is_strict: whether keywords that llguidance cannot enforce are faults, or else ignored.
        """
        schema = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
        options = _OPTIONS | ({} if is_strict else {"lenient": True})
        text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
        return self.add("json", f"%json {text}")

    def text(self, start: str) -> str:
        """The whole grammar, which begins with ``start``."""
        rules = [f"{name}: {body}" for body, name in self._lines.items()]
        return "\n".join([f"start: {start}", *rules])
