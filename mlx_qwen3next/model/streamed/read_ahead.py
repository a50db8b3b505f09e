"""Whether a layer's experts are read from disk while the layer before is computed."""

from __future__ import annotations

import time
from collections import deque

BLOCK = 4096  # wanted experts of a measurement: those of about eight tokens of the 80B model
AGAIN = 16  # blocks after which the other way is measured again


class ReadAhead:
    """Measures how long steps take with reading ahead and without, and chooses the shorter way.

    A right guess is there sooner, and a wrong one keeps the disk busy and takes another expert's
    place. Which counts for more depends on the disk, on memory and on the text.

    Attributes:
        is_on: whether experts are to be read ahead now.
    """

    def __init__(self) -> None:
        self.is_on = False
        # Seconds of a step, by wanted expert, in the last blocks.
        self._costs: dict[bool, deque[float]] = {way: deque(maxlen=2) for way in (False, True)}
        self._seconds, self._wanted, self._blocks = 0.0, 0, 0
        self._before = 0.0  # when the layer before had its experts

    def note(self, wanted: int, is_first: bool) -> None:
        """Takes note that a layer has got its wanted experts.

        Args:
            wanted: how many. is_first: whether the layer begins a step; time between steps does not
                count.
        """
        now = time.perf_counter()
        if not is_first:
            self._seconds += now - self._before
            self._wanted += wanted
        elif self._wanted >= BLOCK:
            self._costs[self.is_on].append(self._seconds / self._wanted)
            self._seconds, self._wanted, self._blocks = 0.0, 0, self._blocks + 1
            self.is_on = self._next()
        self._before = now

    def _next(self) -> bool:
        """Chooses the way of the next block."""
        without, with_it = self._costs[False], self._costs[True]
        if min(len(without), len(with_it)) < 2:
            return len(with_it) < len(without)
        is_shorter = sum(with_it) < sum(without)
        return is_shorter != (self._blocks % AGAIN == 0)
