"""Choosing how many tokens to draft, from measured time and acceptance; none is a choice too.

A round of depth k takes T(k) seconds and gives 1 + a_1 + a_1 a_2 + … + a_1…a_k tokens, with a_j the
share of drafts at depth j that are right, given that those before were. The best depth has the
most tokens a second. Acceptance fades towards an optimistic guess, so that a depth given up is
tried again when the text may have changed; times, which change little, are measured again rarely.
Where verifying one draft takes longer than two plain steps, no acceptance can make up for it, so
nothing is drafted for a long while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple, Protocol

MAX_DEPTH = 8

ACCEPTANCE = 0.8  # what is expected of a draft before anything is known…
WEIGHT = 2.0  # …which counts as much as so many drafts
FADING = 0.995  # what a token leaves of the weight of everything seen before it
MARGIN = 1.05  # how many times the tokens a second of plain decoding drafting has to promise
SAMPLES = 7  # times kept of a depth; their median counts
RECENT = 2  # of them that still count when a depth is timed after a long while
FIRST = 4  # plain steps timed before the first draft, to compare with
PROBE = 256  # tokens after which the time of the next depth is measured again…
EARLY = 32  # or so many, in the beginning, where a slow moment counts most
HOPELESS = 4096  # …and after which a hopeless case is looked at again


class Depth(Protocol):
    """Chooses how many tokens to draft."""

    @property
    def idle(self) -> bool:
        """Whether nothing will be drafted for a long while, so that nothing need be prepared."""

    def choose(self, room: int) -> int:
        """The next round's depth, 0 to 8 and at most ``room``, which may be 0."""

    def record(self, depth: int, accepted: int, seconds: float | None) -> None:
        """Takes account of a round of that depth.

        Args:
            accepted: drafts that were right.
            seconds: that the round took; None where they say nothing, as for the first plain step
                after a round and the first round after plain steps.
        """


class FixedDepth:
    """Always the same depth."""

    def __init__(self, depth: int):
        self._depth = depth
        self.idle = depth == 0

    def choose(self, room: int) -> int:
        return min(self._depth, room)

    def record(self, depth: int, accepted: int, seconds: float | None) -> None:
        pass


class DecidedDepth:
    """A depth that one of several processes decides for all, although each measures its own time.

    Args:
        decide: takes the name of the decision and this process's choice; returns the choice of all.
    """

    def __init__(self, depth: Depth, decide: Callable[[str, Any], Any]):
        self._depth, self._decide = depth, decide
        self.record = depth.record

    @property
    def idle(self) -> bool:
        return self._decide("idle", self._depth.idle)

    def choose(self, room: int) -> int:
        return self._decide("depth", self._depth.choose(room))


class Promise(NamedTuple):
    """The expected result of a round of one depth."""

    seconds: float  # of the round
    tokens: float  # that it gives, on average
    timed: bool  # whether the seconds were measured, not guessed


class MeasuredDepth:
    """The depth with the most tokens a second, by what was measured (see the module's text).

    A model has one, kept by its :class:`Speculation`; it is not for several threads.
    """

    def __init__(self) -> None:
        self._seconds: list[deque[float]] = [deque(maxlen=SAMPLES) for _ in range(MAX_DEPTH + 1)]
        self._warm = [False] * (MAX_DEPTH + 1)  # whether a depth's first round, slower, is over
        self._right = [0.0] * MAX_DEPTH  # faded counts: drafts at a depth that were right…
        self._asked = [0.0] * MAX_DEPTH  # …among those whose predecessors were
        self._tokens = self._idle_until = 0
        self._measured = [0] * (MAX_DEPTH + 1)  # after how many tokens a depth was last timed

    @property
    def idle(self) -> bool:
        return self._tokens < self._idle_until

    def choose(self, room: int) -> int:
        if len(self._seconds[0]) < FIRST or self.idle:
            return 0
        best = self._best()
        if len(self._seconds[1]) == 1 and self._hopeless():
            best = 1  # once more, before nothing is drafted for long
        elif self._stale(0):
            best = 0
        elif best < MAX_DEPTH and self._stale(best + 1):
            best += 1
        return min(best, room)

    def _stale(self, depth: int) -> bool:
        """Whether it is long that a depth was timed; in the beginning, not so long."""
        return self._tokens - self._measured[depth] >= min(PROBE, EARLY + self._tokens // 4)

    def _hopeless(self) -> bool:
        """Whether no acceptance could make up for the time of a round."""
        return min(self._seconds[1]) > 2 * self._time(0)

    def record(self, depth: int, accepted: int, seconds: float | None) -> None:
        fading = FADING ** (accepted + 1)
        self._right = [x * fading for x in self._right]
        self._asked = [x * fading for x in self._asked]
        for j in range(min(accepted + 1, depth)):
            self._asked[j] += 1
            self._right[j] += j < accepted
        was_stale = self._stale(depth)
        self._tokens += accepted + 1
        if self._warm[depth] and seconds is not None:
            if was_stale:
                # The machine's pace may be another by now. Plain steps, which all else is compared
                # with, are timed FIRST times again.
                recent = list(self._seconds[depth])[-RECENT:] if depth else []
                self._seconds[depth] = deque(recent, maxlen=SAMPLES)
            self._seconds[depth].append(seconds)
            self._measured[depth] = self._tokens
            if depth == 1 and len(self._seconds[1]) > 1 and self._hopeless():
                self._idle_until = self._tokens + HOPELESS
                self._seconds[1].clear()
        self._warm[depth] = True

    def explain(self) -> list[Promise]:
        """The promise of each depth, from 0 to one beyond the deepest that was timed.

        Empty as long as no plain step was timed.
        """
        return list(self._promises()) if self._seconds[0] else []

    def _best(self) -> int:
        """The depth that promises most, at most one deeper than what has been timed."""
        best, most = 0, MARGIN / self._time(0)
        for depth, (seconds, tokens, _) in enumerate(self._promises()):
            if depth > 0 and tokens / seconds > most:
                best, most = depth, tokens / seconds
        return best

    def _promises(self) -> Iterator[Promise]:
        yield Promise(self._time(0), 1.0, True)
        tokens = share = 1.0
        guess = ACCEPTANCE
        for depth in range(1, MAX_DEPTH + 1):
            guess = (self._right[depth - 1] + WEIGHT * guess) / (self._asked[depth - 1] + WEIGHT)
            share *= guess
            tokens += share
            timed = bool(self._seconds[depth])
            yield Promise(self._time(depth), tokens, timed)
            if not timed:
                break

    def _time(self, depth: int) -> float:
        """Seconds of a round: measured, or as much more than the depth before as that was more."""
        if self._seconds[depth]:
            return median(self._seconds[depth])
        before = self._time(depth - 1)
        return before if depth == 1 else max(before, 2 * before - self._time(depth - 2))
