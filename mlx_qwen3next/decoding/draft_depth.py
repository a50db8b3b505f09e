"""Choosing who drafts and how many tokens, from measured time and acceptance; nobody is a choice.

Each drafter of a sequence offers drafts, with the share of them that is right, as far as it knows:
a_1, a_2, … given that those before were. A round of depth k takes T(k) seconds, which depend on the
drafter, and gives 1 + a_1 + a_1 a_2 + … + a_1…a_k tokens. The best round has the most tokens a
second. Only few depths of a drafter are timed, each once the one before it was; then again rarely.
Where verifying a draft takes longer than two plain steps, no acceptance can make up for it, so a
drafter that is costly to keep is left alone for a long while.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

MAX_DEPTH = 8  # of the MTP head
MOST_COPIED = 15  # tokens of a round: with the last one they fill the kernels' rows

WEIGHT = 2.0  # what is expected of a draft counts as much as so many drafts
FADING = 0.995  # what a token leaves of the weight of everything seen before it
MARGIN = 1.05  # how many times the tokens a second of plain decoding drafting has to promise
SAMPLES = 7  # times kept of a depth; their median counts
RECENT = 2  # of them that still count when a depth is timed after a long while
FIRST = 4  # plain steps timed before the first draft, to compare with
PROBE = 256  # passes of the trunk after which the next depth is timed again…
EARLY = 32  # or so many, in the beginning, where a slow moment counts most
HOPELESS = 4096  # …and after which a hopeless case is looked at again


class Offer(NamedTuple):
    """A drafter's drafts after the sequence's last token, as it expects them."""

    source: str  # of the drafts
    shares: Sequence[float]  # how often each draft is right where those before it are; none if ()
    depths: Sequence[int]  # of rounds that are worth timing, from the shallowest to the deepest
    costly: bool = True  # whether the drafter has work to do for tokens that it did not draft


class Depth(Protocol):
    """Chooses who drafts, and how many tokens."""

    def idle(self, source: str) -> bool:
        """Whether a source will draft nothing for a long while, so that nothing need be prepared.

        Asked of costly sources alone.
        """

    def choose(self, offers: Sequence[Offer], room: int) -> tuple[int, int]:
        """The next round: an offer, by its place, and the depth, 0 for a plain step.

        Args:
            room: the most drafts that are of use, which may be 0.
        """

    def record(self, source: str, depth: int, seconds: float | None) -> None:
        """Takes account of a round of that depth, or of a plain step, whose depth is 0.

        Args:
            seconds: that the round took; None where they say nothing, as for the first plain step
                after a round and the head's first round after plain steps.
        """


class FixedDepth:
    """Depths that are given: the first source that has drafts is the one.

    Args:
        depth: of all sources but the next; None for what ``measured`` chooses.
        lookup: of the drafters that copy, or know from a grammar; None likewise.
        measured: chooses among the sources without a depth, where the others have no drafts.
    """

    def __init__(
        self, depth: int | None = 0, lookup: int | None = 0, measured: Depth | None = None
    ):
        self._depth, self._lookup, self._measured = depth, lookup, measured

    def _of(self, source: str) -> int | None:
        return self._lookup if source in ("lookup", "grammar") else self._depth

    def idle(self, source: str) -> bool:
        depth = self._of(source)
        if depth is None and self._measured is not None:
            return self._measured.idle(source)
        return not depth

    def choose(self, offers: Sequence[Offer], room: int) -> tuple[int, int]:
        free = []
        for which, offer in enumerate(offers):
            depth = self._of(offer.source)
            if depth is None:
                free.append(which)
            elif drafts := min(depth, len(offer.shares), room):
                return which, drafts
        if not free or self._measured is None:
            return 0, 0
        which, depth = self._measured.choose([offers[i] for i in free], room)
        return free[which], depth

    def record(self, source: str, depth: int, seconds: float | None) -> None:
        if self._measured is not None:
            self._measured.record(source, depth, seconds)


class DecidedDepth:
    """A depth that one of several processes decides for all, although each measures its own time.

    Args:
        decide: takes the name of the decision and this process's choice; returns the choice of all.
    """

    def __init__(self, depth: Depth, decide: Callable[[str, Any], Any]):
        self._depth, self._decide = depth, decide
        self.record = depth.record

    def idle(self, source: str) -> bool:
        return self._decide("idle", self._depth.idle(source))

    def choose(self, offers: Sequence[Offer], room: int) -> tuple[int, int]:
        return self._decide("depth", self._depth.choose(offers, room))


class Shares:
    """How often drafts of several kinds were right, of late; a kind is a number."""

    def __init__(self, kinds: int):
        self._right = [0.0] * kinds  # faded counts
        self._asked = [0.0] * kinds

    def fade(self) -> None:
        """Counts what was seen for less, since there is one more token."""
        self._right = [x * FADING for x in self._right]
        self._asked = [x * FADING for x in self._asked]

    def add(self, kind: int, right: bool) -> None:
        """Counts a draft of a kind."""
        self._asked[kind] += 1
        self._right[kind] += right

    def of(self, kind: int, guess: float) -> float:
        """The share of right drafts of a kind, which ``guess`` is taken for as long as few came."""
        return (self._right[kind] + WEIGHT * guess) / (self._asked[kind] + WEIGHT)


class Promise(NamedTuple):
    """The expected result of a round."""

    depth: int
    seconds: float  # of the round
    tokens: float  # that it gives, on average
    timed: bool  # whether the seconds were measured, not guessed


class _Times:
    """The times of rounds of one source and depth."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=SAMPLES)
        self.warm = False  # whether the first round, slower, is over
        self.last = 0  # after how many passes one was timed last


