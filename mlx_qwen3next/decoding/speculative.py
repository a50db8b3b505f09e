"""Speculative decoding: a round proposes, verifies, accepts and commits.

A *round* drafts k tokens, runs the trunk once over the last token and the drafts, and yields the
drafts that are what plain decoding would have chosen, then one token of the trunk's own. The host
waits for the device once a round: what follows each prefix of the drafts is chosen in advance.
At depth 0 decoding is plain, with step n + 1 queued while n runs. Several drafters may follow a
sequence; whose turn it is, and for how many tokens, is chosen before each round.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; how a draft is
judged is in :mod:`mlx_qwen3next.decoding.sampling`, how states roll back in
:mod:`mlx_qwen3next.model.cache`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from ..compute import proof
from ..model.cache import Cache, Round, Undo, settle
from ..model.qwen3_next import Model
from .draft_depth import Depth
from .drafters import Drafter, Outputs
from .queueing import CHUNK, layers_at_once
from .sampling import Chooser

CLEAR_EVERY = 256  # tokens between two returns of unused buffers, as in mlx-lm


@dataclass
class Token:
    """One generated token."""

    token: int
    logprobs: mx.array  # [vocab]
    from_draft: bool
    drafted: int = 0  # how many tokens were drafted for the round that gave it
    source: str | None = None  # who drafted them


class Acceptance:
    """Counts right and wrong drafts, from the tokens as they come.

    Attributes:
        rounds: passes of the trunk, plain steps included.
        accepted: right drafts by their source, for every source that drafted.
        drafted: all its drafts, likewise.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.accepted, self.drafted = Counter[str](), Counter[str]()
        self._tokens = 0
        self._run = 0  # drafts of the round so far
        self._asked = Counter[int]()  # drafts at a depth whose predecessors were right…
        self._right = Counter[int]()  # …and those among them that were, too

    def add(self, token: Token) -> None:
        """Takes account of the next token."""
        self._tokens += 1
        if self._run == 0:
            self.rounds += 1
            if token.source is not None:
                self.drafted[token.source] += token.drafted
        if token.from_draft or token.drafted > self._run:
            self._asked[self._run] += 1
            self._right[self._run] += token.from_draft
        if token.source is not None:
            self.accepted[token.source] += token.from_draft
        self._run = self._run + 1 if token.from_draft else 0

    @property
    def mean_length(self) -> float:
        """Tokens a pass of the trunk gave on average."""
        return self._tokens / max(self.rounds, 1)

    @property
    def by_depth(self) -> tuple[float, ...]:
        """The share of right drafts at each depth, of those whose predecessors were right."""
        return tuple(self._right[depth] / n for depth, n in sorted(self._asked.items()))


@dataclass
class _Step:
    """A plain step on its way: ``input`` ``[1]`` was fed, ``token`` ``[1]`` follows."""

    input: mx.array
    hidden: mx.array  # for the drafters
    token: mx.array
    logprobs: mx.array
    undo: Undo


def forward(
    model: Model, cache: Cache, tokens: mx.array, drafters: Sequence[Drafter]
) -> tuple[mx.array, mx.array]:
    """The trunk's hidden states ``[1, n, H]`` at ``tokens`` ``[n]``, and what the drafters read.

    The device starts on the first layers while the host still builds the last ones.
    """
    outputs = Outputs(drafters)
    hidden = model.model(tokens[None], cache, handing_over(len(tokens), outputs))
    return hidden, outputs.of(hidden)


def handing_over(
    rows: int, then: Callable[[int, mx.array], None]
) -> Callable[[int, mx.array], None]:
    """Returns a function that hands the layers of a forward over to the device.

    Of a prompt's chunk the device has one layer at a time, so that the next takes the same memory.

    Args:
        rows: tokens of the forward, of all sequences together.
        then: called likewise, with the number and the output of each layer but the last.
    """
    layers = layers_at_once(rows)
    before: list[mx.array] = []

    def start(layer: int, x: mx.array) -> None:
        then(layer, x)
        if layer % layers == layers - 1:
            if rows >= CHUNK:
                mx.eval(before)
                before[:] = [x]
            mx.async_eval(x)

    return start


