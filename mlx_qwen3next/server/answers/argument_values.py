"""The values of a call's arguments, from the model's text, of the types that the schema allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .json_schema import MOST_REFERENCES, find, followed
from .json_text import MOST_DIGITS, NOTHING, NUMBER, load_mended

_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})


class Parameters:
    """The parameters of one tool, by its JSON schema, which may be anything.

    Args:
        schema: the tool's ``parameters``.
    """

    def __init__(self, schema: Any):
        self._root = schema if isinstance(schema, Mapping) else {}
        top = find(self._root, followed(self._root, "#"))
        properties = top.get("properties") if isinstance(top, Mapping) else None
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._types: dict[str, frozenset[str]] = {}
        # A tool without a list of parameters takes any.
        self.takes_any = not self._properties

    def __contains__(self, name: str) -> bool:
        return self.takes_any or name in self._properties

    def is_text(self, name: str) -> bool:
        """Whether the parameter's value is the model's text itself, whatever it says."""
        return self._types_of(name) in (frozenset({"string"}), frozenset())

    def is_json(self, name: str) -> bool:
        """Whether the parameter's value is an object or a list, and nothing else but null."""
        types = self._types_of(name)
        return bool(types) and types <= {"object", "array", "null"}

    def value(self, name: str, text: str) -> Any:
        """The parameter's value: of a type that the schema allows, else the text as it is."""
        types, bare = self._types_of(name), text.strip()
        if "null" in types and bare in ("null", "None"):
            return None
        if types & {"object", "array"} and bare[:1] in ("{", "["):
            kind = "object" if bare[0] == "{" else "array"
            value = load_mended(bare) if kind in types else NOTHING
            if isinstance(value, dict if kind == "object" else list):
                return value
        if "string" in types or not types:
            return text
        if "boolean" in types and bare.lower() in ("true", "false"):
            return bare.lower() == "true"
        if types & {"integer", "number"} and (match := NUMBER.fullmatch(bare)):
            if not (match[2] or match[3]) and len(bare) <= MOST_DIGITS:
                return int(bare)
            number = float(bare)
            if "number" in types and abs(number) != float("inf"):
                return number
            if number.is_integer():
                return int(number)
        return text

    def _types_of(self, name: str) -> frozenset[str]:
        if name not in self._types:
            self._types[name] = self.allowed(self._properties.get(name))
        return self._types[name]

    def allowed(self, schema: Any, references: int = MOST_REFERENCES) -> frozenset[str]:
        """The types that a schema within that of the tool allows; none if it tells nothing of them.

        Args:
            references: how many are followed.
        """
        if not isinstance(schema, Mapping) or references == 0:
            return frozenset()
        said: list[frozenset[str]] = []
        named = schema.get("type")
        if isinstance(named, str):
            named = [named]
        if isinstance(named, Sequence):
            said.append(frozenset(k for k in named if isinstance(k, str) and k in _TYPES))
        for key in ("enum", "const"):
            values = schema.get(key, NOTHING)
            if values is not NOTHING:
                values = values if key == "enum" and isinstance(values, list) else [values]
                said.append(frozenset(_type_of(value) for value in values))
        if isinstance(reference := schema.get("$ref"), str):
            said.append(self.allowed(find(self._root, reference), references - 1))
        for key in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(key), list):
                several = [self.allowed(option, references - 1) for option in options]
                said.append(frozenset().union(*several) if all(several) else frozenset())
        if isinstance(parts := schema.get("allOf"), list):
            said += [self.allowed(part, references - 1) for part in parts]
        said = [types for types in said if types]
        if not said:
            return frozenset()
        common = frozenset.intersection(*said)
        return common or said[0]


def _type_of(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
    return "null" if value is None else kinds.get(type(value), "object")
