"""The next layer's experts, read ahead: the same results, and only where it makes steps shorter."""

import random
import time

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import bundled, greedy
from helpers_streamed import reading_ahead, streamed

from mlx_qwen3next import generate_step
from mlx_qwen3next.model.streamed import read_ahead
from mlx_qwen3next.model.streamed.layer_slots import LayerSlots
from mlx_qwen3next.model.streamed.read_ahead import ReadAhead
from mlx_qwen3next.model.streamed.slots import Slots
from mlx_qwen3next.storage.reading import Reader, Reading

PROMPT = list(range(200, 230))


def check_tokens(model):
    assert greedy(model, PROMPT, 12) == greedy(bundled()[0], PROMPT, 12)


def check_two_texts(model):
    """Steps of two texts in turn, left lazy for as long as possible."""
    tokens = np.random.default_rng(1).integers(0, 300, (10, 2)).tolist()

    def run(model):
        caches = [model.make_cache() for _ in range(2)]
        return [model(mx.array([[row[i]]]), caches[i]) for row in tokens for i in range(2)]

    for a, b in zip(run(model), run(bundled()[0]), strict=True):
        assert mx.array_equal(a, b)


def slow(monkeypatch):
    """Reads come late, and in another order than they were started."""
    read, reading, numbers = Reader.read, Reader.reading, random.Random(0)

    def late(reader, run):
        time.sleep(numbers.random() ** 8 / 50)
        return read(reader, run)

    def shuffled(reader, pieces):
        found = reading(reader, pieces)
        numbers.shuffle(found._runs)
        return found

    monkeypatch.setattr(Reader, "read", late)
    monkeypatch.setattr(Reader, "reading", shuffled)


@pytest.mark.parametrize(("check", "size"), [(check_tokens, 4), (check_two_texts, 12)])
def test_results_are_those_of_the_model_in_memory(check, size, monkeypatch):
    slow(monkeypatch)
    model = reading_ahead(size)
    check(model)
    counts = model.streamed.counts()
    assert counts.misses > counts.foreseen > 0


@pytest.mark.parametrize("options", [{"mtp": 3, "temp": 0.9}, {"mtp": 2}], ids=str)
def test_rounds_of_drafts_are_the_same(options):
    found = []
    for model in (bundled()[0], reading_ahead(6)):
        mx.random.seed(3)
        steps = [*generate_step(PROMPT, model, max_tokens=12, **options)]
        found.append([(step.token, step.from_draft) for step in steps])
    assert found[0] == found[1]


def late(monkeypatch):
    """Nothing is read before it is waited for; so no wrong guess is there in time."""
    wait, start = Reading.wait, Reading.start

    def started(reading):
        start(reading)
        wait(reading)

    monkeypatch.setattr(Reading, "start", lambda reading: None)
    monkeypatch.setattr(Reading, "wait", started)


def abandoned(monkeypatch):
    """A wrong guess is forgotten, and written when another expert has its slot."""
    given_up, finish = [], Slots.finish

    def finished(slots, transfer):
        finish(slots, transfer)
        while given_up:
            given_up.pop().wait()

    monkeypatch.setattr(Reading, "give_up", lambda reading: given_up.append(reading))
    monkeypatch.setattr(Slots, "finish", finished)


def soon(monkeypatch):
    """A guess counts as there while its reading goes on."""

    def received(slots, wanted):
        for transfer in slots._coming:
            slots.owner[transfer.slots] = transfer.experts
            slots.table[transfer.experts] = transfer.slots
        slots._coming.clear()
        return []

    monkeypatch.setattr(LayerSlots, "_receive", received)


def unread(monkeypatch):
    """A guess takes the slot of an expert whose results are still to be computed."""
    start = Slots.start

    def started(slots, stored, experts, numbers):
        slots._readers.clear()
        return start(slots, stored, experts, numbers)

    monkeypatch.setattr(Slots, "start", started)


DEFECTS = {abandoned: check_tokens, soon: check_tokens, unread: check_two_texts}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect, monkeypatch):
    late(monkeypatch)
    DEFECTS[defect](reading_ahead(5))
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        DEFECTS[defect](reading_ahead(5))


