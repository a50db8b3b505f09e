"""mlx-lm's continuous batching, with speculation for a sequence that is alone.

While one sequence is live, it decodes by :class:`mlx_qwen3next.decoding.speculative.Decoding`,
drafts and all. When others join, it moves into mlx-lm's batch, and out again when they have left.
Neither changes anyone's tokens: random numbers belong to a key and a position
(:class:`mlx_qwen3next.decoding.sampling.SeededSampler`). A batch decodes plainly, but tells the MTP
head what it computes, so that drafting goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
    maybe_quantize_kv_cache,
)
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from ..decoding.draft_depth import Depth
from ..decoding.drafters import Drafter
from ..decoding.generation import prefill
from ..decoding.sampling import Chooser, SeededSampler
from ..decoding.speculation import Speculation
from ..decoding.speculative import Decoding, Token
from ..model.cache import Cache, settle
from ..model.qwen3_next import Model

Prompted = PromptProcessingBatch.Response
Generated = GenerationBatch.Response
Responses = tuple[list[Prompted], list[Generated]]


@dataclass(frozen=True)
class KVQuantization:
    """How keys and values are quantized: mlx-lm's options of these names."""

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0


class SpeculativeBatchGenerator(BatchGenerator):
    """mlx-lm's BatchGenerator; a sequence that is alone decodes with drafts.

    Caches given to and by it are a list of the model's entries, one a layer, then the MTP head's
    if it is kept.

    Args:
        depth: chooses how many tokens are drafted.
        quantization: of keys and values; with it there can be only one sequence at a time, since
            mlx-lm's quantized caches have no batched form.
        options: those of mlx-lm's BatchGenerator.
    """

    def __init__(
        self,
        model: Model,
        depth: Depth,
        quantization: KVQuantization = KVQuantization(),
        **options: Any,
    ):
        telling: Any = _Telling(model)
        self._alone: _Alone | None = None
        super().__init__(telling, **options)
        self._lm, self.depth, self._quantization = model, depth, quantization

    def close(self) -> None:
        """As mlx-lm's. What is live is given up, by this thread and not by the collector's."""
        alone, self._alone = self._alone, None
        if alone is not None:
            alone.give_up()
        super().close()

    def insert_segments(  # type: ignore[override]
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: Sequence[Cache | None] | None = None,
        *options: Any,
        **named: Any,
    ) -> list[int]:
        """As mlx-lm's. A cache is advanced in place."""
        with_drafts = [self._with_drafts(cache) for cache in caches or [None] * len(segments)]
        return super().insert_segments(segments, max_tokens, with_drafts, *options, **named)

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[Cache, list[int]]]:
        """The caches of sequences whose prompts are being processed, and the tokens in them.

        They may be those in use: to be read at once, not to be kept.
        """
        caches = super().extract_cache(uids)
        if self._alone is not None and self._alone.sequence.uid in uids:
            sequence = self._alone.sequence
            caches[sequence.uid] = sequence.cache, sequence.tokens
        return {uid: (_without_drafts(cache), tokens) for uid, (cache, tokens) in caches.items()}

    def remove(
        self, uids: Sequence[int], return_prompt_caches: bool = False
    ) -> dict[int, tuple[Cache, list[int]]]:
        """Ends sequences; their caches, if asked for, hold all tokens that were told."""
        alone = self._alone
        if alone is not None and alone.sequence.uid in uids:
            alone.close()
        caches = super().remove(uids, return_prompt_caches)
        if alone is not None and alone.finished:
            self._alone = None
        return caches

    @property
    def prefill_step_size(self) -> int:
        """Prompt tokens processed at a time, no more than the shortest prompt's segment has left:
        mlx-lm pads the others to the longest, in time and memory."""
        left = [len(segments[0]) for segments, *_ in self._currently_processing]
        return min([self._step_size, *left])

    @prefill_step_size.setter
    def prefill_step_size(self, tokens: int) -> None:
        self._step_size = tokens

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the live sequences' caches."""
        alone = () if self._alone is None else self._alone.sequence.cache
        return super().prompt_cache_nbytes + sum(c.nbytes for c in alone)

    def _next(self) -> Responses:
        told: list[Generated] = []
        if self._alone is None:
            self._alone = self._take()
        elif self._unprocessed_sequences:
            told = self._give_back()
        if self._alone is None:
            prompted, generated = super()._next()
            for response in generated:
                if response.prompt_cache is not None:
                    response.prompt_cache = _without_drafts(response.prompt_cache)
            return prompted, told + generated
        responses = self._alone.next()
        if self._alone.finished:
            self._alone = None
        return responses

    def _with_drafts(self, cache: Cache | None) -> Cache:
        layers = len(self._lm.layers)
        cache = self._lm.make_cache() if cache is None else cache
        drafter, head = None, cache[layers:]
        if self._lm.mtp is not None and not self.depth.idle:
            head = head or self._lm.mtp.make_cache()
            drafter = Speculation.of(self._lm).drafter(head)
        return [*cache[:layers], _Drafts([_Row(drafter, head)])]

    # --- between the batch and the sequence that is alone --------------------------------------
    def _take(self) -> _Alone | None:
        """Takes the one live sequence out of the batch; None if there are more or none."""
        unprocessed, prompts = self._unprocessed_sequences, self._prompt_batch
        live = len(unprocessed) + len(prompts) + len(self._generation_batch)
        if live != 1:
            return None
        if len(self._generation_batch):
            sequence = self._out_of_generation(self._generation_batch)
        elif len(prompts):
            ((segments, done, total),) = self._currently_processing
            sequence = _sequence_of(prompts, segments, done=done, total=total)
            prompts.filter([])
            self._currently_processing = []
        else:
            uid, segments, limit, cache, tokens, sampler, processors, stop = unprocessed.popleft()
            sequence = _Sequence(
                uid, segments, limit, cache, tokens, sampler, processors, stop, stop.matcher()
            )
        return _Alone(self._lm, sequence, self.depth, self.prefill_step_size, self._quantization)

    def _out_of_generation(self, batch: GenerationBatch) -> _Sequence:
        sequence = _sequence_of(batch, [])
        sequence.matcher, sequence.told = batch._matchers[0], batch._num_tokens[0]
        sequence.chosen = batch._next_tokens, batch._next_logprobs[0]
        batch.filter([])
        return sequence

    def _give_back(self) -> list[Generated]:
        """Moves the sequence into the batch; returns what it still had to tell."""
        assert self._alone is not None
        told = self._alone.hand_over()
        s, over = self._alone.sequence, self._alone.finished
        self._alone = None
        if over:
            return told
        if s.last is None:  # still at the prompt
            options = s.sampler, s.processors, s.stop
            self._unprocessed_sequences.appendleft(
                (s.uid, s.segments, s.max_tokens, s.cache, s.tokens, *options)
            )
            return told
        batch = GenerationBatch(
            self.model,
            [s.uid],
            mx.array([s.last], mx.uint32),
            [c.merge([c]) for c in s.cache],
            [s.tokens],
            [s.sampler],
            self.sampler,
            [s.processors],
            [s.stop],
            [s.max_tokens],
        )
        batch._num_tokens, batch._matchers = [s.told], [s.matcher]
        self._generation_batch.extend(batch)
        return told


