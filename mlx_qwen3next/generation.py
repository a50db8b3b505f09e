"""From a prompt to tokens and text: ``generate_step``, ``stream_generate``, ``generate``.

The plain path is mlx-lm's own loop (chunked prefill, step n + 1 queued while n runs); this module
checks what comes in and gives the results their form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, wired_limit
from mlx_lm.generate import GenerationResponse as MLXGenerationResponse
from mlx_lm.generate import generate_step as mlx_generate_step
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import Cache, GatedDeltaCache, settle, tokens_held
from .config import Config
from .model import Model
from .sampling import Sampling, check_integer

MAX_DEPTH = 8  # drafts a round, at most
KV_BITS = (2, 3, 4, 5, 6, 8)  # what mx.quantize takes
KV_GROUP_SIZES = (32, 64, 128)

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
        mtp: how deep the MTP head drafts: "auto", "off" or 1…8. Checked, but not used yet.
        prompt_cache: what ``model.make_cache()`` made, with the tokens before the prompt; advanced
            in place. Whenever the caller stops, it holds the prompt and every token yielded, the
            last one included: go on with the token that comes after it.
        prefill_step_size: prompt tokens processed at a time.
        kv_bits, kv_group_size, quantized_kv_start: quantize keys and values, to 2, 3, 4, 5, 6 or 8
            bits in groups of 32, 64 or 128, once the cache holds that many tokens.
        prompt_progress_callback: called with (processed, total) prompt tokens.
        sampler: an mlx-lm callable, instead of the options that choose a token.
        logits_processors: mlx-lm callables, before the penalties.
        sampling: the options of :class:`mlx_qwen3next.sampling.Sampling` (``temp``, ``top_p``, …).

    Raises:
        ValueError: an argument is out of range; raised at the call, before any work.
    """
    prompt = _check_prompt(prompt, model)
    check_depth(mtp, model)
    check_integer("prefill_step_size", prefill_step_size, least=1)
    if kv_bits is not None:
        check_integer("quantized_kv_start", quantized_kv_start, least=0)
        if kv_bits not in KV_BITS:
            raise ValueError(f"kv_bits must be one of {KV_BITS}, got {kv_bits!r}")
        if kv_group_size not in KV_GROUP_SIZES or model.args.head_dim % kv_group_size:
            raise ValueError(
                f"kv_group_size must be one of {KV_GROUP_SIZES} and divide this model's head_dim "
                f"({model.args.head_dim}), got {kv_group_size!r}"
            )
    if unknown := sorted(sampling.keys() - {field.name for field in fields(Sampling)}):
        raise ValueError(f"unknown option: {', '.join(unknown)}")
    options = Sampling(**sampling)
    options.check_vocabulary(model.args.vocab_size)
    cache = model.make_cache() if prompt_cache is None else _check_cache(prompt_cache, model)
    budget = _budget(model, tokens_held(cache) + prompt.size, max_tokens)
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

    The responses' texts, one after the other, are ``tokenizer.decode`` of their tokens (a stop
    token has no text); none ends within a character.

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
    cache = options.get("prompt_cache")
    held = 0 if cache is None else tokens_held(_check_cache(cache, model))
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
    pending: list[int] = []  # tokens that end within a character
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
                pending.append(step.token)
                if count == budget:
                    finish_reason = "length"
            # Not mlx-lm's detokenizer, which drops a leading space and garbles NUL bytes.
            text = tokenizer.decode(pending)
            if finish_reason is None and text.endswith("\ufffd"):
                text = ""
            else:
                pending.clear()
            yield GenerationResponse(
                text=text,
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


def check_max_tokens(max_tokens: int) -> int:
    """Returns ``max_tokens`` if it is a positive integer or -1.

    Raises:
        ValueError: it is something else.
    """
    if max_tokens != -1:
        check_integer("max_tokens (-1 for no limit)", max_tokens, least=1)
    return max_tokens


def _check_prompt(prompt: mx.array | Sequence[int], model: Model) -> mx.array:
    vocab = model.args.vocab_size
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # ragged, or bfloat16
        raise ValueError("the prompt must be one sequence of token ids") from None
    if tokens.size == 0:
        raise ValueError("the prompt is empty")
    if tokens.ndim != 1:
        raise ValueError(
            f"the prompt must be one sequence of token ids, got shape {list(tokens.shape)}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"the prompt must be token ids (integers), got {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"the prompt holds a token id outside 0…{vocab - 1}")
    return mx.array(tokens.astype(np.int32))


def _check_cache(cache: Cache, model: Model) -> Cache:
    """Returns ``cache``, with entries that mlx-lm's own model made replaced by ours in place."""
    layers = model.layers
    if not isinstance(cache, list) or len(cache) != len(layers):
        got = f"{len(cache)} entries" if isinstance(cache, list) else repr(cache)
        raise ValueError(
            f"prompt_cache must be a list with an entry for each of the model's {len(layers)} "
            f"layers, as model.make_cache() makes it, got {got}"
        )
    own = [GatedDeltaCache.from_state(c.state) if type(c) is ArraysCache else c for c in cache]
    settle(own)
    for i, (entry, layer) in enumerate(zip(own, layers, strict=True)):
        if not (_fits_linear if layer.is_linear else _fits_attention)(entry, model.args):
            raise ValueError(
                f"prompt_cache[{i}] ({type(entry).__name__}) does not fit layer {i} of this model; "
                "use what its make_cache() made"
            )
    cache[:] = own
    return cache


def _fits_linear(entry: Any, c: Config) -> bool:
    rows = (1, c.linear_conv_kernel_dim - 1, c.linear_conv_dim)
    state = (1, c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
    return isinstance(entry, GatedDeltaCache) and (
        entry.empty() or [x.shape for x in entry.cache if x is not None] == [rows, state]
    )


def _fits_attention(entry: Any, c: Config) -> bool:
    quantized = isinstance(entry, QuantizedKVCache)
    if not quantized and not isinstance(entry, KVCache):
        return False
    if entry.empty():
        return True
    keys = entry.keys[1] if quantized else entry.keys  # [1]: the scales, one a group
    B, nkv, _, columns = keys.shape
    hd = columns * entry.group_size if quantized else columns
    return (B, nkv, hd) == (1, c.num_key_value_heads, c.head_dim)


def _budget(model: Model, positions: int, max_tokens: int) -> int:
    """How many tokens to generate after ``positions`` of prompt and cache."""
    limit = model.args.max_position_embeddings
    check_max_tokens(max_tokens)
    if positions > limit:
        raise ValueError(
            f"the prompt is {positions} tokens long (cached ones included), but this model's "
            f"max_position_embeddings is {limit}; shorten it"
        )
    room = max(1, limit - positions)
    return room if max_tokens == -1 else min(max_tokens, room)
