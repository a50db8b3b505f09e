"""mlx-lm's continuous batching, with speculation for a sequence that is alone.

While one sequence is live, it decodes by :class:`mlx_qwen3next.decoding.speculative.Decoding`,
drafts and all. When others join, it moves into mlx-lm's batch, and out again when they have left.
Neither changes anyone's tokens: random numbers belong to a key and a position
(:class:`mlx_qwen3next.decoding.sampling.SeededSampler`). A batch decodes plainly, but tells the MTP
head what it computes, so that drafting goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
)
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from ...decoding.draft_depth import Depth
from ...decoding.drafters.speculation import Speculation
from ...decoding.pace import PromptPace
from ...model.cache import Cache, tokens_held
from ...model.quantized_kv import NOT_QUANTIZED, KVQuantization, in_rows, out_of_rows
from ...model.qwen3_next import Model
from . import DECODE_CONCURRENCY
from .batched_drafters import DrafterRow, Drafters, InformingModel, without_drafters
from .lone_sequence import Entry, Generated, LoneSequence, Responses


def most_together(asked: int | None, model: Model) -> int:
    """Returns how many sequences to decode together; ``asked`` is what the user says, if anything.

    By default there is one where experts are read from disk, since several want more of them.
    """
    return asked or (DECODE_CONCURRENCY if model.streamed is None else 1)


class SpeculativeBatchGenerator(BatchGenerator):
    """mlx-lm's BatchGenerator; a sequence that is alone decodes with drafts.

    A cache, taken or given, is a list with an entry a layer, then the MTP head's if it is kept.

    Args:
        depth: chooses who drafts and how many tokens.
        quantization: of keys and values; with it the sequences of a batch attend one after the
            other, since mlx-lm's quantized caches have no batched form.
        pace: sizes the chunks of prompts; by default they have the full ``prefill_step_size``.
        options: those of mlx-lm's BatchGenerator.
    """

    def __init__(
        self,
        model: Model,
        depth: Depth,
        quantization: KVQuantization = NOT_QUANTIZED,
        pace: PromptPace | None = None,
        **options: Any,
    ):
        informing: Any = InformingModel(model)
        self._entries: dict[int, Entry] = {}  # the live sequences
        self._alone: LoneSequence | None = None
        self._pace = pace or PromptPace()
        self._are_tokens_waiting = False
        self._chunk: int | None = None  # tokens of each prompt that this step reads, once chosen
        self._held = 0  # tokens before the chunk, of the longest prompt
        self._lm, self.depth, self._quantization = model, depth, quantization
        super().__init__(informing, **options)

    def close(self) -> None:
        """Closes as mlx-lm's does. This thread gives up the live sequence, not the collector's."""
        alone, self._alone = self._alone, None
        if alone is not None:
            alone.give_up()
        super().close()

    def insert_segments(  # type: ignore[override]
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int],
        caches: Sequence[Cache | None],
        all_tokens: list[list[int]],
        samplers: list[Sampler],
        logits_processors: list[list[LogitsProcessor]],
        stop_sequences: list[StopSequences],
    ) -> list[int]:
        """Inserts as mlx-lm's does; a given cache is advanced in place."""
        with_drafters = [self._with_drafters(cache) for cache in caches]
        options = samplers, logits_processors, stop_sequences
        uids = super().insert_segments(segments, max_tokens, with_drafters, all_tokens, *options)
        lengths = [sum(map(len, parts)) for parts in segments]
        entries = map(Entry, uids, lengths, max_tokens, *options)
        self._entries |= {entry.uid: entry for entry in entries}
        return uids

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[Cache, list[int]]]:
        """The caches of sequences whose prompts are being processed, and the tokens in them.

        They may be in use, so they are to be read at once and not kept.
        """
        caches = super().extract_cache(uids)
        alone = self._alone
        if alone is not None and alone.entry.uid in uids:
            caches[alone.entry.uid] = alone.cache, alone.tokens
        return {uid: (without_drafters(cache), tokens) for uid, (cache, tokens) in caches.items()}

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
        for uid in uids:
            self._entries.pop(uid, None)
        return caches

    @property
    def prefill_step_size(self) -> int:
        """Tokens of each prompt that are processed at a time, the same for all of one step.

        They are no more than the shortest prompt's segment has left: mlx-lm pads the others to the
        longest, in time and memory.
        """
        if self._chunk is None:
            left = [len(segments[0]) for segments, *_ in self._currently_processing]
            streams = self._are_tokens_waiting or len(self._generation_batch) > 0
            self._held = max(map(len, self._prompt_batch.tokens), default=0)
            prompts = max(len(left), 1)
            self._chunk = self._pace.size(self._step_size, self._held, prompts, streams=streams)
            helds = map(len, self._prompt_batch.tokens)
            limits = [self._quantization.limited(self._chunk, held) for held in helds]
            self._chunk = min([self._chunk, *left, *limits])
        return self._chunk

    @prefill_step_size.setter
    def prefill_step_size(self, tokens: int) -> None:
        self._step_size = tokens

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of the live sequences' caches."""
        alone = () if self._alone is None else self._alone.cache
        return super().prompt_cache_nbytes + sum(c.nbytes for c in alone)

    def _next(self) -> Responses:
        reported: list[Generated] = []
        if self._alone is None:
            self._alone = self._take()
        elif self._unprocessed_sequences:
            reported = self._give_back()
        if self._alone is None:
            prompted, generated = self._next_of_batch(bool(reported))
            for response in generated:
                self._entries[response.uid].generated += 1
                if response.prompt_cache is not None:
                    response.prompt_cache = without_drafters(response.prompt_cache)
        else:
            prompted, generated = self._alone.next()
            if self._alone.finished:
                self._alone = None
        for response in reported + generated:
            if response.finish_reason is not None:
                del self._entries[response.uid]
        return prompted, reported + generated

    def _next_of_batch(self, are_tokens_waiting: bool) -> Responses:
        """mlx-lm's step: a token of each stream, and a chunk of the prompts."""
        # Tokens are reported after the chunk, the last ones of streams that end in this step too.
        self._are_tokens_waiting = are_tokens_waiting or len(self._generation_batch) > 0
        self._chunk = None
        self._pace.start()
        responses = super()._next()
        if self._chunk is not None:
            self._pace.stop(self._chunk, self._held, len(self._currently_processing))
        return responses

    def _make_batch(self, n: int) -> PromptProcessingBatch:
        batch = super()._make_batch(n)
        self._chunk = None  # it was chosen without the prompts that read along from now on
        return batch

    def _with_drafters(self, cache: Cache | None) -> Cache:
        layers = len(self._lm.layers)
        cache = self._lm.make_cache() if cache is None else cache
        speculation = Speculation.of(self._lm)
        head = cache[layers:] or speculation.head_cache(self.depth)
        if self._lm.dflash is not None:
            head = []  # it is not used, and would fall behind
        used = [] if self.depth.idle("mtp") else head
        drafters = speculation.drafters(self.depth, used, tokens_held(cache[:layers]))
        trunk = in_rows(cache[:layers], self._quantization)
        return [*trunk, Drafters([DrafterRow(drafters, head)])]

    # --- between the batch and the lone sequence -------------------------------------------------
    def _take(self) -> LoneSequence | None:
        """Takes the one live sequence out of the batch; None if there are more or none."""
        if len(self._entries) != 1:
            return None
        (entry,) = self._entries.values()
        generating, segments, matcher, chosen = self._generation_batch, [], None, None
        if len(generating):
            (matcher,) = generating._matchers
            chosen = generating._next_tokens, generating._next_logprobs[0]
        elif self._currently_processing:
            ((segments, *_),) = self._currently_processing
        else:
            ((_, segments, *_),) = self._unprocessed_sequences
        cache, tokens = super().extract_cache([entry.uid])[entry.uid]
        super().remove([entry.uid])
        return LoneSequence(
            self._lm,
            entry,
            out_of_rows(cache),
            tokens,
            segments,
            depth=self.depth,
            step_size=self._step_size,
            pace=self._pace,
            quantization=self._quantization,
            matcher=matcher,
            chosen=chosen,
        )

    def _give_back(self) -> list[Generated]:
        """Moves the lone sequence into the batch; returns what it still had to report."""
        assert self._alone is not None
        alone, self._alone = self._alone, None
        reported, entry = alone.leave(), alone.entry
        cache = in_rows(alone.cache, self._quantization)
        if alone.finished:
            return reported
        if not alone.is_decoding:
            options = entry.sampler, entry.processors, entry.stop
            self._unprocessed_sequences.appendleft(
                (entry.uid, alone.segments, entry.max_tokens, cache, alone.tokens, *options)
            )
            return reported
        batch = GenerationBatch(
            self.model,
            [entry.uid],
            mx.array([alone.last], mx.uint32),
            [c.merge([c]) for c in cache],
            [alone.tokens],
            [entry.sampler],
            self.sampler,
            [entry.processors],
            [entry.stop],
            [entry.max_tokens - entry.generated],
        )
        batch._matchers = [alone.matcher]
        self._generation_batch.extend(batch)
        return reported
