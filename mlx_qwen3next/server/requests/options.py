"""From the checked fields of a request to what the engine is asked: a prompt and its arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from ...cli import given
from ...decoding.sampling import Sampling
from ..grammars.answer import Schema, Wanted

# The fields of a request that are options of sampling, and those of them that have a flag.
_SAMPLING = Sampling.__dataclass_fields__.keys() - {"temp", "logit_bias", "xtc_special_tokens"}
SAMPLING_FLAGS = ("temp", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Chat:
    """The messages to answer.

    Args:
        messages: each with a ``role`` and a ``content``.
        tools: the functions that the answer may call.
        role_mapping: what stands before the messages of each role, for a model without a template.
        forced: the name of the tool that the answer must call, "" for any, None for none.
        json: the schema that the answer must fit if it is no call; None for any text.
        one_call: whether it has one call at most.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    role_mapping: dict[str, str] | None = None
    forced: str | None = None
    json: Schema | None = None
    one_call: bool = False

    @property
    def wanted(self) -> Wanted:
        """The answers that are wanted."""
        return Wanted(self.json, self.tools or (), self.forced, self.one_call)


Prompt = str | list[int] | Chat  # a text or its token ids to continue, or messages to answer


@dataclass(frozen=True)
class Arguments:
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


def prompt_of(fields: dict[str, Any], *, is_chat: bool) -> Prompt:
    """Takes the prompt of a request, or its messages and tools.

    Args:
        fields: the result of :func:`mlx_qwen3next.server.requests.fields.normalise`.
    """
    if not is_chat:
        return fields["prompt"]
    tools, choice = fields.get("tools") or None, fields.get("tool_choice", "auto")
    forced = None
    if isinstance(choice, dict):
        forced = choice["function"]["name"]
    elif choice == "required":
        forced = tools[0]["function"]["name"] if tools and len(tools) == 1 else ""
    roles, one_call = fields.get("role_mapping"), not fields.get("parallel_tool_calls", True)
    answer = fields.get("response_format")
    return Chat(fields["messages"], tools, roles, forced, answer, one_call)


def arguments_of(fields: dict[str, Any], flags: argparse.Namespace) -> Arguments:
    """Takes the options of a request; the server's flags and mlx-lm's defaults fill missing ones.

    Raises:
        ValueError: a flag has no usable value.
    """
    options = given(flags, SAMPLING_FLAGS)
    options |= {name: value for name, value in fields.items() if name in _SAMPLING}
    if "temperature" in fields:
        options["temp"] = fields["temperature"]
    if bias := fields.get("logit_bias"):
        options["logit_bias"] = {int(token): x for token, x in bias.items()}
    template_options = flags.chat_template_args | fields.get("chat_template_kwargs", {})
    return Arguments(
        Sampling(**options),
        fields.get("max_completion_tokens", fields.get("max_tokens", flags.max_tokens)),
        fields.get("stop", []),
        fields.get("logprobs", False),
        fields.get("top_logprobs", 0),
        fields.get("seed"),
        template_options,
    )
