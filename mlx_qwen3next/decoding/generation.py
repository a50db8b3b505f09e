"""From a prompt to tokens and text: ``generate_step``, ``stream_generate``, ``generate``.

This module checks the arguments and gives the results their form;
:mod:`mlx_qwen3next.decoding.sequence` reads the prompt and decodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, wired_limit
from mlx_lm.generate import GenerationResponse as MLXGenerationResponse
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..model.cache import Cache
from ..model.quantized_kv import KVQuantization
from ..model.qwen3_next import Model
from ..model.reading import MOST
from ..model.streamed.experts import Reads
from ..prompt_cache.store import PromptCache
from .constraint import Constraint
from .detokenize import TextDecoder
from .drafters.speculation import MTP, Lookup, Speculation
from .pace import PromptPace
from .sampling import Chooser, Sampling, check_integer
from .sequence import TokenSequence
from .speculative import Acceptance, Token
from .validation import check_cache, check_kv_quantization, check_prompt, held_by, token_budget

SOURCES = {  # of drafts, in the closing lines
    "lookup": "copied",
    "mtp": "from the MTP head",
    "dflash": "from the draft model",
    "grammar": "forced by the grammar",
}


@dataclass
class GenerationResponse(MLXGenerationResponse):
    """mlx-lm's response, plus what speculation did so far."""

    rounds: int = 0  # passes of the trunk, plain steps included
    mean_accept_length: float = 0.0  # tokens a round
    acceptance: tuple[float, ...] = ()  # share of right drafts at depth 1, 2, …
    drafted: dict[str, int] = field(default_factory=dict)  # by source, as in SOURCES
    accepted: dict[str, int] = field(default_factory=dict)  # those that were right
    cached_tokens: int = 0  # of the prompt, found in a PromptCache
    experts: Reads | None = None  # where some are read from disk


def generate_step(
    prompt: mx.array | Sequence[int],
    model: Model,
    *,
    max_tokens: int = 256,
    mtp: MTP = "auto",
    lookup: Lookup = None,
    prompt_cache: Cache | PromptCache | None = None,
    prefill_step_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    sampler: Sampler | None = None,
    logits_processors: Iterable[LogitsProcessor] | None = None,
    **sampling: Any,
) -> Generator[Token]:
    """Generates tokens after a prompt; needs no tokenizer and stops at no token.

    Args:
        prompt: token ids ``[L]``, not empty.
        max_tokens: how many to generate, -1 for as many as the context takes. Generation ends at
            the model's max_position_embeddings in any case.
        mtp: how many tokens the MTP head drafts a round: 1…8, "off", or "auto" to choose by what
            is measured, none included. It changes the speed, not the tokens, except that rounding
            may decide between tokens that are all but equal.
        lookup: how many tokens are copied from the last place where the text was as it is at its
            end: 1…15 where there is one, "off", or "auto" to choose by what is measured. None is
            "auto" where ``mtp`` is "auto", and otherwise "off". It needs no head.
        prompt_cache: what ``model.make_cache()`` made, with the tokens before the prompt; advanced
            in place. Whenever the caller stops, it holds the prompt and every token yielded, the
            last one included: go on with the token that comes after it. (If the prompt was not
            done with, it holds as many whole steps of it as were.) While tokens are being
            generated it is nobody else's to read. ``model.make_cache() + model.mtp.make_cache()``
            keeps what the MTP head knows as well; mlx-lm's own functions want the first part alone.
            Or a PromptCache: then the prompt is whole, and what of its beginning is known there
            need not be processed again; it is given checkpoints in the prompt and where the text
            ends, or where the prompt was interrupted.
        prefill_step_size: prompt tokens processed at a time. By default as many as take about 2
            seconds by what is measured, and no more memory than :class:`PromptPace` gives them; at
            most 8192.
        kv_bits, kv_group_size, quantized_kv_start: quantize keys and values, to 2, 3, 4, 5, 6 or 8
            bits in groups of 32, 64 or 128, once the cache holds that many tokens. Tokens from
            that position on meet quantized ones alone. The MTP head's own stay as they are.
        prompt_progress_callback: called with (processed, total) prompt tokens; those that were
            known count as processed.
        sampler: an mlx-lm callable, instead of the options that choose a token. Must depend on
            its argument and ``mx.random`` alone.
        logits_processors: mlx-lm callables, before the penalties. With them "auto" drafts nothing:
            some follow the text from call to call, and would take drafts for it. One of them may be
            a :class:`mlx_qwen3next.decoding.constraint.Constraint`, which changes nothing in that.
        sampling: the options of :class:`mlx_qwen3next.decoding.sampling.Sampling` (``temp``,
        ``top_p``, …).

    Raises:
        ValueError: an argument is out of range; raised at the call, before any work.
    """
    prompt = check_prompt(prompt, model)
    processors = list(logits_processors or ())
    speculation = Speculation.of(model)
    if any(not isinstance(processor, Constraint) for processor in processors):
        mtp = "off" if mtp == "auto" else mtp
        lookup = "off" if lookup == "auto" else lookup
    depth = speculation.depth(mtp, lookup)
    is_measured = prefill_step_size is None
    step_size = MOST if prefill_step_size is None else prefill_step_size
    check_integer("prefill_step_size", step_size, least=1)
    check_kv_quantization(model.args.head_dim, kv_bits, kv_group_size, quantized_kv_start)
    if unknown := sorted(sampling.keys() - {field.name for field in fields(Sampling)}):
        raise ValueError(f"unknown option: {', '.join(unknown)}")
    options = Sampling(**sampling)
    options.check_vocabulary(model.args.vocab_size)
    store, held = None, 0
    if isinstance(prompt_cache, PromptCache):
        store = prompt_cache
        budget = token_budget(model, prompt.size, max_tokens)
        known, held = store.fetch(prompt)
        cache = known or model.make_cache()
    else:
        cache = model.make_cache() if prompt_cache is None else check_cache(prompt_cache, model)
        budget = token_budget(model, held_by(model, cache) + prompt.size, max_tokens)
    head = cache[len(model.layers) :]
    # A block drafter takes the head's place. Where nobody will draft, to follow would take up to
    # 7 % of a long prompt.
    if model.dflash is not None or (store is not None and depth.idle("mtp")):
        head = []
    keep_drafters = bool(head) or store is not None
    head = head or speculation.head_cache(depth)
    position = 0 if model.dflash is None else held_by(model, cache)

    def steps() -> Generator[Token]:
        drafters = speculation.drafters(depth, head, position)
        places = [] if store is None else store.places(prompt, held)
        tokens: list[int] = prompt.tolist()  # type: ignore[assignment]
        cuts = sorted({held, *places, prompt.size - 1, prompt.size})
        sequence = TokenSequence(
            model,
            cache,
            tokens[:held],
            [tokens[start:end] for start, end in pairwise(cuts)],
            depth=depth,
            drafters=drafters,
            keep_drafters=keep_drafters,
            step_size=step_size,
            pace=PromptPace.of(model, quantized=kv_bits is not None) if is_measured else None,
            quantization=KVQuantization(kv_bits, kv_group_size, quantized_kv_start),
        )

        def keep() -> None:
            """Keeps the sequence so far for its next user, unless an error has cut it short."""
            for drafter in drafters if keep_drafters else ():
                drafter.settle()
            count = len(sequence.tokens)
            if store is not None and held_by(model, sequence.trunk) == count > 0:
                store.insert(sequence.tokens, [*sequence.trunk, *head])

        progress = prompt_progress_callback or (lambda *_: None)
        try:
            progress(held, prompt.size)
            while sequence.is_reading:
                sequence.read()
                if len(sequence.tokens) in places:
                    keep()
                progress(len(sequence.tokens), prompt.size)
            progress(prompt.size, prompt.size)  # the last token goes with the first step
            chooser = Chooser(
                sampler or options.sampler(),
                [*processors, *options.logits_processors()],
                prompt,
                group=model.group,
            )
            yield from sequence.generate(chooser, budget)
        finally:  # wherever it was stopped, within the prompt as well
            keep()

    return steps()


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int],
    max_tokens: int = 256,
    **options: Any,
) -> Generator[GenerationResponse]:
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
        tokens = check_prompt(tokenizer.encode(prompt, add_special_tokens=special), model)
    else:
        tokens = check_prompt(prompt, model)
    cache = options.get("prompt_cache")
    held = 0
    if cache is not None and not isinstance(cache, PromptCache):
        held = held_by(model, check_cache(cache, model))
    budget = token_budget(model, held + tokens.size, max_tokens)
    progress = _Progress(options.pop("prompt_progress_callback", None))
    steps = generate_step(
        tokens, model, max_tokens=budget, prompt_progress_callback=progress, **options
    )
    return _stream(model, tokenizer, tokens.size, progress, budget, steps)


