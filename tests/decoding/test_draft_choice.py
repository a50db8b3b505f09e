"""Who drafts, and how many tokens, on simulated machines with a copying drafter and a head."""

import random

import pytest

from mlx_qwen3next.decoding.draft_depth import DecidedDepth, FixedDepth, MeasuredDepth, Offer
from mlx_qwen3next.decoding.drafters.lookup import DEPTHS, LookupDrafter

ROWS = {
    "a large model": [1 + 0.25 * n**0.7 for n in range(16)],  # seconds by drafts, in plain steps
    "even": [1 + 0.3 * n for n in range(16)],
    "dear": [1 + 1.1 * n for n in range(16)],
}
HEAD = 0.05  # what a draft of the head costs besides
RIGHT = 0.6  # of its drafts


class Text:
    """A text that repeats itself in parts: new words, and copies of what was said before."""

    def __init__(self, copied, seed=0):
        self.copied, self.random, self.tokens, self.source = copied, random.Random(seed), [0, 1], 0

    def next(self):
        if self.source == 0 and self.random.random() < self.copied:
            self.source = self.random.randrange(2, len(self.tokens)) if len(self.tokens) > 2 else 0
        if self.source and self.random.random() < 0.04:
            self.source = 0  # an edit
        token = self.tokens[self.source] if self.source else self.random.randrange(2000)
        self.source += self.source > 0
        self.tokens.append(token)
        return token


