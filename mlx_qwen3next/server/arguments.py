"""From the checked fields of a request to what the engine is asked: mlx-lm's own types."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
)

from ..decoding.sampling import Sampling
from .schema import DEFAULT_MODEL

# mlx_lm.server's defaults of the fields that have no flag.
_DEFAULTS: dict[str, Any] = {
    **{"xtc_probability": 0.0, "xtc_threshold": 0.1},
    **{"repetition_penalty": 0.0, "repetition_context_size": 20},
    **{"presence_penalty": 0.0, "presence_context_size": 20},
    **{"frequency_penalty": 0.0, "frequency_context_size": 20},
}


def completion_request(fields: dict[str, Any], *, is_chat: bool) -> CompletionRequest:
    """The prompt of a request, or its messages and tools.

    Args:
        fields: the result of :func:`mlx_qwen3next.server.schema.normalise`.
    """
    if not is_chat:
        return CompletionRequest("text", fields["prompt"], [], None, None)
    tools, roles = fields.get("tools") or None, fields.get("role_mapping")
    return CompletionRequest("chat", "", fields["messages"], tools, roles)


def generation_arguments(
    fields: dict[str, Any], flags: argparse.Namespace, adapter: str | None
) -> GenerationArguments:
    """The options of a request; the server's flags and mlx-lm's defaults fill the missing ones.

    Raises:
        ValueError: a flag has no usable value.
    """
    sampling = {"temp": flags.temp, "top_p": flags.top_p, "top_k": flags.top_k}
    sampling |= {"min_p": flags.min_p}
    if "temperature" in fields:
        sampling["temp"] = fields["temperature"]
    options = _DEFAULTS | sampling
    options |= {name: fields[name] for name in options if name in fields}
    bias = fields.get("logit_bias")
    options["logit_bias"] = bias and {int(token): x for token, x in bias.items()}
    Sampling(**options)
    options["temperature"] = options["temp"]
    max_tokens = fields.get("max_completion_tokens", fields.get("max_tokens", flags.max_tokens))

    def some(kind: Any) -> Any:
        return kind(**{name: options[name] for name in kind.__dataclass_fields__})

    model: Any = adapter
    return GenerationArguments(
        model=ModelDescription(DEFAULT_MODEL, DEFAULT_MODEL, model),
        sampling=some(SamplingArguments),
        logits=some(LogitsProcessorArguments),
        stop_words=fields.get("stop", []),
        max_tokens=max_tokens,
        num_draft_tokens=fields.get("num_draft_tokens", flags.num_draft_tokens),
        logprobs=fields.get("logprobs", False),
        top_logprobs=fields.get("top_logprobs", -1),
        seed=fields.get("seed"),
        chat_template_kwargs=fields.get("chat_template_kwargs"),
    )
