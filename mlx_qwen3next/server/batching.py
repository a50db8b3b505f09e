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
)
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from ..decoding.draft_depth import Depth
from ..decoding.drafters import Drafter
from ..decoding.sampling import Chooser, SeededSampler
from ..decoding.sequence import NOT_QUANTIZED, KVQuantization, TokenSequence
from ..decoding.speculation import Speculation
from ..decoding.speculative import Token
from ..model.cache import Cache, settle
from ..model.qwen3_next import Model

Prompted = PromptProcessingBatch.Response
Generated = GenerationBatch.Response
Responses = tuple[list[Prompted], list[Generated]]


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
        quantization: KVQuantization = NOT_QUANTIZED,
        **options: Any,
    ):
        informing: Any = _InformingModel(model)
        self._alone: _LoneSequence | None = None
        super().__init__(informing, **options)
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
        with_drafters = [self._with_drafters(cache) for cache in caches or [None] * len(segments)]
        return super().insert_segments(segments, max_tokens, with_drafters, *options, **named)

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[Cache, list[int]]]:
        """The caches of sequences whose prompts are being processed, and the tokens in them.

        They may be those in use: to be read at once, not to be kept.
        """
        caches = super().extract_cache(uids)
        alone = self._alone
        if alone is not None and alone.entry.uid in uids:
            caches[alone.entry.uid] = alone.entry.cache, alone.tokens
        return {uid: (_without_drafters(cache), tokens) for uid, (cache, tokens) in caches.items()}

    def remove(
        self, uids: Sequence[int], return_prompt_caches: bool = False
    ) -> dict[int, tuple[Cache, list[int]]]:
        """Ends sequences; their caches, if asked for, hold all tokens that were reported."""
        alone = self._alone
        if alone is not None and alone.entry.uid in uids:
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
        alone = () if self._alone is None else self._alone.entry.cache
        return super().prompt_cache_nbytes + sum(c.nbytes for c in alone)

    def _next(self) -> Responses:
        reported: list[Generated] = []
        if self._alone is None:
            self._alone = self._take()
        elif self._unprocessed_sequences:
            reported = self._give_back()
        if self._alone is None:
            prompted, generated = super()._next()
            for response in generated:
                if response.prompt_cache is not None:
                    response.prompt_cache = _without_drafters(response.prompt_cache)
            return prompted, reported + generated
        responses = self._alone.next()
        if self._alone.finished:
            self._alone = None
        return responses

    def _with_drafters(self, cache: Cache | None) -> Cache:
        layers = len(self._lm.layers)
        cache = self._lm.make_cache() if cache is None else cache
        drafter, head = None, cache[layers:]
        if self._lm.mtp is not None and not self.depth.idle:
            head = head or self._lm.mtp.make_cache()
            drafter = Speculation.of(self._lm).drafter(head)
        return [*cache[:layers], _Drafters([_DrafterRow(drafter, head)])]

    # --- between the batch and the lone sequence -------------------------------------------------
    def _take(self) -> _LoneSequence | None:
        """Takes the one live sequence out of the batch; None if there are more or none."""
        unprocessed, prompts = self._unprocessed_sequences, self._prompt_batch
        generating, chosen = self._generation_batch, None
        if len(unprocessed) + len(prompts) + len(generating) != 1:
            return None
        if len(generating):
            entry = _Entry.of(generating, [])
            entry.matcher, entry.generated = generating._matchers[0], generating._num_tokens[0]
            chosen = generating._next_tokens, generating._next_logprobs[0]
            generating.filter([])
        elif len(prompts):
            ((segments, processed, total),) = self._currently_processing
            entry = _Entry.of(prompts, segments)
            entry.processed, entry.total = processed, total
            prompts.filter([])
            self._currently_processing = []
        else:
            uid, segments, limit, cache, tokens, sampler, processors, stop = unprocessed.popleft()
            entry = _Entry(
                uid, segments, limit, cache, tokens, sampler, processors, stop, stop.matcher()
            )
        return _LoneSequence(
            self._lm, entry, self.depth, self.prefill_step_size, self._quantization, chosen
        )

    def _give_back(self) -> list[Generated]:
        """Moves the lone sequence into the batch; returns what it still had to report."""
        assert self._alone is not None
        alone, self._alone = self._alone, None
        reported, entry = alone.leave(), alone.entry
        if alone.finished:
            return reported
        if not alone.is_decoding:
            options = entry.sampler, entry.processors, entry.stop
            self._unprocessed_sequences.appendleft(
                (entry.uid, alone.segments, entry.max_tokens, entry.cache, alone.tokens, *options)
            )
            return reported
        batch = GenerationBatch(
            self.model,
            [entry.uid],
            mx.array([alone.last], mx.uint32),
            [c.merge([c]) for c in entry.cache],
            [alone.tokens],
            [entry.sampler],
            self.sampler,
            [entry.processors],
            [entry.stop],
            [entry.max_tokens],
        )
        batch._num_tokens, batch._matchers = [entry.generated], [entry.matcher]
        self._generation_batch.extend(batch)
        return reported


