"""From the body of OpenAI's Responses to that of a chat completion.

The items of a conversation become messages: reasoning, texts and calls of the assistant that follow
each other are one message, as they were one answer. Tools that OpenAI's own servers would run are
left out. Hints are, too: ``metadata``, ``prompt_cache_key``, ``truncation``, ``text.verbosity``,
``reasoning.summary`` and the like.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, NamedTuple

from ..requests.checks import RequestError, filled_string, list_of, mapping, one_of, string, unfit
from ..requests.fields import answer_format, token_limit
from ..requests.messages import content, message
from . import custom_tools
from .form import SHARED
from .stored import Stored

_UNSUPPORTED = ("background", "conversation", "prompt")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
_CALLS = ("function_call", "custom_tool_call")
_ITEMS = ("message", *_CALLS, *_OUTPUTS, "reasoning", "item_reference")
# Tools that a server of OpenAI's runs; an agent offers them in case it talks to one.
_HOSTED = (
    *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
    *("file_search", "code_interpreter", "image_generation", "computer_use_preview", "mcp"),
    *("local_shell", "shell", "tool_search"),
)
LOGPROBS = "message.output_text.logprobs"  # in ``include``
_SEALED = "reasoning:"  # before reasoning in ``encrypted_content``


def items_of(body: dict[str, Any], stored: Stored) -> list[dict[str, Any]]:
    """The items of the conversation that a body continues, those of earlier responses included.

    Raises:
        RequestError: the input is missing or is no list of items, or refers to what is not kept.
    """
    previous: list[dict[str, Any]] = []
    if (name := body.get("previous_response_id")) is not None:
        at = "previous_response_id"
        previous = stored.get(string(at, name), at, status=400).items
    elif "input" not in body:
        raise RequestError("input is missing: a request must have it", "input")
    given = body.get("input", [])
    if isinstance(given, str):
        return [*previous, {"type": "message", "role": "user", "content": given}]
    items = list_of(mapping)("input", given)
    for i, item in enumerate(items):
        path = f"input[{i}]"
        kind = item.setdefault("type", "message")
        hint = "; other items are not supported"
        if one_of(*_ITEMS, hint=hint)(f"{path}.type", kind) == "item_reference":
            items[i] = stored.item(path, string(f"{path}.id", item.get("id")))
    if not previous and not items:
        raise unfit("input", given, "a text or a list of items, and not empty")
    return [*previous, *items]


def chat_request(body: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    """Translates a body.

    Args:
        items: of the conversation; see :func:`items_of`.

    Raises:
        RequestError: it is malformed, or asks for what the server cannot do.
    """
    for name in _UNSUPPORTED:
        if body.get(name):
            raise RequestError(f"{name} is not supported; leave it out", name)
    text = mapping("text", body.get("text", {}))
    chat = {name: body[name] for name in SHARED if name in body}
    if "format" in text:
        chat["response_format"] = answer_format("text.format", text["format"])
    # The position of an item in the input is known only without those of earlier responses.
    place = "input[{}]" if body.get("previous_response_id") is None else "item {}"
    chat["messages"] = _messages(items, place)
    if "instructions" in body:
        instructions = string("instructions", body["instructions"])
        chat["messages"].insert(0, {"role": "system", "content": instructions})
    if "max_output_tokens" in body:
        limit = token_limit("max_output_tokens", body["max_output_tokens"])
        chat["max_tokens"] = limit
    if "tools" in body:
        chat["tools"] = [each.function for each in functions_of(body["tools"])]
    if "tool_choice" in body:
        chat["tool_choice"] = _tool_choice(body["tool_choice"])
    if "parallel_tool_calls" in body:
        chat["parallel_tool_calls"] = body["parallel_tool_calls"]
    if LOGPROBS in list_of(string)("include", body.get("include", [])):
        chat |= {"logprobs": True, "top_logprobs": body.get("top_logprobs", 0)}
    reasoning = mapping("reasoning", body.get("reasoning", {}))
    if reasoning.get("effort") == "none":
        options = mapping("chat_template_kwargs", body.get("chat_template_kwargs", {}))
        chat["chat_template_kwargs"] = {"enable_thinking": False} | options
    return chat


class Function(NamedTuple):
    """A function that the model may call.

    Args:
        function: in the form of a chat.
        space: the namespace that it is in.
        is_custom: whether it stands for a tool that takes a free text.
    """

    function: dict[str, Any]
    space: str | None
    is_custom: bool


def functions_of(tools: Any) -> list[Function]:
    """The functions among tools."""
    functions: list[Function] = []
    for i, tool in enumerate(list_of(mapping)("tools", tools)):
        path = f"tools[{i}]"
        hint = "; other tools are not supported"
        known = one_of("function", "custom", "namespace", *_HOSTED, hint=hint)
        kind = known(f"{path}.type", tool.get("type"))
        if kind in ("function", "custom"):
            functions.append(_function(path, tool))
        elif kind == "namespace":
            space = filled_string(f"{path}.name", tool.get("name"))
            inner = list_of(mapping)(f"{path}.tools", tool.get("tools"))
            for j, function in enumerate(inner):
                at = f"{path}.tools[{j}]"
                one_of("function", "custom")(f"{at}.type", function.get("type"))
                functions.append(_function(at, function, space))
    return functions


def sealed(reasoning: str) -> str:
    """Reasoning as ``encrypted_content``, for clients that send nothing else of it back."""
    return base64.b64encode(f"{_SEALED}{reasoning}".encode()).decode()


def _unsealed(text: Any) -> str:
    """The reasoning in an ``encrypted_content``; empty if another server wrote it."""
    try:
        opened = base64.b64decode(text, validate=True).decode()
    except (TypeError, ValueError, binascii.Error):
        return ""
    return opened.removeprefix(_SEALED) if opened.startswith(_SEALED) else ""


def _function(path: str, tool: dict[str, Any], space: str | None = None) -> Function:
    name = _qualified(filled_string(f"{path}.name", tool.get("name")), space)
    is_custom = tool["type"] == "custom"
    if is_custom:
        kept = custom_tools.fields_of(path, tool)
    else:
        kept = {key: tool[key] for key in ("description", "parameters", "strict") if key in tool}
    function = {"type": "function", "function": {"name": name} | kept}
    return Function(function, space, is_custom)


def _qualified(name: str, space: str | None) -> str:
    """The name under which the model knows a function."""
    return name if space is None else f"{space}.{name}"


def _tool_choice(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kinds = one_of("function", "custom", hint="; other tools cannot be forced")
    kinds("tool_choice.type", value.get("type"))
    name = filled_string("tool_choice.name", value.get("name"))
    return {"type": "function", "function": {"name": name}}


def _messages(items: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        path, kind = place.format(i), item["type"]
        if kind == "message" and item.get("role") != "assistant":
            known = {name: item[name] for name in ("role", "content") if name in item}
            messages.append(message(path, known))
            continue
        if kind in _OUTPUTS:
            output, _ = content(f"{path}.output", item.get("output", ""), thinks=False)
            call = item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": call, "content": output})
            continue
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        _add(messages[-1], path, item)
    return messages


def _add(answer: dict[str, Any], path: str, item: dict[str, Any]) -> None:
    """Adds an item of the assistant's to its message."""
    if item["type"] == "message":
        answer["content"] += content(f"{path}.content", item.get("content", ""), thinks=False)[0]
    elif item["type"] == "reasoning":
        parts = list_of(mapping)(f"{path}.content", item.get("content", []))
        text = "".join(string(f"{path}.content.text", part.get("text")) for part in parts)
        text = text or _unsealed(item.get("encrypted_content"))
        answer["reasoning_content"] = answer.get("reasoning_content", "") + text
    else:
        space = item.get("namespace")
        if space is not None:
            filled_string(f"{path}.namespace", space)
        name = _qualified(filled_string(f"{path}.name", item.get("name")), space)
        arguments = item.get("arguments")
        if item["type"] == "custom_tool_call":
            text = string(f"{path}.input", item.get("input", ""))
            arguments = custom_tools.arguments_of(text)
        function = {"name": name, "arguments": arguments}
        call = {"type": "function", "id": item.get("call_id"), "function": function}
        answer.setdefault("tool_calls", []).append(call)
