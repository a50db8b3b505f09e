"""The messages and tools of a chat: their checks, and the form that chat templates read."""

from __future__ import annotations

from typing import Any

from .checks import filled_string, list_of, load_json, mapping, one_of, string, unfit


def message(path: str, value: Any) -> dict[str, Any]:
    fields = mapping(path, value)
    roles = one_of("system", "developer", "user", "assistant", "tool")
    role = roles(f"{path}.role", fields.get("role"))
    fields["role"] = "system" if role == "developer" else role
    missing = "" if role == "assistant" else None
    fields["content"] = _content(f"{path}.content", fields.get("content", missing))
    if "tool_calls" in fields:
        fields["tool_calls"] = list_of(_tool_call)(f"{path}.tool_calls", fields["tool_calls"])
    return fields


def _content(path: str, value: Any) -> str:
    if isinstance(value, list):
        return "".join(list_of(_part)(path, value))
    if not isinstance(value, str):
        raise unfit(path, value, "a string or a list of parts of type 'text'")
    return value


def _part(path: str, value: Any) -> str:
    part = mapping(path, value)
    kinds = one_of("text", "input_text", "refusal", hint="; other types are not supported")
    kind = kinds(f"{path}.type", part.get("type"))
    name = "refusal" if kind == "refusal" else "text"
    return string(f"{path}.{name}", part.get(name))


def _tool_call(path: str, value: Any) -> dict[str, Any]:
    call = mapping(path, value)
    path = f"{path}.function"
    function = mapping(path, call.get("function"))
    filled_string(f"{path}.name", function.get("name"))
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments)
        except ValueError:
            raise unfit(f"{path}.arguments", arguments, "the JSON text of an object") from None
    if not isinstance(arguments, dict):
        raise unfit(f"{path}.arguments", arguments, "the JSON text of an object")
    return call | {"function": function | {"arguments": arguments}}


def tool(path: str, value: Any) -> dict[str, Any]:
    fields = mapping(path, value)
    one_of("function")(f"{path}.type", fields.get("type"))
    path = f"{path}.function"
    function = _described(path, fields.get("function"))
    filled_string(f"{path}.name", function.get("name"))
    if "parameters" in function:
        path = f"{path}.parameters"
        function["parameters"] = parameters = mapping(path, function["parameters"])
        if "properties" in parameters:
            path = f"{path}.properties"
            parameters["properties"] = {
                name: _described(f"{path}.{name}", schema)
                for name, schema in mapping(path, parameters["properties"]).items()
            }
    return fields | {"function": function}


def _described(path: str, value: Any) -> dict[str, Any]:
    """Checks an object, whose description must be a string because templates concatenate it."""
    described = mapping(path, value)
    string(f"{path}.description", described.get("description", ""))
    return described