class Decoding:
    """The decoding of one sequence.

    Args:
        cache: the trunk's; holds everything before ``token``.
        token: the prompt's last, ``[1]`` uint32.
        chooser: chooses the tokens; knows the whole prompt.
        depth: chooses who drafts and how many tokens.
        drafters: those that follow the sequence; they know it up to ``token``.
        keep_drafters: whether they have to be told of every token, for their next user.
        before_forward: called before the cache grows.
        limited: returns how many of the next tokens may share a forward, at least 1.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        token: mx.array,
        chooser: Chooser,
        depth: Depth,
        drafters: Sequence[Drafter] = (),
        keep_drafters: bool = True,
        before_forward: Callable[[], None] = lambda: None,
        limited: Callable[[int], int] = lambda tokens: tokens,
    ):
        self._model, self._cache = model, cache
        self._unfed: mx.array | None = token  # part of the sequence, but not of the cache
        self._chooser, self._depth, self._drafters = chooser, depth, drafters
        self._keep_drafters = keep_drafters
        self._before_forward, self._limited = before_forward, limited
        self._since: float | None = None  # when the device was last waited for
        self._proofs = 0  # and how many proofs there were then
        self._last: Drafter | None = None  # who drafted the last round; None after a plain step
        self._all_right = True  # no draft of the last round was refused
        self._left = 0
        self._handed_over = False

    def tokens(self, count: int) -> Generator[Token]:
        """Yields the next ``count`` tokens.

        However it ends, the cache then holds every token yielded, the last one included, except
        after :meth:`hand_over`. Until then it may be in a round, and nobody else's to read.
        """
        self._left = count
        try:
            while self._left > 0 and not self._handed_over:
                drafter, depth = self._choose(self._left - 1)
                yield from self._plain() if drafter is None else self._round(drafter, depth)
        finally:
            self._rest()

    def hand_over(self) -> None:
        """Ends :meth:`tokens` soon: it yields what is chosen already, and feeds it but the last.

        Somebody else goes on from there, with that last token to feed.
        """
        self._handed_over = True

    def feed(self) -> None:
        """Feeds the last token where :meth:`tokens` has not: after :meth:`hand_over`, or if it
        never began."""
        self._handed_over = False
        self._rest()

    def _choose(self, room: int, ahead: bool = False) -> tuple[Drafter | None, int]:
        """Who drafts the next round, None for a plain step, and to which depth.

        Args:
            ahead: whether the sequence's last token is still on its way.
        """
        if not self._keep_drafters:  # those dropped here fall behind from now on
            self._drafters = [
                d for d in self._drafters if not (d.reads_states and self._depth.idle(d.source))
            ]
        if not self._drafters:
            return None, 0
        room = self._limited(room + 1) - 1
        which, depth = self._depth.choose([d.offer(ahead) for d in self._drafters], room)
        return self._drafters[which] if depth else None, depth

    def _round(self, drafter: Drafter, depth: int) -> Iterator[Token]:
        assert self._unfed is not None
        drafts = drafter.propose(self._unfed, depth, self._draft)
        mx.async_eval(drafts)  # those built ahead
        tokens, n = mx.concatenate([self._unfed, *drafts]), len(drafts)
        with Round(self._cache, n + 1) as transaction:
            final, hidden = self._forward(tokens)
            chosen, logprobs = self._chooser.choose_all(self._model.logits(final)[0], drafts)
            mx.async_eval(chosen, logprobs)
            # Drafts under a constraint have to wait for the tokens before them.
            if self._all_right and self._chooser.constraint is None:
                self._expect(drafter, tokens, hidden, chosen, drafts)
            # The one time a round that the host waits.
            values: Any = mx.concatenate([tokens, chosen]).tolist()
            drafted, answers = values[1 : n + 1], values[n + 1 :]
            accepted = next((i for i in range(n) if drafted[i] != answers[i]), n)
            drafter.judged(n, accepted)
            # What waits for a drafter of hidden states after others' rounds makes it slower.
            tells = n == depth and (self._last is drafter or not drafter.reads_states)
            self._record(drafter.source, n, tells)
            self._last, self._all_right = drafter, accepted == n
            yielded = 0
            try:
                for i in range(accepted + 1):
                    self._extend(answers[i])
                    yielded += 1
                    yield Token(answers[i], logprobs[i], i < accepted, n, drafter.source)
            finally:
                keep = 1 + min(yielded, accepted)
                transaction.commit(keep)
                self._committed(tokens[:keep], hidden[:, :keep])
                self._unfed = chosen[accepted : accepted + 1] if yielded > accepted else None

    def _expect(
        self,
        drafter: Drafter,
        tokens: mx.array,
        hidden: mx.array,
        chosen: mx.array,
        drafts: list[mx.array],
    ) -> None:
        """Has the next round's drafts built, in case that this one's are right again."""
        n = len(drafts)
        depth = min(n, self._left - n - 2)

        def draft(logits: mx.array, more: list[mx.array]) -> mx.array:
            return self._chooser.choose(logits, [*drafts, chosen[n:], *more])[0]

        if depth > 0:
            drafter.expect(tokens, hidden, chosen[n:], depth, draft)

    def _draft(self, logits: mx.array, drafts: list[mx.array]) -> mx.array:
        draft = self._chooser.choose(logits, drafts)[0]
        mx.async_eval(draft)  # while the rest is built
        return draft

    def _plain(self) -> Iterator[Token]:
        """Decodes plainly, until the depth is another."""
        assert self._unfed is not None
        step = self._step(self._unfed)
        self._committed(step.input, step.hidden)
        self._last = None
        pipelined = False  # whether the step was queued before the host waited for the one before
        while True:
            ahead, room = None, self._left - 2  # after this token and the next
            if room >= 0 and not self._handed_over:
                drafter, _ = self._choose(room, ahead=True)
                ahead = None if drafter else self._step(step.token, [step.token])
            yielded = False
            try:
                token = int(cast(int, step.token.item()))
                self._record("", 0, tells=pipelined)
                self._extend(token)
                self._unfed = step.token if ahead is None else None
                yielded = True
                yield Token(token, step.logprobs, False)
            finally:
                if ahead is not None and yielded:
                    self._committed(ahead.input, ahead.hidden)
                elif ahead is not None:
                    ahead.undo()
            if ahead is None:
                return
            step, pipelined = ahead, True

    def _step(self, token: mx.array, after: Sequence[mx.array] = ()) -> _Step:
        """Queues a plain step; ``after`` are the tokens ``[1]`` on their way."""
        with Undo(self._cache) as undo:
            final, hidden = self._forward(token)
            chosen, logprobs = self._chooser.choose(self._model.logits(final)[:, -1], after)
            mx.async_eval(chosen, logprobs)
        self._unfed = None
        return _Step(token, hidden, chosen, logprobs[0], undo)

    def _forward(self, tokens: mx.array) -> tuple[mx.array, mx.array]:
        self._before_forward()
        return forward(self._model, self._cache, tokens, self._drafters)

    def _committed(self, tokens: mx.array, hidden: mx.array) -> None:
        for drafter in self._drafters:
            drafter.committed(tokens, hidden)

    def _extend(self, token: int) -> None:
        self._chooser.extend(token)
        for drafter in self._drafters:
            drafter.extend(token)
        self._left -= 1
        if self._left % CLEAR_EVERY == 0:
            mx.clear_cache()

    def _record(self, source: str, depth: int, tells: bool) -> None:
        """Tells the depth's chooser how long it took since the device was last waited for."""
        now, proofs = time.perf_counter(), proof.proofs()
        tells = tells and proofs == self._proofs  # a kernel's proof takes far longer than a round
        seconds = now - self._since if tells and self._since is not None else None
        self._depth.record(source, depth, seconds)
        self._since, self._proofs = now, proofs

    def _feed(self) -> None:
        """Feeds the last token yielded, if that is still to be done here."""
        if self._unfed is None or self._handed_over:
            return
        with Undo(self._cache):
            _, hidden = self._forward(self._unfed)
        token, self._unfed = self._unfed, None
        self._committed(token, hidden)

    def _rest(self) -> None:
        try:
            self._finish()
        except KeyboardInterrupt:
            self._finish()
            raise

    def _finish(self) -> None:
        """Leaves all as it should be found; may be called again."""
        try:
            self._feed()
        finally:
            settle(self._cache)
            if self._keep_drafters:
                for drafter in self._drafters:
                    drafter.settle()
            self._chooser.close()
            mx.async_eval([c.state for c in self._cache])