@dataclass
class _Entry:
    """The parts of one sequence in mlx-lm's batch."""

    uid: int
    segments: list[list[int]]  # of the prompt, still to be fed; the last one is one token
    max_tokens: int
    cache: Cache  # an entry a layer, then _Drafters
    tokens: list[int]  # in the cache
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: StopSequences
    matcher: StopSequences.Matcher
    processed: int = 0  # prompt tokens fed…
    total: int = 0  # …of so many
    generated: int = 0  # tokens

    def __post_init__(self) -> None:
        self.total = self.total or sum(len(segment) for segment in self.segments)

    @classmethod
    def of(
        cls, batch: PromptProcessingBatch | GenerationBatch, segments: list[list[int]]
    ) -> _Entry:
        """The only sequence of a batch."""
        (stop,) = batch.stop_sequences
        assert batch.samplers and batch.logits_processors is not None
        return cls(
            batch.uids[0],
            segments,
            batch.max_tokens[0],
            batch.extract_cache(0),
            batch.tokens[0],
            batch.samplers[0],
            batch.logits_processors[0],
            stop,
            stop.matcher(),
        )


class _LoneSequence(TokenSequence):
    """The only live sequence: gives mlx-lm's responses, a prompt's chunk or a token at a time.

    Args:
        entry: its parts in the batch.
        chosen: the token ``[1]`` that the batch chose last, and its log-probabilities ``[vocab]``,
            if it has begun to decode there.
    """

    def __init__(
        self,
        model: Model,
        entry: _Entry,
        depth: Depth,
        step_size: int,
        quantization: KVQuantization,
        chosen: tuple[mx.array, mx.array] | None = None,
    ):
        segments, self._chosen = entry.segments, None
        if chosen is not None:
            token, logprobs = int(cast(int, chosen[0].item())), chosen[1]
            segments, self._chosen = [[token]], Token(token, logprobs, False)
        super().__init__(
            model,
            entry.cache,
            entry.tokens,
            segments,
            depth=depth,
            drafter=entry.cache[-1].rows[0].drafter,
            step_size=step_size,
            quantization=quantization,
        )
        self.entry, self._group = entry, model.group
        self._steps: Generator[Token] | None = None
        self.finished = False

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is done with."""
        return self._steps is not None

    def next(self) -> Responses:
        """Reads a chunk of the prompt, or generates a token."""
        entry = self.entry
        if self._steps is not None:
            return [], [self._generated(next(self._steps))]
        if self._chosen is not None:
            return [], [self._report_chosen()]
        if not self.is_reading:
            self._start()
            return [Prompted(entry.uid, (entry.total, entry.total), True, True)], []
        before = len(self.tokens)
        segment_ended = self.read()
        entry.processed += len(self.tokens) - before
        return [Prompted(entry.uid, (entry.processed, entry.total), segment_ended, False)], []

    def leave(self) -> list[Generated]:
        """Makes the sequence fit for a batch; returns the tokens still to be reported."""
        reported = []
        if self._chosen is not None:
            reported.append(self._report_chosen())
        if self._steps is not None and not self.finished:
            self.hand_over()
            for token in self._steps:
                reported.append(self._generated(token))
                if self.finished:
                    break
        return reported

    def close(self) -> None:
        """Ends decoding; the cache then holds all tokens that were reported."""
        self.finished = True
        if self.entry.generated == 0:  # the cache holds what it should
            return
        if self._steps is None:
            self._start()
        assert self._steps is not None
        self._steps.close()
        self.finish()

    def give_up(self) -> None:
        """Ends decoding without another forward; the cache is of no use any more."""
        self.finished = True
        if self._steps is not None:
            self.hand_over()
            with suppress(Exception):
                self._steps.close()

    def _start(self) -> None:
        """Begins to decode after ``last``."""
        entry = self.entry
        tokens = mx.array([*self.tokens, self.last], mx.uint32)
        if isinstance(entry.sampler, SeededSampler):
            chooser = entry.sampler.chooser(entry.processors, tokens)
        else:
            chooser = Chooser(entry.sampler, entry.processors, tokens, group=self._group)
        self._steps = self.generate(chooser, entry.max_tokens - entry.generated)

    def _report_chosen(self) -> Generated:
        """Reports the token that the batch has chosen, and goes on from it."""
        assert self._chosen is not None
        token, self._chosen = self._chosen, None
        response = self._report(token)
        if not self.finished:
            self._start()
        return response

    def _generated(self, token: Token) -> Generated:
        if isinstance(self.entry.sampler, SeededSampler):
            self.entry.sampler.position += 1
        return self._report(token)

    def _report(self, token: Token) -> Generated:
        entry = self.entry
        entry.generated += 1
        reason = "length" if entry.generated >= entry.max_tokens else None
        if entry.matcher.advance(token.token):
            reason = "stop"
        response = Generated(entry.uid, token.token, token.logprobs, reason, None, None)
        if reason is not None:
            self.close()
            response.prompt_cache = _without_drafters(entry.cache)
            response.all_tokens = self.tokens
        return response


@dataclass
class _DrafterRow:
    """A sequence's drafter, and the cache it keeps up to date."""

    drafter: Drafter | None
    cache: Cache