def test_more_than_half_of_the_guesses_are_right(monkeypatch):
    """By chance a fourth would be: 4 of 16 experts."""
    guesses, right, wanted = {}, 0, 0
    expect, hold = LayerSlots.expect, LayerSlots._hold

    def expected(slots, experts):
        guesses[slots] = set(experts.tolist())
        expect(slots, experts)

    def held(slots, experts):
        nonlocal right, wanted
        if (guess := guesses.pop(slots, None)) is not None:
            right += len(guess.intersection(experts.tolist()))
            wanted += len(experts)
        hold(slots, experts)

    monkeypatch.setattr(LayerSlots, "expect", expected)
    monkeypatch.setattr(LayerSlots, "_hold", held)
    model = reading_ahead(12)
    greedy(model, PROMPT, 12)
    assert wanted > 100 and right > wanted / 2


def first_slots(model):
    return model.layers[0].mlp.slots


def end(slots):
    """Waits until all is read that is on its way."""
    for transfer in slots._coming:
        with transfer.reading._changed:
            transfer.reading._wait_while(lambda transfer=transfer: not transfer.reading.is_done)


def test_a_guess_that_is_not_wanted_stays_if_it_has_been_read():
    slots = first_slots(streamed(8))
    slots._hold(np.arange(4))
    for _ in range(2):  # the second time one is on its way, or there
        slots.expect(np.array([7, 9]))
    end(slots)
    slots._hold(np.array([5]))
    assert not slots._coming and sorted(slots.owner[slots.owner >= 0]) == [0, 1, 2, 3, 5, 7, 9]
    assert (slots.table[slots.owner[slots.owner >= 0]] == np.nonzero(slots.owner >= 0)[0]).all()
    assert (slots.hits, slots.misses, slots.foreseen) == (0, 5, 0)
    slots._hold(np.array([7, 9]))
    assert (slots.hits, slots.misses, slots.foreseen) == (2, 5, 0)


def test_a_prompt_waits_for_guesses_or_gives_them_up(monkeypatch):
    model, reference = streamed(5), bundled()[0]
    slots, numbers = first_slots(model), np.random.default_rng(0)
    slow(monkeypatch)
    for seed in range(6):
        mx.random.seed(seed)
        x, residual = (mx.random.normal((1, 40, model.args.hidden_size)) for _ in range(2))
        slots.expect(numbers.permutation(16)[:2])
        y = model.layers[0].mlp(x, residual)
        assert mx.array_equal(y, reference.layers[0].mlp(x, residual))
        assert not slots._coming


def test_experts_are_read_ahead_where_steps_are_shorter_for_it(monkeypatch):
    """And the other way is tried again from time to time."""
    now, ahead = 0.0, ReadAhead()
    monkeypatch.setattr(read_ahead, "BLOCK", 40)
    monkeypatch.setattr(read_ahead.time, "perf_counter", lambda: now)

    def share(seconds, steps=5 * 2 * read_ahead.AGAIN):
        """The share of steps with reading ahead, which take ``seconds[1]`` a layer."""
        nonlocal now
        number = 0
        for _ in range(steps):
            now += 100  # a pause before the first layer, which does not count
            ahead.note(10, True)
            number += ahead.is_on
            for _ in range(2):
                now += seconds[ahead.is_on]
                ahead.note(10, False)
        return number / steps

    for seconds, is_better in (((2, 1), True), ((1, 1.5), False), ((2, 1), True)):
        share(seconds)
        found = share(seconds)
        assert found > 0.9 if is_better else 0 < found < 0.1
    assert not ReadAhead().is_on


def test_a_guess_that_fails_is_read_again_when_it_is_wanted(monkeypatch):
    model, guesses, failed = reading_ahead(5), [], []
    read, expect, reading = Reader.read, LayerSlots.expect, Reader.reading

    def expected(slots, experts):
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "reading", noted)
            expect(slots, experts)
        for found in failed:
            with found._changed:
                found._wait_while(lambda found=found: found._left > 0)

    def noted(reader, pieces):
        found = reading(reader, pieces)
        guesses.extend(map(id, found._runs))
        failed.append(found)  # keeps the runs, so that no other gets their numbers
        return found

    def failing(reader, run):
        if id(run) in guesses:
            raise OSError("no luck")
        return read(reader, run)

    monkeypatch.setattr(Reader, "read", failing)
    monkeypatch.setattr(LayerSlots, "expect", expected)
    check_tokens(model)
    assert model.streamed.counts().foreseen == 0 and guesses
