"""The parts of mlx_lm.generate that the batch relies on: names, parameters and attributes.

:func:`check` runs at the start of the server, so that a version of mlx-lm that has renamed
something is noticed before the first request.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from typing import Any

# Not "from mlx_lm import generate", which is the function of that name.
generate: Any = import_module("mlx_lm.generate")

# Name -> the parameters that the server passes or overrides, in mlx-lm's order.
_CALLS: dict[str, tuple[str, ...] | None] = {
    "BatchGenerator": (
        *("model", "completion_batch_size", "prefill_batch_size", "prefill_step_size"),
        "stream",
    ),
    "BatchGenerator.insert_segments": (
        *("segments", "max_tokens", "caches", "all_tokens", "samplers"),
        *("logits_processors", "stop_sequences"),
    ),
    "BatchGenerator.extract_cache": ("uids",),
    "BatchGenerator.remove": ("uids", "return_prompt_caches"),
    "BatchGenerator.prompt_cache_nbytes": None,
    "BatchGenerator._next": (),
    "BatchGenerator._make_batch": ("n",),
    "PromptProcessingBatch.Response": ("uid", "progress", "end_of_segment", "end_of_prompt"),
    "GenerationBatch": (
        *("model", "uids", "inputs", "prompt_cache", "tokens", "samplers", "fallback_sampler"),
        *("logits_processors", "stop_sequences", "max_tokens"),
    ),
    "GenerationBatch.extend": ("batch",),
    "GenerationBatch.Response": (
        *("uid", "token", "logprobs", "finish_reason", "prompt_cache", "all_tokens"),
    ),
    "StopSequences": ("stop_sequences",),
    "StopSequences.matcher": (),
    "StopSequences.Matcher.advance": ("token",),
}
_ATTRIBUTES = {
    "GenerationBatch": ("_next_tokens", "_next_logprobs", "_matchers"),
    "BatchGenerator": ("_unprocessed_sequences", "_currently_processing", "_generation_batch"),
}


def check() -> None:
    """Checks the installed version of mlx-lm.

    Raises:
        ValueError: the server does not work with this version; the message names the difference.
    """
    for name, wanted in _CALLS.items():
        _check_call(name, wanted)
    nothing: Any = None
    instances = {
        "GenerationBatch": generate.GenerationBatch.empty(nothing, nothing),
        "BatchGenerator": generate.BatchGenerator(nothing),
    }
    for name, attributes in _ATTRIBUTES.items():
        for attribute in attributes:
            if not hasattr(instances[name], attribute):
                raise _mismatch(f"mlx_lm.generate.{name} has no attribute {attribute}")


def _check_call(name: str, wanted: tuple[str, ...] | None) -> None:
    full = f"mlx_lm.generate.{name}"
    try:
        found = attrgetter(name)(generate)
    except AttributeError:
        raise _mismatch(f"{full} is missing") from None
    if wanted is None:
        return
    parameters = [p for p in inspect.signature(found).parameters if p != "self"]
    if missing := [p for p in wanted if p not in parameters]:
        raise _mismatch(f"{full} has no parameter {missing[0]}")
    if [p for p in parameters if p in wanted] != list(wanted):
        raise _mismatch(f"{full} takes its parameters in another order")


def _mismatch(what: str) -> ValueError:
    return ValueError(
        f"mlx-lm {version('mlx-lm')} is not the version this server was made for ({what}); "
        "install one that this package's requirements allow"
    )
