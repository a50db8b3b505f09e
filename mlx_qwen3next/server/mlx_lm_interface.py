"""The parts of mlx-lm's inside that the server relies on: names, parameters and attributes.

mlx_lm.server has no interface for plugins. :func:`check` runs at the start of the server, so that
a version of mlx-lm that has renamed something is noticed before the first request.
"""

from __future__ import annotations

import argparse
import inspect
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any, NoReturn

from mlx_lm import server as stock

# Module -> name -> the parameters that the server passes or overrides, in mlx-lm's order.
_CALLS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "generate": {
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
        "PromptProcessingBatch.filter": ("keep",),
        "PromptProcessingBatch.extract_cache": ("idx",),
        "PromptProcessingBatch.Response": ("uid", "progress", "end_of_segment", "end_of_prompt"),
        "GenerationBatch": (
            *("model", "uids", "inputs", "prompt_cache", "tokens", "samplers", "fallback_sampler"),
            *("logits_processors", "stop_sequences", "max_tokens"),
        ),
        "GenerationBatch.extend": ("batch",),
        "GenerationBatch.Response": (
            *("uid", "token", "logprobs", "finish_reason", "prompt_cache", "all_tokens"),
        ),
        "StopSequences.matcher": (),
        "maybe_quantize_kv_cache": (
            *("prompt_cache", "quantized_kv_start", "kv_group_size", "kv_bits"),
        ),
    },
    "server": {
        "main": (),
        "CompletionRequest": ("request_type", "prompt", "messages", "tools", "role_mapping"),
        "GenerationContext": (
            *("has_tool_calling", "has_thinking", "tool_parser", "text_sm", "initial_state"),
            *("prompt", "prompt_cache_count", "_should_stop"),
        ),
        "ModelProvider": ("cli_args",),
        "ModelProvider._load": ("model_path", "adapter_path", "draft_model_path"),
        "ModelProvider.load_default": (),
        "Response": ("text", "token", "logprob", "finish_reason", "top_tokens"),
        "ResponseGenerator": ("model_provider", "prompt_cache"),
        "ResponseGenerator._generate": (),
        "ResponseGenerator._run_generate": (),
        "ResponseGenerator._make_state_machine": ("model_key", "tokenizer", "stop_words"),
        "ResponseGenerator._await_response": ("response_queue",),
        "convert_chat": ("messages", "role_mapping"),
        "_format_top_logprobs": ("logprobs", "top_n", "tokenizer"),
    },
}
_ATTRIBUTES = {
    "PromptProcessingBatch": (
        *("uids", "tokens", "samplers", "logits_processors", "stop_sequences", "max_tokens"),
    ),
    "GenerationBatch": (
        *("uids", "tokens", "samplers", "logits_processors", "stop_sequences", "max_tokens"),
        *("_next_tokens", "_next_logprobs", "_num_tokens", "_matchers"),
    ),
    "BatchGenerator": (
        *("_unprocessed_sequences", "_currently_processing", "_prompt_batch"),
        "_generation_batch",
    ),
}


def check() -> None:
    """Checks the installed version of mlx-lm.

    Raises:
        ValueError: the server does not work with this version; the message names the difference.
    """
    for module, calls in _CALLS.items():
        for name, wanted in calls.items():
            _check_call(f"mlx_lm.{module}", name, wanted)
    generate = import_module("mlx_lm.generate")
    nothing: Any = None
    instances = {
        "PromptProcessingBatch": generate.PromptProcessingBatch.empty(nothing, nothing),
        "GenerationBatch": generate.GenerationBatch.empty(nothing, nothing),
        "BatchGenerator": generate.BatchGenerator(nothing),
    }
    for name, attributes in _ATTRIBUTES.items():
        for attribute in attributes:
            if not hasattr(instances[name], attribute):
                raise _mismatch(f"mlx_lm.generate.{name} has no attribute {attribute}")


def _check_call(module: str, name: str, wanted: tuple[str, ...] | None) -> None:
    try:
        found = attrgetter(name)(import_module(module))
    except AttributeError:
        raise _mismatch(f"{module}.{name} is missing") from None
    if wanted is None:
        return
    parameters = [p for p in inspect.signature(found).parameters if p != "self"]
    if missing := [p for p in wanted if p not in parameters]:
        raise _mismatch(f"{module}.{name} has no parameter {missing[0]}")
    if [p for p in parameters if p in wanted] != list(wanted):
        raise _mismatch(f"{module}.{name} takes its parameters in another order")


def _mismatch(what: str) -> ValueError:
    return ValueError(
        f"mlx-lm {version('mlx-lm')} is not the version this server was made for ({what}); "
        "install one that this package's requirements allow"
    )


class _Parsed(Exception):
    """Carries mlx_lm.server's parser out of its main()."""


class _StockParser(argparse.ArgumentParser):
    """A parser that raises itself when it is asked to parse."""

    def parse_args(self, *_: Any) -> NoReturn:  # type: ignore[override]
        raise _Parsed(self)


def stock_parser() -> argparse.ArgumentParser:
    """Returns mlx_lm.server's parser.

    Only mlx_lm.server's main() makes it, so a copy of that function runs up to the parsing.

    Raises:
        ValueError: main() does not parse arguments.
    """
    names = {**vars(stock), "argparse": SimpleNamespace(ArgumentParser=_StockParser)}
    try:
        FunctionType(stock.main.__code__, names)()
    except _Parsed as parsed:
        return parsed.args[0]
    raise ValueError("mlx_lm.server's main() parses no arguments")
