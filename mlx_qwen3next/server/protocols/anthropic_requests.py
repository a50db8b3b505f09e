"""From the body of Anthropic's Messages to that of a chat completion.

All of it that changes the answer is translated or refused; hints are left out: ``cache_control``,
``metadata``, ``context_management``, ``output_config.effort``, ``service_tier`` and the like.
"""

from __future__ import annotations

import re
from typing import Any

from ..requests.checks import (
    RequestError,
    boolean,
    filled_string,
    list_of,
    mapping,
    one_of,
    string,
    unfit,
)
from ..requests.fields import answer_format, stop_words, token_limit
from ..requests.messages import UNREADABLE, left_out
from .form import SHARED

# Claude Code begins its system prompt with a line that changes from version to version, and with
# some versions from turn to turn. It means nothing to a model, and would end the known prompt.
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")
_LEFT_OUT = ("image", "document")
_UNSUPPORTED = ("mcp_servers", "container", "compaction")


def chat_request(body: dict[str, Any]) -> dict[str, Any]:
    """Translates a body.

    Raises:
        RequestError: it is malformed, or asks for what the server cannot do.
    """
    body = mapping("the body", body)
    for name in _UNSUPPORTED:
        if body.get(name):
            raise RequestError(f"{name} is not supported; leave it out", name)
    if "thread" in body:
        message = "thread is not supported: the server keeps no messages; send all of them"
        raise RequestError(message, "thread", code="thread_unsupported_request")
    if "messages" not in body:
        raise RequestError("messages is missing: a request must have it", "messages")
    messages = [_system(body["system"])] if "system" in body else []
    messages = [each for each in messages if each["content"]]
    given = list_of(mapping, least=1)("messages", body["messages"])
    for i, entry in enumerate(given):
        messages += _messages(f"messages[{i}]", entry)
    chat = {name: body[name] for name in SHARED if name in body} | {"messages": messages}
    if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        chat["continue_final_message"] = True
    config = mapping("output_config", body.get("output_config", {}))
    formats = {"output_config.format": config.get("format")}
    formats["output_format"] = body.get("output_format")  # its name before
    for path, value in formats.items():
        if value is not None:
            chat["response_format"] = answer_format(path, value)
    if "max_tokens" in body:
        chat["max_tokens"] = token_limit("max_tokens", body["max_tokens"])
    if "stop_sequences" in body:
        chat["stop"] = stop_words("stop_sequences", body["stop_sequences"])
    if "tools" in body:
        chat["tools"] = list_of(_tool)("tools", body["tools"])
    if "tool_choice" in body:
        chat |= _tool_choice(mapping("tool_choice", body["tool_choice"]))
    if "thinking" in body:
        chat |= _thinking(body.get("chat_template_kwargs", {}), body["thinking"])
    return chat


def _system(value: Any) -> dict[str, Any]:
    texts = [value] if isinstance(value, str) else _texts("system", value)
    return {"role": "system", "content": "".join(_BILLING.sub("", t, count=1) for t in texts)}


def _texts(path: str, value: Any, *others: str) -> list[str]:
    """The texts of a list of text blocks.

    Args:
        others: types of blocks that may be among them; see :func:`_text`.
    """
    if not isinstance(value, list):
        raise unfit(path, value, "a string or a list of blocks")
    kinds = one_of("text", *others, hint="; other blocks are not supported here")
    blocks = [mapping(f"{path}[{i}]", block) for i, block in enumerate(value)]
    for i, block in enumerate(blocks):
        kinds(f"{path}[{i}].type", block.get("type"))
    return [_text(f"{path}[{i}]", block) for i, block in enumerate(blocks)]


def _text(path: str, block: dict[str, Any]) -> str:
    """The text of a block: of a document, if it is one in plain text; of others, that they are
    left out."""
    kind = block["type"]
    if kind not in UNREADABLE:
        return string(f"{path}.text", block.get("text"))
    source = block.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return string(f"{path}.source.data", source.get("data"))
    return left_out(kind)


