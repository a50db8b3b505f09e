"""From a prompt to tokens and text: ``generate_step``, ``stream_generate``, ``generate``.

The plain path is mlx-lm's own loop (chunked prefill, step n + 1 queued while n runs); this module
checks what comes in and gives the results their form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, wired_limit
from mlx_lm.generate import GenerationResponse as MLXGenerationResponse
from mlx_lm.generate import generate_step as mlx_generate_step
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import Cache, settle, tokens_held
from .model import Model
from .sampling import Sampling

MAX_DEPTH = 8  # drafts a round, at most

Depth = Literal["auto", "off"] | int


@dataclass
class Token:
    """One generated token."""

    token: int
    logprobs: mx.array  # [vocab]
    from_draft: bool


@dataclass
class GenerationResponse(MLXGenerationResponse):
    """mlx-lm's response, plus what speculation did: its rounds, and tokens a round on average."""

    rounds: int = 0
    mean_accept_length: float = 0.0


def generate_step(
    prompt: mx.array | Sequence[int],
    model: Model,
    *,
    max_tokens: int = 256,
    mtp: Depth = "auto",
    prompt_cache: Cache | None = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    sampler: Sampler | None = None,
    logits_processors: Iterable[LogitsProcessor] | None = None,
    **sampling: Any,
) -> Iterator[Token]:
    """Generates tokens after a prompt; needs no tokenizer and stops at no token.

    Args:
        prompt: token ids ``[L]``, not empty.
        max_tokens: how many to generate, -1 for as many as the context takes. Generation ends at
            the model's max_position_embeddings in any case.
        mtp: how deep the MTP head drafts: "auto", "off" or 1…8.
        prompt_cache: what ``model.make_cache()`` made, with the tokens before the prompt; advanced
            in place.
        prefill_step_size: prompt tokens processed at a time.
        kv_bits, kv_group_size, quantized_kv_start: quantize keys and values from that position on.
        prompt_progress_callback: called with (processed, total) prompt tokens.
        sampler, logits_processors: mlx-lm callables, instead of the options below.
        sampling: the options of :class:`mlx_qwen3next.sampling.Sampling` (``temp``, ``top_p``, …).

    Raises:
        ValueError: an argument is out of range; raised at the call, before any work.
    """
    prompt = _check_prompt(prompt, model)
    check_depth(mtp, model)
    if prefill_step_size < 1:
        raise ValueError(f"prefill_step_size must be at least 1, got {prefill_step_size}")
    cache = model.make_cache() if prompt_cache is None else _check_cache(prompt_cache, model)
    budget = _budget(model, tokens_held(cache) + prompt.size, max_tokens)
    try:
        options = Sampling(**sampling)
    except TypeError as error:
        raise ValueError(f"unknown option: {error}") from None
    steps = mlx_generate_step(
        prompt,
        model,
        max_tokens=budget,
        sampler=sampler or options.sampler(),
        logits_processors=[*(logits_processors or ()), *options.logits_processors()],
        prompt_cache=cache,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        prompt_progress_callback=prompt_progress_callback,
    )
    # mlx-lm's annotation says array; it yields ints.
    return (Token(int(token), logprobs, False) for token, logprobs in steps)


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = 256,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generates text after a prompt, a response a token; ends at the tokenizer's stop tokens.

    Args:
        tokenizer: what :func:`mlx_qwen3next.load` gave, or a transformers tokenizer.
        prompt: text or token ids.
        options: those of :func:`generate_step`.

    Raises:
        ValueError: as for :func:`generate_step`, at the call.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        special = bos is None or not prompt.startswith(bos)
        tokens = _check_prompt(tokenizer.encode(prompt, add_special_tokens=special), model)
    else:
        tokens = _check_prompt(prompt, model)
    held = tokens_held(options.get("prompt_cache") or [])
    budget = _budget(model, held + tokens.size, max_tokens)
    steps = generate_step(tokens, model, max_tokens=budget, **options)
    return _stream(model, tokenizer, tokens.size, budget, steps)