@dataclass
class _Sequence:
    """What mlx-lm's batch knows of one sequence."""

    uid: int
    segments: list[list[int]]  # what of the prompt is still to be fed; the last one is one token
    max_tokens: int
    cache: Cache  # an entry a layer, then _Drafts
    tokens: list[int]  # in the cache
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: StopSequences
    matcher: StopSequences.Matcher
    done: int = 0  # prompt tokens fed…
    total: int = 0  # …of so many
    told: int = 0  # tokens generated
    chosen: tuple[mx.array, mx.array] | None = None  # token [1] to tell next, its logprobs [vocab]
    last: int | None = None  # the sequence's last token, while it decodes alone: not in `tokens`

    def __post_init__(self) -> None:
        self.total = self.total or sum(len(segment) for segment in self.segments)


def _sequence_of(
    batch: PromptProcessingBatch | GenerationBatch, segments: list[list[int]], **progress: Any
) -> _Sequence:
    """The only sequence of a batch."""
    (stop,) = batch.stop_sequences
    assert batch.samplers and batch.logits_processors is not None
    return _Sequence(
        batch.uids[0],
        segments,
        batch.max_tokens[0],
        batch.extract_cache(0),
        batch.tokens[0],
        batch.samplers[0],
        batch.logits_processors[0],
        stop,
        stop.matcher(),
        **progress,
    )


