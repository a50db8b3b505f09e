"""The messages and tools of a chat: their checks, and the form that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from .checks import filled_string, list_of, load_json, mapping, one_of, string, unfit

# Type of a part of the content -> the fields that may hold its text.
_SPOKEN = {"text": ("text",), "input_text": ("text",), "output_text": ("text",)}
_SPOKEN |= {"refusal": ("refusal",)}
_THOUGHT = {"thinking": ("thinking", "text"), "reasoning": ("text", "reasoning")}
# Type of a part that the model cannot read -> its name. It is left out, and not refused, because an
# agent sends it again with every later request of the conversation.
UNREADABLE = {"image": "image", "image_url": "image", "input_image": "image"}
UNREADABLE |= {"document": "document", "file": "file", "input_file": "file"}
UNREADABLE |= {"input_audio": "recording"}


def message(path: str, value: Any) -> dict[str, Any]:
    """Checks a message.

    Returns:
        The message with a string as ``content``, which is empty for null, and mappings as the
        arguments of its tool calls. The reasoning of an assistant, whether it came as
        ``reasoning_content``, as ``reasoning`` or as parts of the content, is its
        ``reasoning_content``. OpenAI's older form, a ``function_call`` and a message of the role
        ``function``, becomes a tool call and a tool's message.
    """
    fields = mapping(path, value)
    roles = one_of("system", "developer", "user", "assistant", "tool", "function")
    role = roles(f"{path}.role", fields.get("role"))
    fields["role"] = {"developer": "system", "function": "tool"}.get(role, role)
    is_assistant = role == "assistant"
    given = fields.get("content", "")
    fields["content"], thought = content(f"{path}.content", given, thinks=is_assistant)
    if is_assistant:
        names = [name for name in ("reasoning_content", "reasoning") if name in fields]
        thoughts = [string(f"{path}.{name}", fields.pop(name)) for name in names]
        if reasoning := next(filter(None, [*thoughts, thought]), ""):
            fields["reasoning_content"] = reasoning
    if "tool_calls" in fields:
        fields["tool_calls"] = list_of(_tool_call)(f"{path}.tool_calls", fields["tool_calls"])
    elif "function_call" in fields:
        function = _called(f"{path}.function_call", fields.pop("function_call"))
        fields["tool_calls"] = [{"type": "function", "function": function}]
    return fields


def left_out(kind: str) -> str:
    """The text in place of a part that is :data:`UNREADABLE`."""
    return f"[Left out: {UNREADABLE[kind]}. This model reads only text.]"


def content(path: str, value: Any, *, thinks: bool) -> tuple[str, str]:
    """Checks a content and returns its text and its reasoning.

    Args:
        thinks: whether the content may hold reasoning.
    """
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, list):
        raise unfit(path, value, "a string or a list of parts of type 'text'")
    known = _SPOKEN | _THOUGHT if thinks else _SPOKEN
    kinds = one_of(*known, *UNREADABLE, hint="; other types are not supported")
    texts = {"spoken": "", "thought": ""}
    for i, entry in enumerate(value):
        at = f"{path}[{i}]"
        part = mapping(at, entry)
        kind = kinds(f"{at}.type", part.get("type"))
        if kind in UNREADABLE:
            texts["spoken"] += left_out(kind)
            continue
        field = next((name for name in known[kind] if name in part), known[kind][0])
        texts["thought" if kind in _THOUGHT else "spoken"] += string(
            f"{at}.{field}", part.get(field)
        )
    return texts["spoken"], texts["thought"]


def _tool_call(path: str, value: Any) -> dict[str, Any]:
    call = mapping(path, value)
    return call | {"function": _called(f"{path}.function", call.get("function"))}


def _called(path: str, value: Any) -> dict[str, Any]:
    function = mapping(path, value)
    filled_string(f"{path}.name", function.get("name"))
    return function | {"arguments": _arguments(function.get("arguments"))}


def _arguments(value: Any) -> dict[str, Any]:
    """Returns the arguments of a call as the mapping that templates need.

    A model may have written no JSON object: a part of one, a list, or any other text. Such
    arguments become ``{"arguments": TEXT}``, with the text as it came, so that the template shows
    all of it, as a parameter of that name. Null and an empty text become ``{}``.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        value = load_json(text) if text.strip() else None
    except ValueError:
        return {"arguments": text}
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"arguments": text}


def tool(path: str, value: Any) -> dict[str, Any]:
    """Checks a tool, and brings its schemas into the form of :func:`_schema`."""
    fields = mapping(path, value)
    one_of("function")(f"{path}.type", fields.get("type"))
    path = f"{path}.function"
    function = _described(mapping(path, fields.get("function")))
    filled_string(f"{path}.name", function.get("name"))
    if "parameters" in function:
        function["parameters"] = _schema(function["parameters"])
    return fields | {"function": function}


def _schema(value: Any) -> dict[str, Any]:
    """Returns a JSON schema in a form that templates can take: objects with text in them.

    Templates look up the properties of a schema, and the type and description of these. JSON's true
    and false are schemas too; they and all that is no schema become ``{}``.
    """
    if not isinstance(value, dict):
        return {}
    kept = {key: x for key, x in value.items() if x is not None or key == "const"}
    schema = _described(kept)
    if "properties" in schema:
        properties = schema["properties"]
        properties = properties.items() if isinstance(properties, dict) else ()
        schema["properties"] = {name: _schema(entry) for name, entry in properties}
    return schema


def _described(fields: dict[str, Any]) -> dict[str, Any]:
    """Makes sure that a description is a string, because templates concatenate it."""
    description = fields.get("description", "")
    if isinstance(description, str):
        return fields
    return fields | {"description": json.dumps(description, ensure_ascii=False)}
