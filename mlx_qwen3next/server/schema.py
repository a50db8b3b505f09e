"""Checks the body of a request and brings it into the form that mlx-lm's handler reads.

A field of OpenAI's API that this server does not support is refused if it would change the form or
the content of the answer. Hints and unknown fields are ignored. ``_COMMON``, ``_CHAT`` and
``_TEXT`` list the supported fields.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from ..decoding.sampling import Sampling
from ..errors import first_line

# Maps the path of a field ("messages[0].role") and its value to the value for mlx-lm.
Check = Callable[[str, Any], Any]

DEFAULT_MODEL = "default_model"  # mlx-lm's name for the model of the server

_MAX_DEPTH = 100  # of nested lists and objects; chat templates recurse into them
_MAX_INTEGER = 2**31 - 1  # the largest index in MLX
_MAX_TOP_LOGPROBS = 11  # mlx-lm's limit
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1000

# Names that transformers passes to a template itself, or takes as options of its own.
_NOT_FOR_TEMPLATES = {"messages", "conversations"} | set(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


class RequestError(Exception):
    """An error that answers a request.

    Args:
        message: names the fault, the value that came and the remedy.
        param: the path of the field at fault.
        status: the HTTP status.
        code: OpenAI's code of the error, if there is one.
        headers: headers of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def parse(raw: bytes) -> dict[str, Any]:
    """Parses a body, which must be a JSON object.

    Raises:
        RequestError: the body is no JSON object, or is one only to Python's parser, which accepts
            more than JSON's definition.
    """
    try:
        body = _load(raw.decode())
    except ValueError as error:
        raise RequestError(f"the body must be JSON in UTF-8: {first_line(error)}") from None
    if not isinstance(body, dict):
        raise _unfit("the body", body, "a JSON object")
    return body


def normalise(
    body: dict[str, Any], *, chat: bool, names: Sequence[str], adapter: str | None = None
) -> dict[str, Any]:
    """Checks a request and returns the fields for mlx-lm's handler.

    Args:
        body: the result of :func:`parse`.
        chat: whether the request completes the messages of a chat, or else a prompt.
        names: the names of the model that a request may use, besides ``default_model``.
        adapter: the name of the adapter that a request may use.

    Returns:
        The supported fields. The model is left out, so that mlx-lm's handler uses the default.

    Raises:
        RequestError: a field is missing, has a wrong type or value, or is not supported.
    """
    body = _object("the body", body)
    model = body.get("model", DEFAULT_MODEL)
    if not isinstance(model, str):
        raise _unfit("model", model, "a name")
    if model not in (DEFAULT_MODEL, *names):
        raise unknown_model(model, names)
    _one_of(DEFAULT_MODEL)("draft_model", body.get("draft_model", DEFAULT_MODEL))
    adapters = (DEFAULT_MODEL,) if adapter is None else (DEFAULT_MODEL, adapter)
    _one_of(*adapters)("adapters", body.get("adapters", DEFAULT_MODEL))

    required = "messages" if chat else "prompt"
    if required not in body:
        raise RequestError(f"{required} is missing: a request must have it", required)
    checks = _CHAT if chat else _TEXT
    fields = {name: check(name, body[name]) for name, check in checks.items() if name in body}

    if fields.get("tool_choice") == "none":
        fields.pop("tools", None)
    # In OpenAI's completions `logprobs` itself is the number.
    if type(count := fields.get("logprobs")) is int:
        fields |= {"logprobs": True, "top_logprobs": count}
    elif fields.get("top_logprobs"):
        fields["logprobs"] = True
    return fields


def unknown_model(model: str, names: Sequence[str]) -> RequestError:
    """Makes the error that answers a request for a model other than ``names``."""
    message = f"the model {_show(model)} is not served here; use {' or '.join(names)}"
    return RequestError(message, "model", status=404, code="model_not_found")


