"""The options of a request, from its checked fields and the flags of the server."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from ...cli import given
from ...decoding.sampling import Sampling

# The fields of a request that are options of sampling, and those of them that have a flag.
_SAMPLING = Sampling.__dataclass_fields__.keys() - {"temp", "logit_bias", "xtc_special_tokens"}
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
    sampling |= {name: value for name, value in fields.items() if name in _SAMPLING}
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
