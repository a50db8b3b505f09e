"""The body of a request: parsed, its fields checked, its options taken.

A field of OpenAI's API that this server does not support is refused if it would change the form or
the content of the answer. Hints and unknown fields are ignored. ``_COMMON``, ``_CHAT`` and
``_TEXT`` list the supported fields.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from ...cli import given
from ...decoding.sampling import Sampling
from ...errors import first_line
from ..grammars.answer import Schema
from ..grammars.compiled import is_available
from .checks import (
    MAX_INTEGER,
    Check,
    RequestError,
    boolean,
    filled_string,
    integer,
    list_of,
    load_json,
    mapping,
    one_of,
    shown,
    string,
    unfit,
)
from .messages import message, tool

DEFAULT_MODEL = "default_model"  # mlx-lm's name for the model of the server
# Names of other models that clients use unless they are told another one.
ALIASES = ("default", "local-model", "gpt-*", "o3*", "o4*", "claude-*", "qwen*")

_MAX_TOP_LOGPROBS = 11  # mlx-lm's limit
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1000

# Options for the end of the prompt; they may be fields of the request as well.
_ENDING: dict[str, Check] = {"continue_final_message": boolean, "add_generation_prompt": boolean}
# Options beside the variables of the template.
_TEMPLATE_OPTIONS = _ENDING | {"chat_template": filled_string}
# Names that transformers passes to a template itself, or takes as options of its own.
_NOT_FOR_TEMPLATES = {"messages", "conversations"} | set(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


def parse(raw: bytes) -> dict[str, Any]:
    """Parses a body, which must be a JSON object.

    Raises:
        RequestError: the body is no JSON object, or is one only to Python's parser, which accepts
            more than JSON's definition.
    """
    try:
        body = load_json(raw.decode())
    except ValueError as error:
        raise RequestError(f"the body must be JSON in UTF-8: {first_line(error)}") from None
    if not isinstance(body, dict):
        raise unfit("the body", body, "a JSON object")
    return body


def normalise(
    body: dict[str, Any],
    *,
    chat: bool,
    names: Sequence[str],
    aliases: Sequence[str] = ALIASES,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Checks the fields of a request and brings them into one form.

    Args:
        body: the result of :func:`parse`.
        chat: whether the request completes the messages of a chat, or else a prompt.
        names, aliases: those of the model, for :func:`served_name`.
        adapter: the name of the adapter that a request may use.

    Returns:
        The supported fields, without the names of models.

    Raises:
        RequestError: a field is missing, has a wrong type or value, or is not supported.
    """
    body = mapping("the body", body)
    model = body.get("model", DEFAULT_MODEL)
    if not isinstance(model, str):
        raise unfit("model", model, "a name")
    served_name(model, names, aliases)
    one_of(DEFAULT_MODEL)("draft_model", body.get("draft_model", DEFAULT_MODEL))
    adapters = (DEFAULT_MODEL,) if adapter is None else (DEFAULT_MODEL, adapter)
    one_of(*adapters)("adapters", body.get("adapters", DEFAULT_MODEL))

    required = "messages" if chat else "prompt"
    if required not in body:
        raise RequestError(f"{required} is missing: a request must have it", required)
    checks = _CHAT if chat else _TEXT
    fields = {name: check(name, body[name]) for name, check in checks.items() if name in body}
    fields = {name: value for name, value in fields.items() if value is not None}

    if (choice := fields.get("tool_choice")) == "none":
        fields.pop("tools", None)
    elif choice not in (None, "auto"):
        _check_forced(choice, fields.get("tools", []))
    if ending := {name: fields.pop(name) for name in _ENDING if name in fields}:
        fields["chat_template_kwargs"] = fields.get("chat_template_kwargs", {}) | ending
    # In OpenAI's completions `logprobs` itself is the number.
    if type(count := fields.get("logprobs")) is int:
        fields |= {"logprobs": True, "top_logprobs": count}
    elif fields.get("top_logprobs"):
        fields["logprobs"] = True
    return fields


def served_name(model: str, names: Sequence[str], aliases: Sequence[str] = ALIASES) -> str:
    """Returns the name under which the server has the model that a client asks for.

    Args:
        model: one of ``names``, or mlx-lm's name for a server's model or a name that an alias fits,
            which stand for the first of them.
        names: the names of the model.
        aliases: names in lower case, in which ``*`` stands for any characters.

    Raises:
        RequestError: it is another name.
    """
    if model in names:
        return model
    if model == DEFAULT_MODEL or any(fnmatchcase(model.lower(), alias) for alias in aliases):
        return names[0]
    message = f"the model {shown(model)} is not served here; use {' or '.join(names)}"
    raise RequestError(message, "model", status=404, code="model_not_found")


