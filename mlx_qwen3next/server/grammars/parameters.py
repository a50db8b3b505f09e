"""The grammar of parameters in calls of the XML form, whose values are text or JSON.

A value is read by the types that its schema allows
(:mod:`mlx_qwen3next.server.answers.argument_values`). So a text is written as it is, and anything
else as JSON; texts hold no tags of calls, which could end them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import FieldError
from ..answers.argument_values import Parameters
from ..answers.json_schema import below, find, followed, standing_alone
from .rules import PLAIN, Rules, literal

_END = "\n</parameter>\n"
_MOST_BRANCHES = 20  # within each other
_NAME = re.compile(r"[^<>\n\s\"'][^<>\n]{0,250}(?<![\s\"'])")
# Keys at the top of a tool's schema that calls of this form obey, and those that ask for nothing.
_OBEYED = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_SILENT = {"title", "description", "$schema", "$id", "$comment", "examples", "default"}


class ParameterRules:
    """The rules of one tool's parameters.

    Args:
        rules: of the grammar, to which these are added.
        name: says in messages whose parameters they are.
        schema: the tool's, or None for any parameters.
        is_strict: whether a schema that such calls cannot obey is refused, or else obeyed as far as
            that goes.
    """

    def __init__(self, rules: Rules, name: str, schema: Any, is_strict: bool):
        self._rules, self._name, self._is_strict = rules, name, is_strict
        self._root = schema if isinstance(schema, Mapping) else {}
        self._reader = Parameters(self._root)

    def write(self) -> str:
        """Writes the rules; returns a body that stands for all parameters.

        Raises:
            FieldError: such calls cannot obey the schema, or have no parameter of a name.
        """
        pointer = followed(self._root, "#")
        top = found if isinstance(found := find(self._root, pointer), Mapping) else {}
        unknown = top.keys() - _OBEYED - _SILENT
        if self._is_strict and (unknown or isinstance(top.get("additionalProperties"), Mapping)):
            key = min(unknown, default="additionalProperties")
            message = f"{self._name}: this model's calls cannot obey {key} at the top of it"
            raise FieldError(message, "tools")
        properties = top.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            closed = top.get("additionalProperties") is False
            return "" if closed else self._any()
        named = top.get("required")
        required = named if isinstance(named, list) else []
        body = []
        for name in properties:
            if not _NAME.fullmatch(name):
                message = f"{self._name}: this model's calls can have no parameter {name!r}"
                raise FieldError(message, "tools")
            place = below(f"{pointer}/properties", name)
            opening = literal(f"<parameter={name}>\n")
            rule = self._rules.add("parameter", f"{opening} {self._value(place)}")
            body.append(rule if name in required else f"{rule}?")
        return " ".join(body)

    def _any(self) -> str:
        """Parameters of any names."""
        text = self._rules.add("TEXT", f"({PLAIN}) {literal(_END)}")
        one = self._rules.add("parameter", f'"<parameter=" /[A-Za-z0-9_.-]{{1,64}}/ ">\\n" {text}')
        return f"{one}*"

    def _value(self, place: str) -> str:
        """A value and its end, by the schema at a pointer."""
        types = self._types(place)
        if types and "string" not in types:
            return f"{self._json(standing_alone(self._root, place))} {literal(_END)}"
        found = self._alternatives(place, types, _MOST_BRANCHES)
        return self._rules.add("value", " | ".join(found) or self._text({}, types))

    def _types(self, place: str) -> frozenset[str]:
        return self._reader.allowed(find(self._root, place))

    def _alternatives(self, place: str, read: frozenset[str], depth: int) -> list[str]:
        """The forms of a value that may be a text, by its schema or one of several.

        Args:
            read: the types that the value's text is read as; the first that fits counts.
            depth: how many schemas within each other are looked at.
        """
        place = followed(self._root, place)
        schema = find(self._root, place)
        if not isinstance(schema, Mapping) or depth == 0:
            return [self._text({}, read)]
        for key in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(key), list):
                places = [f"{place}/{key}/{i}" for i in range(len(options))]
                return [x for p in places for x in self._alternatives(p, read, depth - 1)]
        types = self._types(place)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            texts = ["null" if value is None else value for value in values]
            return [literal(text + _END) for text in texts if isinstance(text, str)]
        found = [] if types and "string" not in types else [self._text(schema, read)]
        # Beside texts, numbers and truth values would be read as texts.
        if types & {"object", "array"}:
            alone = {"allOf": [{"type": sorted(types & {"object", "array"})}]}
            found.append(f"{self._json(standing_alone(self._root, place) | alone)} {literal(_END)}")
        return found + ([literal("null" + _END)] if "null" in types else [])

    def _json(self, schema: dict[str, Any]) -> str:
        return self._rules.json(schema, self._is_strict)

    def _text(self, schema: Mapping[str, Any], read: frozenset[str]) -> str:
        """A text and its end."""
        parts = [PLAIN]
        if read & {"object", "array"}:
            parts.append(r"~/\s*[\[{](?s:.*)/")
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if type(least) is int and (least or type(most) is int):
            parts.append(f"/(?s:.{{{least},{most if type(most) is int else ''}}})/")
        if isinstance(pattern := schema.get("pattern"), str):
            parts.append(_pattern(pattern))
        return self._rules.add("TEXT", f"({' & '.join(parts)}) {literal(_END)}")


def _pattern(pattern: str) -> str:
    """A terminal for texts in which a schema's pattern is found."""
    begins = "" if pattern.startswith("^") else "(?s:.*)"
    ends = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    inner = inner if ends else inner.removesuffix("$")
    return f"/{begins}({_slashed(inner)}){ends}/"


def _slashed(pattern: str) -> str:
    """A regular expression whose slashes do not end it."""
    return re.sub(r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], pattern, flags=re.DOTALL)