class _Alone:
    """The only live sequence: its prompt step by step, then its tokens one by one."""

    def __init__(
        self,
        model: Model,
        sequence: _Sequence,
        depth: Depth,
        step_size: int,
        quantization: KVQuantization,
    ):
        self._model, self.sequence, self._depth = model, sequence, depth
        self._step_size, self._quantization = step_size, quantization
        *self._trunk, drafts = sequence.cache
        self._drafter = drafts.rows[0].drafter
        self._decoding: Decoding | None = None
        self._tokens: Generator[Token] | None = None
        self.finished = False

    def next(self) -> Responses:
        """A step of the prompt, or a token."""
        s = self.sequence
        if self._tokens is not None:
            return [], [self._tell_next(next(self._tokens))]
        if s.chosen is not None:
            return [], [self._tell_chosen()]
        if sum(len(segment) for segment in s.segments) > 1:
            return [self._prompt_step()], []
        ((s.last,),) = s.segments
        self._start()
        return [Prompted(s.uid, (s.total, s.total), True, True)], []

    def hand_over(self) -> list[Generated]:
        """Leaves the sequence fit for a batch; returns the tokens still to be told."""
        told = []
        if self.sequence.chosen is not None:
            told.append(self._tell_chosen())
        if self._decoding is not None and self._tokens is not None:
            self._decoding.hand_over()
            for token in self._tokens:
                told.append(self._tell_next(token))
                if self.finished:
                    break
        return told

    def close(self) -> None:
        """Ends decoding; the cache then holds all tokens that were told."""
        s = self.sequence
        self.finished = True
        if s.told == 0 or s.last is None:  # the cache holds what it should
            return
        if self._decoding is None or self._tokens is None:
            self._start()
        assert self._decoding is not None and self._tokens is not None
        self._tokens.close()
        self._decoding.feed()
        s.tokens.append(s.last)

    def give_up(self) -> None:
        """Ends decoding; the cache is nobody's any more."""
        self.finished = True
        if self._decoding is not None and self._tokens is not None:
            self._decoding.hand_over()  # nothing is to be fed
            with suppress(Exception):
                self._tokens.close()

    def _prompt_step(self) -> Prompted:
        s = self.sequence
        chunk = s.segments[0][: self._step_size]
        prefill(self._model, self._trunk, mx.array(chunk, mx.uint32), self._drafter, self._quantize)
        s.tokens += chunk
        s.done += len(chunk)
        s.segments[0] = s.segments[0][len(chunk) :]
        if ended := not s.segments[0]:
            s.segments.pop(0)
        return Prompted(s.uid, (s.done, s.total), ended, False)

    def _start(self) -> None:
        """Begins to decode after ``last``."""
        s = self.sequence
        sampler, key, position = s.sampler, None, 0
        if isinstance(s.sampler, SeededSampler):
            sampler, key, position = s.sampler.sampler, s.sampler.key, s.sampler.position
        tokens = mx.array([*s.tokens, s.last], mx.uint32)
        self._decoding = Decoding(
            self._model,
            self._trunk,
            tokens[-1:],
            Chooser(sampler, s.processors, tokens, key, position, self._model.group),
            self._depth,
            self._drafter,
            after_forward=self._quantize,
        )
        self._tokens = self._decoding.tokens(s.max_tokens - s.told)

    def _tell_chosen(self) -> Generated:
        """Tells the token the batch has chosen, and goes on from it."""
        s = self.sequence
        assert s.chosen is not None
        (token, logprobs), s.chosen = s.chosen, None
        response = self._tell(Token(int(cast(int, token.item())), logprobs, False))
        if not self.finished:
            self._start()
        return response

    def _tell_next(self, token: Token) -> Generated:
        if isinstance(self.sequence.sampler, SeededSampler):
            self.sequence.sampler.position += 1
        return self._tell(token)

    def _tell(self, token: Token) -> Generated:
        s = self.sequence
        if s.last is not None:
            s.tokens.append(s.last)
        s.last = token.token
        s.told += 1
        reason = "length" if s.told >= s.max_tokens else None
        if s.matcher.advance(token.token):
            reason = "stop"
        response = Generated(s.uid, token.token, token.logprobs, reason, None, None)
        if reason is not None:
            self.close()
            response.prompt_cache, response.all_tokens = _without_drafts(s.cache), s.tokens
        return response

    def _quantize(self) -> None:
        q = self._quantization
        maybe_quantize_kv_cache(self._trunk, q.quantized_kv_start, q.kv_group_size, q.kv_bits)
        self.sequence.cache[:-1] = self._trunk