class _Drafters:
    """The drafters of a batch's sequences, as one more entry of its cache.

    So mlx-lm moves them together with their sequences; see its caches for the methods.
    """

    def __init__(self, rows: list[_DrafterRow]):
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
    def merge(entries: Sequence[_Drafters]) -> _Drafters:
        return _Drafters([row for entry in entries for row in entry.rows])

    def extend(self, other: _Drafters) -> None:
        self.rows = self.rows + other.rows

    def filter(self, batch_indices: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in batch_indices]

    def extract(self, idx: int) -> _Drafters:
        return _Drafters([self.rows[idx]])

    def __deepcopy__(self, memo: Any) -> _Drafters:
        # mlx-lm copies a batch to divide it: a row goes on in one of the two.
        return _Drafters(self.rows)

    @property
    def state(self) -> list[mx.array]:
        """What is to be evaluated: what waits in a drafter must not refer to keys and values."""
        arrays = [x for row in self.rows for c in row.cache for x in c.state]
        return [x for x in (*arrays, self._hidden) if isinstance(x, mx.array)]

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for row in self.rows for c in row.cache)


class _InformingModel:
    """The model for mlx-lm's batch: tells the drafters, the last entry, of the hidden states."""

    def __init__(self, model: Model):
        self._model = model

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        *trunk, drafts = cache
        hidden = self._model.model(tokens, trunk)
        drafts.committed(tokens, hidden)
        return self._model.logits(hidden)


def _without_drafters(cache: Cache) -> Cache:
    """One sequence's cache for others: settled, the head's own entry last if it is kept."""
    *trunk, drafts = cache
    settle(trunk)
    (row,) = drafts.rows
    if row.drafter is not None:
        row.drafter.settle()
    return [*trunk, *row.cache]