def _stream(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    budget: int,
    steps: Iterator[Token],
) -> Iterator[GenerationResponse]:
    detokenizer = tokenizer.detokenizer
    prompt_seconds, start = 0.0, time.perf_counter()
    with wired_limit(model):
        for count, step in enumerate(steps, start=1):
            if count == 1:
                now = time.perf_counter()
                prompt_seconds, start = now - start, now
            finish_reason = None
            if step.token in tokenizer.eos_token_ids:
                finish_reason = "stop"
            else:
                detokenizer.add_token(step.token)
                if count == budget:
                    finish_reason = "length"
            if finish_reason:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_tokens / prompt_seconds,
                generation_tokens=count,
                generation_tps=count / max(time.perf_counter() - start, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason:
                return


def generate(
    model: Model,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    verbose: bool = False,
    **options: Any,
) -> str:
    """Generates a whole answer. ``verbose`` prints it as it comes, with statistics after it.

    Args:
        options: those of :func:`stream_generate`.

    Raises:
        ValueError: as for :func:`generate_step`.
    """
    text, last = "", None
    responses = stream_generate(model, tokenizer, prompt, **options)
    if verbose:
        print("=" * 10)
    try:
        for last in responses:
            text += last.text
            if verbose:
                print(last.text, end="", flush=True)
    finally:
        if verbose:
            print("\n" + "=" * 10)
            print(statistics(last))
    return text


def statistics(last: GenerationResponse | None) -> str:
    """mlx-lm's closing lines, from the last response."""
    if last is None:
        return "No text generated for this prompt"
    return (
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {last.peak_memory:.3f} GB"
    )


def check_depth(mtp: Depth, model: Model | None = None) -> Depth:
    """Returns ``mtp`` if it is "auto", "off" or 1…8 (and the model has a head to draft with).

    Raises:
        ValueError: it is something else.
    """
    if mtp in ("auto", "off"):
        return mtp
    if isinstance(mtp, bool) or not isinstance(mtp, int) or not 1 <= mtp <= MAX_DEPTH:
        raise ValueError(f"mtp must be 'auto', 'off' or 1 to {MAX_DEPTH}, got {mtp!r}")
    if model is not None and model.mtp is None:
        raise ValueError(f"mtp is {mtp}, but this model has no MTP head; use 'auto' or 'off'")
    return mtp


def _check_prompt(prompt: mx.array | Sequence[int], model: Model) -> mx.array:
    tokens = prompt if isinstance(prompt, mx.array) else mx.array(list(prompt), dtype=mx.int32)
    if tokens.ndim != 1 or tokens.size == 0:
        raise ValueError(
            "the prompt is empty"
            if tokens.size == 0
            else f"the prompt must be one sequence of token ids, got shape {list(tokens.shape)}"
        )
    vocab = model.args.vocab_size
    if not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"the prompt must be token ids (integers), got {tokens.dtype}")
    if not ((tokens >= 0) & (tokens < vocab)).all().item():
        raise ValueError(f"the prompt holds a token id outside 0…{vocab - 1}")
    return tokens


def _check_cache(cache: Cache, model: Model) -> Cache:
    if len(cache) != len(model.layers):
        raise ValueError(
            f"prompt_cache has {len(cache)} entries, this model {len(model.layers)} layers"
        )
    settle(cache)
    return cache


def _budget(model: Model, positions: int, max_tokens: int) -> int:
    """How many tokens to generate after ``positions`` of prompt and cache."""
    limit = model.args.max_position_embeddings
    if max_tokens < -1 or max_tokens == 0:
        raise ValueError(f"max_tokens must be positive, or -1 for no limit, got {max_tokens}")
    if positions > limit:
        raise ValueError(
            f"the prompt is {positions} tokens long (cached ones included), but this model's "
            f"max_position_embeddings is {limit}; shorten it"
        )
    room = max(1, limit - positions)
    return room if max_tokens == -1 else min(max_tokens, room)
