"""The depth controller on simulated machines: known times and acceptance, a known best depth."""

import copy
import random

import pytest

from mlx_qwen3next.decoding.draft_depth import MAX_DEPTH, FixedDepth, MeasuredDepth
from mlx_qwen3next.decoding.drafters.mtp import MTPDrafter, new_shares

# Seconds of a round at depth 0…8, in plain steps.
CHEAP = [1.0] + [1.2 + 0.15 * k for k in range(1, 9)]  # a large model on a GPU
DEAR = [1.0] + [1.0 + 1.3 * k for k in range(1, 9)]  # verifying costs as much as decoding
EVEN = [1.0] + [1.0 + 0.5 * k for k in range(1, 9)]


class Machine:
    """Decodes in simulated time, whatever depth the controller chooses."""

    def __init__(self, controller, times, acceptance, noise=0.1, seed=0):
        self.controller, self.times, self.acceptance = controller, times, acceptance
        self.drafter = MTPDrafter.__new__(MTPDrafter)  # what it knows of its drafts, no head
        self.drafter._shares = new_shares()
        self.noise, self.random = noise, random.Random(seed)
        self.depths, self.seconds, self.tokens = [], 0.0, 0

    def run(self, tokens):
        """The share of the time that plain decoding would have taken."""
        goal, since = self.tokens + tokens, self.seconds
        while self.tokens < goal:
            depth = self.choose(goal - self.tokens - 1)
            accepted = 0
            while accepted < depth and self.random.random() < self.acceptance:
                accepted += 1
            seconds = self.times[depth] * (1 + self.noise * self.random.expovariate(1))
            changed = not self.depths or (depth > 0) != (self.depths[-1] > 0)
            self.drafter.judged(depth, accepted)
            for _ in range(accepted + 1):
                self.drafter.extend(0)
            self.controller.record("mtp", depth, None if changed else seconds)
            self.depths.append(depth)
            self.seconds += seconds
            self.tokens += accepted + 1
        return (self.seconds - since) / tokens / (self.times[0] * (1 + self.noise))

    def choose(self, room):
        """The depth that the controller chooses."""
        return self.controller.choose([self.drafter.offer()], room)[1]

    def best(self):
        """The least share at any fixed depth."""
        a = self.acceptance
        length = [sum(a**j for j in range(k + 1)) for k in range(MAX_DEPTH + 1)]
        return min(t / n for t, n in zip(self.times, length, strict=True)) / self.times[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("times", [CHEAP, EVEN, DEAR], ids=["cheap", "even", "dear"])
@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.5, 0.7, 0.9])
def test_it_comes_near_the_best_depth_and_never_loses(times, acceptance, seed):
    machine = Machine(MeasuredDepth(), times, acceptance, seed=seed)
    share = machine.run(2000)
    assert share < 1.03
    assert share < 1.12 * machine.best()


@pytest.mark.parametrize("acceptance", [0.3, 0.9, 1.0])
def test_where_it_cannot_pay_it_settles_at_nothing(acceptance):
    controller = MeasuredDepth()
    machine = Machine(controller, DEAR, acceptance)
    assert machine.run(256) < 1.03
    assert controller.idle("mtp")
    tried = len(machine.depths)
    machine.run(3000)
    assert set(machine.depths[tried:]) == {0}
    # And looks again, once in a long while.
    machine.times = CHEAP
    machine.run(3000)
    assert not controller.idle("mtp")
    assert max(machine.depths[-50:]) > 0


def test_it_follows_the_text():
    """From prose that cannot be guessed to code that can, and back."""
    machine = Machine(MeasuredDepth(), CHEAP, 0.1)
    machine.run(1000)
    machine.acceptance = 0.9
    machine.run(400)
    assert machine.run(400) < 1.25 * machine.best()
    machine.acceptance = 0.1
    machine.run(400)
    assert machine.run(400) < 1.05


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_beginning_is_soon_forgotten(seed):
    """The machine was busy with something else while plain steps were timed first."""
    slow = [2.5, *DEAR[1:]]
    machine = Machine(MeasuredDepth(), slow, 0.5, seed=seed)
    machine.run(8)
    machine.times = [1.0, 1.8, *DEAR[2:]]  # one draft loses 20 %
    machine.run(150)
    assert machine.run(300) < 1.03


def test_it_follows_the_machine():
    machine = Machine(MeasuredDepth(), CHEAP, 0.7)
    machine.run(1000)
    machine.times = DEAR
    machine.run(1000)
    assert machine.run(500) < 1.03


@pytest.mark.parametrize("times", [EVEN, DEAR])
def test_it_forgets_a_slow_beginning(times):
    """While weights came from disk, say, and plain steps took three times as long."""
    machine = Machine(MeasuredDepth(), [3.0, *times[1:]], 0.5)
    machine.run(10)
    machine.times = times
    machine.run(1000)
    assert machine.run(2000) < 1.03 * min(1, machine.best()) + 0.02


def test_one_slow_round_does_not_decide():
    controller = MeasuredDepth()
    machine = Machine(controller, CHEAP, 0.8)
    machine.run(500)
    depth, other = machine.choose(8), copy.deepcopy(machine)
    assert depth > 0
    controller.record("mtp", depth, machine.times[depth])
    other.controller.record("mtp", depth, 100.0)
    assert 0 < machine.choose(8) - 1 <= other.choose(8) <= machine.choose(8) + 1


def test_rounds_that_tell_nothing_of_time_count_for_acceptance_alone():
    controller = MeasuredDepth()
    for _ in range(20):
        controller.record("", 0, None)
    assert Machine(controller, CHEAP, 0.8).choose(8) == 0  # still nothing to compare with


@pytest.mark.parametrize("depth", range(MAX_DEPTH + 1))
@pytest.mark.parametrize("room", [0, 1, 5, 100])
def test_no_draft_beyond_the_last_token(depth, room):
    machine = Machine(MeasuredDepth(), CHEAP, 0.9)
    assert FixedDepth(depth).choose([machine.drafter.offer()], room) == (0, min(depth, room))
    machine.run(300)
    assert machine.choose(room) <= room


def test_it_says_what_the_depths_promise():
    controller = MeasuredDepth()
    machine = Machine(controller, CHEAP, 0.8, noise=0)
    assert controller.explain(machine.drafter.offer()) == []
    machine.run(2000)
    promises = controller.explain(machine.drafter.offer())
    timed = [promise for promise in promises if promise.timed]
    assert [promise.seconds for promise in timed] == CHEAP[: len(timed)]
    assert len(timed) > 3 and len(promises) in (len(timed), len(timed) + 1)
    assert promises[0].tokens == 1
    assert promises[1].tokens == pytest.approx(1.8, abs=0.15)
    assert promises[2].tokens == pytest.approx(1 + 0.8 + 0.64, abs=0.3)