@dataclass
class _Row:
    """A sequence's drafter, and the cache it keeps up to date."""

    drafter: Drafter | None
    cache: Cache


class _Drafts:
    """The drafters of a batch's sequences, as one more entry of its cache.

    So mlx-lm moves them together with their sequences; see its caches for the methods.
    """

    def __init__(self, rows: list[_Row]):
        self.rows = rows
        self._hidden: mx.array | None = None
        self._lengths: list[int] | None = None

    def committed(self, tokens: mx.array, hidden: mx.array) -> None:
        """Tells each row's drafter that its sequence grew.

        Args:
            tokens: ``[B, L]``, of which a row may be shorter if :meth:`prepare` said so.
            hidden: ``[B, L, H]``.
        """
        L = tokens.shape[1]
        for i, row in enumerate(self.rows):
            n = L if self._lengths is None else min(L, self._lengths[i])
            if row.drafter is not None and n > 0:
                row.drafter.committed(tokens[i, :n], hidden[i : i + 1, :n])
        if self._lengths is not None:
            self._lengths = [max(n - L, 0) for n in self._lengths]
        self._hidden = hidden

    def prepare(self, lengths: Sequence[int], **_: Any) -> None:
        self._lengths = list(lengths)

    def finalize(self) -> None:
        self._lengths = None

    @staticmethod
    def merge(entries: Sequence[_Drafts]) -> _Drafts:
        return _Drafts([row for entry in entries for row in entry.rows])

    def extend(self, other: _Drafts) -> None:
        self.rows = self.rows + other.rows

    def filter(self, batch_indices: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in batch_indices]

    def extract(self, idx: int) -> _Drafts:
        return _Drafts([self.rows[idx]])

    def __deepcopy__(self, memo: Any) -> _Drafts:
        # mlx-lm copies a batch to divide it: a row goes on in one of the two.
        return _Drafts(self.rows)

    @property
    def state(self) -> list[mx.array]:
        """What is to be evaluated: what waits in a drafter must not refer to keys and values."""
        arrays = [x for row in self.rows for c in row.cache for x in c.state]
        return [x for x in (*arrays, self._hidden) if isinstance(x, mx.array)]

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for row in self.rows for c in row.cache)


class _Telling:
    """The model for mlx-lm's batch: what it computes is told to the drafters, its last entry."""

    def __init__(self, model: Model):
        self._model = model

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        *trunk, drafts = cache
        hidden = self._model.model(tokens, trunk)
        drafts.committed(tokens, hidden)
        return self._model.logits(hidden)


def _without_drafts(cache: Cache) -> Cache:
    """One sequence's cache for others: settled, the head's own entry last if it is kept."""
    *trunk, drafts = cache
    settle(trunk)
    (row,) = drafts.rows
    if row.drafter is not None:
        row.drafter.rest()
    return [*trunk, *row.cache]