class _Progress:
    """Passes on the progress of a prompt, and notes how much was known at the beginning."""

    known: int | None = None

    def __init__(self, callback: Callable[[int, int], None] | None):
        self._callback = callback

    def __call__(self, processed: int, total: int) -> None:
        if self.known is None:
            self.known = processed
        if self._callback is not None:
            self._callback(processed, total)


def _stream(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    progress: _Progress,
    budget: int,
    steps: Generator[Token],
) -> Generator[GenerationResponse]:
    text = TextDecoder(tokenizer)
    prompt_seconds, start = 0.0, time.perf_counter()
    drafts, streamed = Acceptance(), model.streamed
    begun = None if streamed is None else streamed.counts()
    with wired_limit(model), closing(steps):
        for count, step in enumerate(steps, start=1):
            drafts.add(step)
            if count == 1:
                now = time.perf_counter()
                prompt_seconds, start = now - start, now
            finish_reason = None
            if step.token in tokenizer.eos_token_ids:
                finish_reason = "stop"
            elif count == budget:
                finish_reason = "length"
            yield GenerationResponse(
                text=text.add(step.token, finish_reason),
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                prompt_tokens=prompt_tokens,
                prompt_tps=(prompt_tokens - (progress.known or 0)) / prompt_seconds,
                generation_tokens=count,
                generation_tps=count / max(time.perf_counter() - start, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
                rounds=drafts.rounds,
                mean_accept_length=drafts.mean_length,
                acceptance=drafts.by_depth,
                drafted=dict(drafts.drafted),
                accepted=dict(drafts.accepted),
                cached_tokens=progress.known or 0,
                experts=None if begun is None else streamed.counts().since(begun),
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
    """mlx-lm's closing lines, from the last response, and one on the drafts if there were any."""
    if last is None:
        return "No text generated for this prompt"
    cached = f" ({last.cached_tokens} of them cached)" if last.cached_tokens else ""
    lines = [
        f"Prompt: {last.prompt_tokens} tokens{cached}, {last.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {last.peak_memory:.3f} GB",
    ]
    if last.drafted:
        shares = "; ".join(
            f"{SOURCES.get(source, source)} {last.accepted[source]} of {n}"
            for source, n in last.drafted.items()
        )
        lines.append(
            f"Speculation: {last.rounds} rounds, {last.mean_accept_length:.2f} tokens a round; "
            f"drafts accepted: {shares}"
        )
    if last.experts is not None:
        lines.append(f"Experts: {last.experts}")
    return "\n".join(lines)