def _messages(path: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as one or several: each result of a tool is one."""
    role = one_of("user", "assistant", "system")(f"{path}.role", entry.get("role"))
    content, path = entry.get("content", ""), f"{path}.content"
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if role == "assistant":
        return [_assistant(path, content)]
    if role == "system":
        return [{"role": role, "content": "".join(_texts(path, content))}]
    if not isinstance(content, list):
        raise unfit(path, content, "a string or a list of blocks")
    messages: list[dict[str, Any]] = []
    kinds = one_of("text", *_LEFT_OUT, "tool_result", hint="; other blocks are not supported")
    for i, entry in enumerate(content):
        at = f"{path}[{i}]"
        block = mapping(at, entry)
        if kinds(f"{at}.type", block.get("type")) == "tool_result":
            messages.append(_tool_result(at, block))
            continue
        if not messages or messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": ""})
        messages[-1]["content"] += _text(at, block)
    return messages or [{"role": "user", "content": ""}]


def _tool_result(path: str, block: dict[str, Any]) -> dict[str, Any]:
    content = block.get("content", "")
    if not isinstance(content, str):
        content = "".join(_texts(f"{path}.content", content, *_LEFT_OUT))
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _assistant(path: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, list):
        raise unfit(path, content, "a string or a list of blocks")
    texts = {"text": "", "thinking": ""}
    calls = []
    known = ("text", "thinking", "redacted_thinking", "tool_use")
    for i, entry in enumerate(content):
        at = f"{path}[{i}]"
        block = mapping(at, entry)
        kind = one_of(*known, hint="; other blocks are not supported")(
            f"{at}.type", block.get("type")
        )
        if kind == "tool_use":
            name = filled_string(f"{at}.name", block.get("name"))
            function = {"name": name, "arguments": _input(f"{at}.input", block)}
            calls.append({"type": "function", "id": block.get("id"), "function": function})
        elif kind in texts:
            texts[kind] += string(f"{at}.{kind}", block.get(kind))
    message = {"role": "assistant", "content": texts["text"]}
    message |= {"reasoning_content": texts["thinking"]} if texts["thinking"] else {}
    return message | ({"tool_calls": calls} if calls else {})


def _input(path: str, block: dict[str, Any]) -> dict[str, Any]:
    """Checks a call's input, whose nulls are values."""
    value = block.get("input", {})
    mapping(path, value)
    return value


def _tool(path: str, value: Any) -> dict[str, Any]:
    tool = mapping(path, value)
    hint = ": the server itself runs no tools"
    one_of("custom", hint=hint)(f"{path}.type", tool.get("type", "custom"))
    function = {"name": filled_string(f"{path}.name", tool.get("name"))}
    if "description" in tool:
        function["description"] = tool["description"]
    if "input_schema" in tool:
        function["parameters"] = tool["input_schema"]
    if "strict" in tool:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = one_of("auto", "any", "tool", "none")("tool_choice.type", choice.get("type"))
    chat: dict[str, Any] = {"tool_choice": {"any": "required"}.get(kind, kind)}
    if kind == "tool":
        name = filled_string("tool_choice.name", choice.get("name"))
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    one = choice.get("disable_parallel_tool_use", False)
    chat["parallel_tool_calls"] = not boolean("tool_choice.disable_parallel_tool_use", one)
    return chat


def _thinking(options: Any, value: Any) -> dict[str, Any]:
    """Thinking as an option of the template; ``adaptive`` leaves it to the model."""
    kinds = one_of("enabled", "disabled", "adaptive")
    kind = kinds("thinking.type", mapping("thinking", value).get("type"))
    if kind == "adaptive":
        return {}
    options = mapping("chat_template_kwargs", options)
    return {"chat_template_kwargs": {"enable_thinking": kind == "enabled"} | options}
