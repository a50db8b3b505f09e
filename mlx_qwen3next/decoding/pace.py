"""The sizes of the chunks in which prompts are read, chosen by measured time and by memory.

A chunk is what cannot be interrupted: live streams stand still while it is read, Ctrl-C waits, and
a server notices neither new requests nor lost clients.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from ..checkpoint.loading import default_dtype
from ..group import ALONE, Group
from ..model.qwen3_next import Model
from ..model.reading import Reading

PATIENCE = 2.0  # seconds a chunk may take where no stream waits for it
MAX_STALL = 0.5  # seconds it may take where one does, unless the user says otherwise
FIRST, FIRST_ALONE = 64, 512  # tokens of the first chunk, before anything is measured
LEAST = 16  # tokens; the sizes are multiples of it, so that few different shapes occur
# Of the time, since a chunk may take longer than its multiplications say.
MARGIN = 0.85
_RECENT = 3  # chunks that the next one is judged by


class PromptPace:
    """Measures how fast prompts are read, and sizes their next chunk by it.

    The time of the next chunk follows from its multiplications, whose number grows with the
    context, at the pace of the slowest of the last chunks, whichever prompts they belong to. Their
    time includes what streams wait for besides, such as their own decoding step. A chunk has no
    more tokens than fit the memory, either, if that leaves at least 16.

    Args:
        reading: counts what chunks take. None, the default, measures nothing, and all chunks have
            full size.
        max_stall: seconds that a chunk may take beside live streams. A chunk that no stream waits
            for may take 2 seconds, or ``max_stall`` if that is more. Infinity leaves it to the
            memory alone to limit chunks.
        group: the processes that run the model; rank 0 decides.
        recent: multiply-adds and seconds of the last chunks, which are kept up to date.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        reading: Reading | None = None,
        max_stall: float = MAX_STALL,
        group: Group = ALONE,
        recent: deque[tuple[int, float]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._reading, self._max_stall, self._group = reading, max_stall, group
        self._recent = deque[tuple[int, float]](maxlen=_RECENT) if recent is None else recent
        self._clock, self._started = clock, 0.0

    @classmethod
    def of(
        cls, model: Model, max_stall: float = MAX_STALL, *, quantized: bool = False
    ) -> PromptPace:
        """Makes a pace that knows what was measured of this model before.

        Args:
            quantized: whether keys and values will be.
        """
        if model.streamed is not None:
            max_stall = math.inf  # a chunk of any size reads nearly all experts
        recent = vars(model).setdefault("_recent_chunks", deque(maxlen=_RECENT))
        reading = Reading.here(model.args, default_dtype().size, quantized)
        return cls(reading, max_stall, model.group, recent)

    def size(self, full: int, held: int = 0, prompts: int = 1, *, streams: bool = False) -> int:
        """Returns how many tokens of each prompt to read in the next chunk, alike on all ranks.

        Args:
            full: the most tokens of a prompt; fewer than 16 only if this is.
            held: the tokens before the chunk, of the longest prompt.
            prompts: how many are read together.
            streams: whether live streams wait for the chunk.
        """
        if self._reading is None:
            return full
        if self._max_stall == math.inf:
            work, most = math.inf, full
        elif self._recent:
            limit = self._max_stall if streams else max(self._max_stall, PATIENCE)
            pace = min(work / seconds for work, seconds in self._recent)
            work, most = MARGIN * limit * pace, full
        else:
            work, most = math.inf, min(full, (FIRST if streams else FIRST_ALONE) // prompts)
        size = self._reading.most(work, held, most, prompts)
        if size < full:
            size = min(full, max(size // LEAST, 1) * LEAST)
        return self._group.decide("chunk", size)

    def start(self) -> None:
        """Starts the measurement of a chunk."""
        self._started = self._clock()

    def stop(self, tokens: int, held: int = 0, prompts: int = 1) -> None:
        """Ends the measurement of a chunk; the arguments are those of :meth:`size`."""
        seconds = self._clock() - self._started
        # Few tokens say little: they take a step's time.
        if self._reading is not None and tokens * prompts >= LEAST and seconds > 0:
            self._recent.append((prompts * self._reading.multiply_adds(tokens, held), seconds))
