"""The sequence that is alone: outside mlx-lm's batch, so that it decodes with drafts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch, StopSequences
from mlx_lm.sample_utils import LogitsProcessor, Sampler

from ...decoding.draft_depth import Depth
from ...decoding.pace import PromptPace
from ...decoding.sampling import Chooser, SeededSampler
from ...decoding.sequence import TokenSequence
from ...decoding.speculative import Token
from ...model.cache import Cache
from ...model.quantized_kv import KVQuantization
from ...model.qwen3_next import Model
from .batched_drafters import without_drafters

Prompted = PromptProcessingBatch.Response
Generated = GenerationBatch.Response
Responses = tuple[list[Prompted], list[Generated]]


@dataclass
class Drafted(Generated):
    """A token of a round that began with drafts."""

    source: str = ""  # who drafted
    is_draft: bool = False  # whether the token was one of the drafts
    drafted: int = 0  # how many drafts there were, told with the round's first token


@dataclass
class Entry:
    """A sequence of the batch, wherever it is computed."""

    uid: int
    prompt_tokens: int  # that were not in its cache at the beginning
    max_tokens: int
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: StopSequences
    generated: int = 0  # tokens


class LoneSequence(TokenSequence):
    """The only live sequence: gives mlx-lm's responses, a prompt's chunk or a token at a time.

    Args:
        entry: the sequence.
        cache: an entry a layer, then Drafters; advanced in place.
        held: the tokens in the cache.
        segments: the prompt's tokens still to be fed; the last segment is one token.
        step_size: prompt tokens read at a time, at most.
        pace: sizes the chunks of the prompt.
        matcher: of the stop sequences, in the state it has; by default at the beginning.
        chosen: the token ``[1]`` that the batch chose last, and its log-probabilities ``[vocab]``,
            if it has begun to decode there.
    """

    def __init__(
        self,
        model: Model,
        entry: Entry,
        cache: Cache,
        held: list[int],
        segments: list[list[int]],
        *,
        depth: Depth,
        step_size: int,
        pace: PromptPace,
        quantization: KVQuantization,
        matcher: StopSequences.Matcher | None = None,
        chosen: tuple[mx.array, mx.array] | None = None,
    ):
        self._chosen: Token | None = None
        if chosen is not None:
            token, logprobs = int(cast(int, chosen[0].item())), chosen[1]
            segments, self._chosen = [[token]], Token(token, logprobs, False)
        super().__init__(
            model,
            cache,
            held,
            segments,
            depth=depth,
            drafters=cache[-1].rows[0].drafters,
            step_size=step_size,
            pace=pace,
            quantization=quantization,
        )
        self.entry, self.cache, self._group = entry, cache, model.group
        self.matcher = entry.stop.matcher() if matcher is None else matcher
        self._steps: Generator[Token] | None = None
        self.finished = self._is_in_round = False

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
            return [Prompted(entry.uid, (entry.prompt_tokens,) * 2, True, True)], []
        segment_ended = self.read()
        processed = entry.prompt_tokens - sum(map(len, self.segments))
        return [Prompted(entry.uid, (processed, entry.prompt_tokens), segment_ended, False)], []

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
        if self.matcher.advance(token.token):
            reason = "stop"
        response = Generated(entry.uid, token.token, token.logprobs, reason, None, None)
        if token.source is not None:
            drafted = 0 if self._is_in_round else token.drafted
            response = Drafted(
                **vars(response), source=token.source, is_draft=token.from_draft, drafted=drafted
            )
        self._is_in_round = token.from_draft
        if reason is not None:
            self.close()
            response.prompt_cache = without_drafters(self.cache)
            response.all_tokens = self.tokens
        return response