def _load(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: the text is no JSON, cannot be encoded in UTF-8, or is nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inside for y in x if isinstance(y, (dict, list))]
    if level:
        raise ValueError(f"it is nested too deeply, beyond {_MAX_DEPTH} levels")
    json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for half a surrogate pair
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _unfit(path: str, value: Any, expected: str) -> RequestError:
    return RequestError(f"{path} must be {expected}, got {_show(value)}", path)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _integer(least: int, most: int = _MAX_INTEGER) -> Check:
    def check(path: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _unfit(path, value, f"an integer from {least} to {most}")
        return value

    return check


def _limit(path: str, value: Any) -> int:
    if type(value) is int and value == -1:
        return _MAX_INTEGER
    if type(value) is not int or not 1 <= value <= _MAX_INTEGER:
        raise _unfit(path, value, f"an integer from 1 to {_MAX_INTEGER}, or -1 for no limit")
    return value


def _seed(path: str, value: Any) -> int:
    return _integer(-(2**63), 2**64 - 1)(path, value) % 2**64


def _one_of(*allowed: Any, hint: str = "") -> Check:
    """Makes a check for one of these values; a value of another type, as True for 1, fails."""

    def check(path: str, value: Any) -> Any:
        if not any(type(value) is type(x) and value == x for x in allowed):
            raise _unfit(path, value, " or ".join(map(json.dumps, allowed)) + hint)
        return value

    return check


def _boolean(path: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _unfit(path, value, "true or false")
    return value


def _text(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _unfit(path, value, "a string")
    return value


def _name(path: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _unfit(path, value, "a string that is not empty")
    return value


def _object(path: str, value: Any) -> dict[str, Any]:
    """Checks an object and drops its nulls, which mean the same as missing fields."""
    if not isinstance(value, dict):
        raise _unfit(path, value, "an object")
    return {key: entry for key, entry in value.items() if entry is not None}


def _list(check: Check, least: int = 0) -> Check:
    def check_all(path: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise _unfit(path, value, "a list that is not empty" if least else "a list")
        return [check(f"{path}[{i}]", entry) for i, entry in enumerate(value)]

    return check_all


def _sampling(path: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise _unfit(path, value, "a number")
    name = "temp" if path == "temperature" else path
    try:
        Sampling(**{name: value})
    except ValueError as error:
        raise RequestError(str(error).replace(name, path, 1), path) from None
    # mlx-lm accepts no integer in place of a float.
    return _integer(0)(path, value) if type(getattr(Sampling, name)) is int else float(value)


def _top_k(path: str, value: Any) -> float:
    off = type(value) is int and value == -1  # as other servers write it
    return 0 if off else _sampling(path, value)


def _logit_bias(path: str, value: Any) -> dict[str, float]:
    bias = _object(path, value)
    for token, x in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise _unfit(path, token, "an object whose keys are token ids")
        _integer(0)(f"{path}'s token id", int(token))
        if type(x) not in (int, float) or not abs(x) <= 100:
            raise _unfit(f"{path}.{token}", x, "a number from -100 to 100")
    return bias


def _stop(path: str, value: Any) -> list[str]:
    stops = _list(_text)(path, [value] if isinstance(value, str) else value)
    stops = [stop for stop in stops if stop]
    if len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_LENGTH for stop in stops):
        expected = f"at most {_MAX_STOPS} strings of at most {_MAX_STOP_LENGTH} characters"
        raise _unfit(path, value, expected)
    return stops


def _stream_options(path: str, value: Any) -> dict[str, bool]:
    usage = _object(path, value).get("include_usage", False)
    return {"include_usage": _boolean(f"{path}.include_usage", usage)}


def _text_logprobs(path: str, value: Any) -> bool | int:
    return value if isinstance(value, bool) else _integer(0, _MAX_TOP_LOGPROBS)(path, value)


def _prompt(path: str, value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    tokens = value if isinstance(value, list) else []
    if not value or not (
        isinstance(value, str)
        or (tokens and all(type(x) is int and 0 <= x <= _MAX_INTEGER for x in tokens))
    ):
        raise _unfit(path, value, "one text or one list of token ids, and not empty")
    return value


def _message(path: str, value: Any) -> dict[str, Any]:
    message = _object(path, value)
    roles = _one_of("system", "developer", "user", "assistant", "tool")
    role = roles(f"{path}.role", message.get("role"))
    message["role"] = "system" if role == "developer" else role
    missing = "" if role == "assistant" else None
    message["content"] = _content(f"{path}.content", message.get("content", missing))
    if "tool_calls" in message:
        message["tool_calls"] = _list(_tool_call)(f"{path}.tool_calls", message["tool_calls"])
    return message


def _content(path: str, value: Any) -> str:
    if isinstance(value, list):
        return "".join(_list(_part)(path, value))
    if not isinstance(value, str):
        raise _unfit(path, value, "a string or a list of parts of type 'text'")
    return value


def _part(path: str, value: Any) -> str:
    part = _object(path, value)
    kinds = _one_of("text", "input_text", "refusal", hint="; other types are not supported")
    kind = kinds(f"{path}.type", part.get("type"))
    name = "refusal" if kind == "refusal" else "text"
    return _text(f"{path}.{name}", part.get(name))


def _tool_call(path: str, value: Any) -> dict[str, Any]:
    call = _object(path, value)
    path = f"{path}.function"
    function = _object(path, call.get("function"))
    _name(f"{path}.name", function.get("name"))
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = _load(arguments)
        except ValueError:
            raise _unfit(f"{path}.arguments", arguments, "the JSON text of an object") from None
    if not isinstance(arguments, dict):
        raise _unfit(f"{path}.arguments", arguments, "the JSON text of an object")
    return call | {"function": function | {"arguments": arguments}}


def _tool(path: str, value: Any) -> dict[str, Any]:
    tool = _object(path, value)
    _one_of("function")(f"{path}.type", tool.get("type"))
    path = f"{path}.function"
    function = _described(path, tool.get("function"))
    _name(f"{path}.name", function.get("name"))
    if "parameters" in function:
        path = f"{path}.parameters"
        function["parameters"] = parameters = _object(path, function["parameters"])
        if "properties" in parameters:
            path = f"{path}.properties"
            parameters["properties"] = {
                name: _described(f"{path}.{name}", schema)
                for name, schema in _object(path, parameters["properties"]).items()
            }
    return tool | {"function": function}


def _described(path: str, value: Any) -> dict[str, Any]:
    """Checks an object, whose description must be a string because templates concatenate it."""
    described = _object(path, value)
    _text(f"{path}.description", described.get("description", ""))
    return described


def _unsupported(path: str, value: Any) -> NoReturn:
    raise RequestError(f"{path} is not supported; leave it out", path)


def _role_mapping(path: str, value: Any) -> dict[str, str]:
    return {key: _text(f"{path}.{key}", text) for key, text in _object(path, value).items()}


def _template_options(path: str, value: Any) -> dict[str, Any]:
    options = _object(path, value)
    if taken := sorted(options.keys() & _NOT_FOR_TEMPLATES):
        raise RequestError(
            f"{path} must not hold {taken[0]}: it is no variable of the template", path
        )
    return options


_ONE_CHOICE = _one_of(1, hint=": a request has one choice")
_NO_TOOL_FORCED = _one_of("auto", "none", hint=": the server cannot force a call")

_COMMON: dict[str, Check] = {
    "stream": _boolean,
    "stream_options": _stream_options,
    "max_tokens": _limit,
    "max_completion_tokens": _limit,
    "num_draft_tokens": _integer(0),
    "seed": _seed,
    "stop": _stop,
    "logit_bias": _logit_bias,
    "logprobs": _boolean,
    "top_logprobs": _integer(0, _MAX_TOP_LOGPROBS),
    "temperature": _sampling,
    "top_p": _sampling,
    "top_k": _top_k,
    "min_p": _sampling,
    "xtc_probability": _sampling,
    "xtc_threshold": _sampling,
    "repetition_penalty": _sampling,
    "repetition_context_size": _sampling,
    "presence_penalty": _sampling,
    "presence_context_size": _sampling,
    "frequency_penalty": _sampling,
    "frequency_context_size": _sampling,
    "n": _ONE_CHOICE,
    "best_of": _ONE_CHOICE,
}
_CHAT = _COMMON | {
    "messages": _list(_message, least=1),
    "tools": _list(_tool),
    "tool_choice": _NO_TOOL_FORCED,
    "functions": _one_of([], hint="; use tools"),
    "function_call": _NO_TOOL_FORCED,
    "modalities": _one_of(["text"], hint=": the model generates only text"),
    "audio": _unsupported,
    "prediction": _unsupported,
    "web_search_options": _unsupported,
    "response_format": _one_of({"type": "text"}, hint=": the server cannot enforce other formats"),
    "chat_template_kwargs": _template_options,
    "role_mapping": _role_mapping,
}
_TEXT = _COMMON | {
    "prompt": _prompt,
    "logprobs": _text_logprobs,
    "echo": _one_of(False, hint=": the server does not return the prompt"),
    "suffix": _one_of("", hint=": the server does not insert text"),
}