class Machine:
    """Decodes a text in simulated time, in rounds that a controller chooses."""

    def __init__(self, times, text, head=False, controller=None):
        self.controller, self.times, self.text = controller or MeasuredDepth(), times, text
        self.copying, self.head, self.random = LookupDrafter(), head, random.Random(5)
        self.copying.follow(text.tokens)
        self.rounds = []

    def run(self, count):
        """The share of the time that plain decoding would have taken."""
        seconds = said = 0
        ahead = [self.text.next() for _ in range(20)]
        while said < count:
            offers = [self.copying.offer()]
            if self.head:
                offers.append(Offer("mtp", [RIGHT] * 8, range(1, 9)))
            which, depth = self.controller.choose(offers, 100)
            source = offers[which].source if depth else ""
            accepted, took = 0, self.times[depth]
            if source == "mtp":
                took += HEAD * depth
                while accepted < depth and self.random.random() < RIGHT:
                    accepted += 1
            elif depth:
                drafts = self.copying._copier.expected(depth)
                same = [a == b for a, b in zip(drafts, ahead, strict=False)]
                accepted = [*same, False].index(False)
            took *= 1 + 0.1 * self.random.expovariate(1)
            self.controller.record(source, depth, took if depth else self.times[0] * 1.1)
            for token in ahead[: accepted + 1]:
                self.copying.extend(token)
            ahead = ahead[accepted + 1 :] + [self.text.next() for _ in range(accepted + 1)]
            self.rounds.append((source, depth, accepted))
            seconds, said = seconds + took, said + accepted + 1
        return seconds / (1.1 * self.times[0] * said)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("copied", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("times", ROWS.values(), ids=ROWS)
def test_it_never_loses(times, copied, seed):
    assert Machine(times, Text(copied, seed)).run(2000) < 1.02


@pytest.mark.parametrize("name, most", [("a large model", 0.55), ("even", 0.75)])
def test_copies_pay_where_the_text_repeats_itself(name, most):
    machine = Machine(ROWS[name], Text(0.5))
    machine.run(500)
    assert machine.run(3000) < most
    depths = {depth for source, depth, _ in machine.rounds[-200:] if source == "lookup"}
    assert len(depths) > 1  # as long as the match has earned
    assert depths <= set(DEPTHS)


def test_all_depths_have_a_price_after_few_measurements():
    controller = MeasuredDepth()
    machine = Machine(ROWS["a large model"], Text(0.5), controller=controller)
    machine.run(600)
    machine.copying.follow([*machine.text.tokens[:5000], 1, 2, 3, 4, *range(40), *range(35)])
    promises = controller.explain(machine.copying.offer())
    assert [promise.depth for promise in promises] == [0, *DEPTHS]
    assert all(promise.timed for promise in promises)


def test_a_depth_that_was_not_timed_takes_as_much_more_as_the_one_before():
    controller = MeasuredDepth()
    for source, depth, seconds in [("", 0, 1.0)] * 5 + [("lookup", 1, 1.5)] * 2:
        controller.record(source, depth, seconds)
    plain, timed, guessed = controller.explain(COPY)
    assert (plain.seconds, timed.seconds, timed.timed) == (1.0, 1.5, True)
    assert (guessed.depth, guessed.seconds, guessed.timed) == (3, 2.5, False)
    assert guessed.tokens == pytest.approx(1 + 0.9 + 0.81 + 0.729)


@pytest.mark.parametrize("name", ["a large model", "even"])
def test_the_head_drafts_where_there_is_nothing_to_copy(name):
    alone, both = Machine(ROWS[name], Text(0.1)), Machine(ROWS[name], Text(0.1), head=True)
    for machine in (alone, both):
        machine.run(1000)
    before = len(both.rounds)
    assert both.run(3000) < alone.run(3000)
    assert {source for source, *_ in both.rounds[before:]} >= {"lookup", "mtp"}


# --- depths that are given ----------------------------------------------------------------------
COPY, NONE = Offer("lookup", [0.9] * 15, DEPTHS, False), Offer("lookup", [], DEPTHS, False)
HEADS = Offer("mtp", [0.9] * 8, range(1, 9))


def test_given_depths():
    both = FixedDepth(3, lookup=5)
    assert both.choose([COPY, HEADS], 20) == (0, 5)
    assert both.choose([COPY, HEADS], 2) == (0, 2)
    assert both.choose([NONE, HEADS], 20) == (1, 3)
    assert both.choose([NONE], 20)[1] == both.choose([COPY, HEADS], 0)[1] == 0
    assert FixedDepth(3).choose([COPY, HEADS], 20) == (1, 3)
    assert [FixedDepth(0, 5).idle(source) for source in ("mtp", "lookup")] == [True, False]


class Last:
    """Always the last offer."""

    def __init__(self):
        self.asked = []

    def idle(self, source):
        return source == "mtp"

    def choose(self, offers, room):
        self.asked.append([offer.source for offer in offers])
        return len(offers) - 1, min(2, room)


@pytest.mark.parametrize(
    "depth, lookup, offers, expected, asked",
    [
        (None, None, [COPY, HEADS], (1, 2), ["lookup", "mtp"]),
        (None, 0, [COPY, HEADS], (1, 2), ["mtp"]),
        (None, 5, [NONE, HEADS], (1, 2), ["mtp"]),
        (0, None, [COPY, HEADS], (0, 2), ["lookup"]),
    ],
)
def test_a_given_depth_and_a_measured_one(depth, lookup, offers, expected, asked):
    measured = Last()
    fixed = FixedDepth(depth, lookup, measured)
    assert fixed.choose(offers, 20) == expected
    assert measured.asked == [asked]
    assert fixed.idle("mtp") and fixed.idle("lookup") == (lookup == 0)


def test_a_given_depth_comes_before_a_measured_one():
    measured = Last()
    assert FixedDepth(None, 5, measured).choose([COPY, HEADS], 20) == (0, 5)
    assert measured.asked == []


def test_one_process_decides_for_all():
    decisions = []

    def decide(name, value):
        decisions.append((name, value))
        return False if name == "idle" else (1, 4)

    depth = DecidedDepth(FixedDepth(3, lookup=5), decide)
    assert depth.choose([COPY, HEADS], 20) == (1, 4) and not depth.idle("mtp")
    assert decisions == [("depth", (0, 5)), ("idle", False)]
