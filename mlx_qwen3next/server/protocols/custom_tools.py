"""Tools of Responses that take a free text: functions with that text as their only parameter."""

from __future__ import annotations

import json
import re
from typing import Any

from ..requests.checks import mapping

_NAME = "input"
_SCHEMA = {"type": "object", "properties": {_NAME: {"type": "string"}}, "required": [_NAME]}
# The beginning of such a call's arguments, as far as no escape in it is cut off.
_BEGUN = re.compile(rf'\s*\{{\s*"{_NAME}"\s*:\s*"((?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{{4}}))*)')
_HALF_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")


def fields_of(path: str, tool: dict[str, Any]) -> dict[str, Any]:
    """The fields of the function that stands for a custom tool.

    A grammar, which the server does not enforce, is told to the model.
    """
    form = mapping(f"{path}.format", tool.get("format", {}))
    fields: dict[str, Any] = {"parameters": _SCHEMA}
    parts = [str(tool["description"])] if tool.get("description") else []
    if form.get("type") == "grammar":
        syntax, definition = form.get("syntax"), form.get("definition")
        parts.append(f"The {_NAME} must fit this {syntax} grammar:\n{definition}")
    return fields | ({"description": "\n\n".join(parts)} if parts else {})


def arguments_of(text: Any) -> str:
    """The arguments of a call with this text, in JSON."""
    return json.dumps({_NAME: text}, ensure_ascii=False)


def begun_text(arguments: str) -> str:
    """The text of a call whose arguments, in JSON, may go on."""
    match = _BEGUN.match(arguments)
    return json.loads(f'"{_HALF_PAIR.sub("", match[1])}"', strict=False) if match else ""


def whole_text(arguments: str) -> str:
    """The text of a call; all of its arguments, in JSON, if it is not among them."""
    if _BEGUN.match(arguments):
        return begun_text(arguments)
    text = json.loads(arguments).get(_NAME)
    return text if isinstance(text, str) else arguments