def token_limit(path: str, value: Any) -> int:
    """Checks the most tokens of an answer."""
    if type(value) is not int or (value < 1 and value != -1):
        raise unfit(path, value, "an integer of at least 1, or -1 for no limit")
    return MAX_INTEGER if value == -1 else min(value, MAX_INTEGER)


def _seed(path: str, value: Any) -> int:
    return integer(-(2**63), 2**64 - 1)(path, value) % 2**64


def _temperature(path: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 2:
        raise unfit(path, value, "a number from 0 to 2")
    return float(value)


def _sampling(path: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise unfit(path, value, "a number")
    try:
        Sampling(**{path: value})
    except ValueError as error:
        raise RequestError(first_line(error), path) from None
    # mlx-lm accepts no integer in place of a float.
    return integer(0)(path, value) if type(getattr(Sampling, path)) is int else float(value)


def _top_k(path: str, value: Any) -> float:
    off = type(value) is int and value == -1  # as other servers write it
    return 0 if off else _sampling(path, value)


def _logit_bias(path: str, value: Any) -> dict[str, float]:
    bias = mapping(path, value)
    for token, x in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise unfit(path, token, "an object whose keys are token ids")
        integer(0)(f"{path}'s token id", int(token))
        if type(x) not in (int, float) or not abs(x) <= 100:
            raise unfit(f"{path}.{token}", x, "a number from -100 to 100")
    return bias


def stop_words(path: str, value: Any) -> list[str]:
    """Checks one text or several that end an answer."""
    stops = list_of(string)(path, [value] if isinstance(value, str) else value)
    stops = [stop for stop in stops if stop]
    if len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_LENGTH for stop in stops):
        expected = f"at most {_MAX_STOPS} strings of at most {_MAX_STOP_LENGTH} characters"
        raise unfit(path, value, expected)
    return stops


def _stream_options(path: str, value: Any) -> dict[str, bool]:
    given = mapping(path, value)
    names = ("include_usage", "continuous_usage_stats")
    return {name: boolean(f"{path}.{name}", given.get(name, False)) for name in names}


def _text_logprobs(path: str, value: Any) -> bool | int:
    return value if isinstance(value, bool) else integer(0, _MAX_TOP_LOGPROBS)(path, value)


def _prompt(path: str, value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    tokens = value if isinstance(value, list) else []
    if not value or not (
        isinstance(value, str)
        or (tokens and all(type(x) is int and 0 <= x <= MAX_INTEGER for x in tokens))
    ):
        raise unfit(path, value, "one text or one list of token ids, and not empty")
    return value


def _unsupported(path: str, value: Any) -> NoReturn:
    raise RequestError(f"{path} is not supported; leave it out", path)


def _role_mapping(path: str, value: Any) -> dict[str, str]:
    return {key: string(f"{path}.{key}", text) for key, text in mapping(path, value).items()}


def _template_options(path: str, value: Any) -> dict[str, Any]:
    options = mapping(path, value)
    for name, check in _TEMPLATE_OPTIONS.items():
        if name in options:
            check(f"{path}.{name}", options[name])
    if taken := sorted(options.keys() & _NOT_FOR_TEMPLATES - _TEMPLATE_OPTIONS.keys()):
        raise RequestError(
            f"{path} must not hold {taken[0]}: it is no variable of the template", path
        )
    return options


def answer_format(path: str, value: Any, within: str | None = None) -> Schema | None:
    """Checks the format that an answer is to have.

    Args:
        within: the name of the object that holds the schema, if it is not the format itself.

    Returns:
        The schema that the answer has to fit; None for any text.
    """
    if value is None or isinstance(value, Schema):  # a protocol's own field, checked there
        return value
    form = mapping(path, value)
    kind = one_of("text", "json_object", "json_schema")(f"{path}.type", form.get("type"))
    if kind == "text":
        return None
    if not is_available():
        message = (
            f"{path} needs llguidance, which the server does not have: pip install "
            "'mlx-qwen3next[server]' adds it"
        )
        raise RequestError(message, path)
    if kind == "json_object":
        return Schema(path, path, {"type": "object"})
    if within is not None:
        path = f"{path}.{within}"
        form = mapping(path, form.get(within))
    mapping(f"{path}.schema", form.get("schema"))
    is_strict = boolean(f"{path}.strict", form.get("strict", True))
    return Schema(f"{path}.schema", f"{path}.schema", form["schema"], is_strict)


def _response_format(path: str, value: Any) -> Schema | None:
    return answer_format(path, value, within="json_schema")


def _tool_choice(path: str, value: Any) -> str | dict[str, Any]:
    if not isinstance(value, dict):
        hint = ", or an object that names a function"
        return one_of("auto", "none", "required", hint=hint)(path, value)
    one_of("function")(f"{path}.type", value.get("type"))
    function = mapping(f"{path}.function", value.get("function"))
    name = filled_string(f"{path}.function.name", function.get("name"))
    return {"type": "function", "function": {"name": name}}


def _check_forced(choice: str | dict[str, Any], tools: list[dict[str, Any]]) -> None:
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise RequestError("tool_choice forces a call, but the request has no tools", "tool_choice")
    if isinstance(choice, dict) and choice["function"]["name"] not in names:
        raise unfit("tool_choice", choice["function"]["name"], f"one of {', '.join(names)}")


_ONE_CHOICE = one_of(1, hint=": a request has one choice")

_COMMON: dict[str, Check] = {
    "stream": boolean,
    "stream_options": _stream_options,
    "max_tokens": token_limit,
    "max_completion_tokens": token_limit,
    "num_draft_tokens": integer(0),
    "seed": _seed,
    "stop": stop_words,
    "logit_bias": _logit_bias,
    "logprobs": boolean,
    "top_logprobs": integer(0, _MAX_TOP_LOGPROBS),
    "temperature": _temperature,
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
    "messages": list_of(message, least=1),
    "tools": list_of(tool),
    "tool_choice": _tool_choice,
    "parallel_tool_calls": boolean,
    "functions": one_of([], hint="; use tools"),
    "function_call": one_of("auto", "none", hint="; use tool_choice"),
    "modalities": one_of(["text"], hint=": the model generates only text"),
    "audio": _unsupported,
    "response_format": _response_format,
    "chat_template_kwargs": _template_options,
    "role_mapping": _role_mapping,
    **_ENDING,
}
_TEXT = _COMMON | {
    "prompt": _prompt,
    "logprobs": _text_logprobs,
    "echo": one_of(False, hint=": the server does not return the prompt"),
    "suffix": one_of("", hint=": the server does not insert text"),
}


# --- the options ---------------------------------------------------------------------------------
# The fields of a request that are options of sampling, and those of them that have a flag.
_SAMPLING_FIELDS = Sampling.__dataclass_fields__.keys() - {
    "temp",
    "logit_bias",
    "xtc_special_tokens",
}
SAMPLING_FLAGS = ("temp", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Options:
    """The options of a request.

    Args:
        sampling: the rules by which its tokens are drawn.
        max_tokens: the most tokens of the answer.
        stop_words: texts that end the answer.
        logprobs: whether log-probabilities are wanted.
        top_logprobs: of how many most probable tokens they are wanted as well.
        seed: of the random numbers; None for any.
        template_options: variables and options of the chat template.
        grammar: of the answer, once the prompt is rendered; None for any text.
    """

    sampling: Sampling
    max_tokens: int
    stop_words: list[str] = field(default_factory=list)
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    grammar: str | None = None


def options_of(fields: dict[str, Any], flags: argparse.Namespace) -> Options:
    """Takes the options of a request; the server's flags and mlx-lm's defaults fill missing ones.

    Raises:
        ValueError: a flag has no usable value.
    """
    sampling = given(flags, SAMPLING_FLAGS)
    sampling |= {name: value for name, value in fields.items() if name in _SAMPLING_FIELDS}
    if "temperature" in fields:
        sampling["temp"] = fields["temperature"]
    if bias := fields.get("logit_bias"):
        sampling["logit_bias"] = {int(token): x for token, x in bias.items()}
    template_options = flags.chat_template_args | fields.get("chat_template_kwargs", {})
    return Options(
        Sampling(**sampling),
        fields.get("max_completion_tokens", fields.get("max_tokens", flags.max_tokens)),
        fields.get("stop", []),
        fields.get("logprobs", False),
        fields.get("top_logprobs", 0),
        fields.get("seed"),
        template_options,
    )