class MeasuredDepth:
    """The round with the most tokens a second, by what was measured (see the module's text).

    A model has one, kept by its :class:`Speculation`; it is not for several threads.
    """

    def __init__(self) -> None:
        self._plain = _Times()
        self._rounds: defaultdict[tuple[str, int], _Times] = defaultdict(_Times)
        self._idle_until: dict[str, int] = {}  # of sources that were hopeless
        self._passes = 0

    def idle(self, source: str) -> bool:
        return self._passes < self._idle_until.get(source, 0)

    def choose(self, offers: Sequence[Offer], room: int) -> tuple[int, int]:
        if len(self._plain.seconds) < FIRST:
            return 0, 0
        promises = [self._promises(offer, room) for offer in offers]
        best, most = (0, 0), MARGIN / self._step
        for which, rounds in enumerate(promises):
            for promise in rounds:
                if promise.tokens / promise.seconds > most:
                    best, most = (which, promise.depth), promise.tokens / promise.seconds
        if self._is_stale(self._plain):
            return 0, 0
        return self._probe(offers, promises, best) or best

    def _probe(
        self, offers: Sequence[Offer], promises: list[list[Promise]], best: tuple[int, int]
    ) -> tuple[int, int] | None:
        """The next deeper round than the best one, if it is long that it was timed."""
        for which, offer in enumerate(offers):
            deeper = [p.depth for p in promises[which] if p.depth > best[1]]
            if not deeper or (best[1] > 0 and which != best[0]):
                continue
            times = self._rounds[offer.source, deeper[0]]
            # Once more, too, before nothing is drafted for long.
            if self._is_stale(times) or (len(times.seconds) == 1 and self._is_hopeless(offer)):
                return which, deeper[0]
        return None

    def record(self, source: str, depth: int, seconds: float | None) -> None:
        times = self._rounds[source, depth] if depth else self._plain
        was_stale = self._is_stale(times)
        self._passes += 1
        if times.warm and seconds is not None:
            if was_stale:
                # The machine's pace may be another by now. Plain steps, which all else is compared
                # with, are timed FIRST times again.
                recent = list(times.seconds)[-RECENT:] if depth else []
                times.seconds = deque(recent, maxlen=SAMPLES)
            times.seconds.append(seconds)
            times.last = self._passes
        times.warm = True

    def explain(self, offer: Offer) -> list[Promise]:
        """The promise of a plain step, and of the depths of an offer that may be chosen.

        Empty as long as no plain step was timed.
        """
        if not self._plain.seconds:
            return []
        return [Promise(0, self._step, 1.0, True), *self._promises(offer, len(offer.shares))]

    @property
    def _step(self) -> float:
        """Seconds of a plain step."""
        return median(self._plain.seconds)

    def _is_stale(self, times: _Times) -> bool:
        """Whether it is long that a round was timed; in the beginning, not so long."""
        return self._passes - times.last >= min(PROBE, EARLY + self._passes // 4)

    def _is_hopeless(self, offer: Offer) -> bool:
        """Whether no acceptance could make up for the time of a drafter's first round."""
        first = offer.depths[0]
        times = self._rounds[offer.source, first].seconds
        return offer.costly and bool(times) and min(times) > (first + 1) * self._step

    def _promises(self, offer: Offer, room: int) -> list[Promise]:
        """What rounds to the depths of an offer promise, as far as one depth beyond those timed.

        A depth that was not timed takes as much more than the one before as that one did.
        """
        first = self._rounds[offer.source, offer.depths[0]].seconds
        if self._is_hopeless(offer) and len(first) > 1:
            self._idle_until[offer.source] = self._passes + HOPELESS
            first.clear()
        if offer.costly and self.idle(offer.source):
            return []
        result: list[Promise] = []
        share = tokens = 1.0
        before, seconds, slope = 0, self._step, 0.0  # at the depth before, and from the one before
        for depth in offer.depths:
            if depth > min(room, len(offer.shares)):
                break
            for each in offer.shares[before:depth]:
                share *= each
                tokens += share
            times = self._rounds[offer.source, depth].seconds
            after = median(times) if times else seconds + slope * (depth - before)
            slope = max(after - seconds, 0.0) / (depth - before)
            before, seconds = depth, after
            result.append(Promise(depth, seconds, tokens, bool(times)))
            if not times:
                break
        return result
