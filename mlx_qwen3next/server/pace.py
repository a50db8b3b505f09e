"""The sizes of the chunks in which prompts are read, chosen by measured time.

While a chunk is read the live streams stand still, and the server notices neither new requests nor
lost clients.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from ..group import ALONE, Group

PATIENCE = 2.0  # seconds a chunk may take where no stream waits for it
FIRST = 64  # tokens of the first chunk, before anything is measured
LEAST = 16  # tokens; the sizes are multiples of it, so that few different shapes occur
# Of the time, since a chunk takes longer than the one before it, which had fewer tokens to attend.
MARGIN = 0.85
_RECENT = 3  # chunks that the next one is judged by


class PromptPace:
    """Measures how fast prompts are read, and sizes their next chunk by it.

    The next chunk is judged by the last ones, whichever prompts they belong to: the time a token
    takes grows with the context, and slowly. The time of a chunk includes what streams wait for
    besides, such as their own decoding step.

    Args:
        max_stall: seconds that a chunk may take beside live streams. A chunk that no stream waits
            for may take 2 seconds, or ``max_stall`` if that is more. Infinity, the default,
            measures nothing, and all chunks have full size.
        group: the processes that run the model; rank 0 decides.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        max_stall: float = math.inf,
        group: Group = ALONE,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._max_stall, self._group, self._clock = max_stall, group, clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens, seconds
        self._started = 0.0

    def size(self, full: int, prompts: int = 1, *, streams: bool = False) -> int:
        """Returns how many tokens of each prompt to read in the next chunk, alike on all ranks.

        Args:
            full: the most tokens of a prompt; fewer than 16 only if this is.
            prompts: how many are read together.
            streams: whether live streams wait for the chunk.
        """
        if self._max_stall == math.inf:
            return full
        limit = self._max_stall if streams else max(self._max_stall, PATIENCE)
        size = int(min(full, self._tokens_in(limit) / prompts))
        if size < full:
            size = min(full, max(size // LEAST, 1) * LEAST)
        return self._group.decide("chunk", size)

    def start(self) -> None:
        """Starts the measurement of a chunk."""
        self._started = self._clock()

    def stop(self, tokens: int) -> None:
        """Ends the measurement of a chunk of so many tokens, of all its prompts together."""
        if tokens >= LEAST:  # fewer say little: they take a step's time
            self._recent.append((tokens, self._clock() - self._started))

    def _tokens_in(self, seconds: float) -> float:
        """How many tokens can be read in that time, at the pace of the slowest recent chunk."""
        if not self._recent:
            return FIRST
        paces = [tokens / measured if measured else math.inf for tokens, measured in self._recent]
        return MARGIN * seconds * min(paces)
