"""The chunks of prompts take no longer than they may, and their sizes change no token."""

import functools
import itertools
import math
import random

import pytest
from helpers_caches import assert_holds
from helpers_generate import golden, greedy
from helpers_serving import Sequences

from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.pace import FIRST, FIRST_ALONE, LEAST, PromptPace
from mlx_qwen3next.group import Group
from mlx_qwen3next.model.qwen3_next import Trunk
from mlx_qwen3next.model.reading import Reading

FULL = 160  # tokens of a chunk at most


def model():
    """Its head is often right, but not always."""
    return golden("permutation")[0]


@functools.cache
def prompt(n, seed=7):
    rng = random.Random(seed)
    return [rng.randrange(96) for _ in range(n)]


class Counted(Reading):
    """A token takes the work of the tokens before it, times ``growth``, and one more."""

    growth = 0.0

    def multiply_adds(self, tokens, held):
        return tokens * (1 + self.growth * held) + self.growth * tokens**2 / 2

    def scratch(self, tokens, held):
        return tokens * (100 + held)


def counted(room=math.inf):
    return Counted(None, 4, room, in_pieces=True)


class Clock:
    """A clock that only forwards advance: by a hundredth of a second, and a time a token.

    Attributes:
        chunks: the chunks of prompts: (number of prompts, tokens of each, seconds).
    """

    def __init__(self, monkeypatch, token=0.01):
        self.now, self.token, self.chunks = 0.0, token, []
        call = Trunk.__call__

        def timed(trunk, tokens, *args):
            seconds = 0.01 + self.token * tokens.size
            self.now += seconds
            if tokens.shape[1] > 1:
                self.chunks.append((*tokens.shape, seconds))
            return call(trunk, tokens, *args)

        monkeypatch.setattr(Trunk, "__call__", timed)

    def pace(self, max_stall):
        return PromptPace(counted(), max_stall, clock=lambda: self.now)

    @property
    def sizes(self):
        return [tokens for _, tokens, _ in self.chunks]


def begin(sequences, uid):
    """Steps until a sequence has told its first token."""
    while not sequences.told[uid]:
        sequences.step()


def test_alone_a_chunk_has_full_size_if_it_takes_no_more_than_two_seconds(monkeypatch):
    clock = Clock(monkeypatch)
    pace = clock.pace(0.5)
    sequences = Sequences(model(), FixedDepth(0), step_size=FULL, pace=pace)
    sequences.insert(prompt(700), 1)
    sequences.run()
    assert clock.sizes == [*[FULL] * 4, 699 - 4 * FULL]
    clock.token = 0.02
    clock.chunks.clear()
    sequences.insert(prompt(700, seed=8), 1)
    sequences.run()
    assert all(1.5 <= seconds <= 2 for *_, seconds in clock.chunks[3:-1])


def test_beside_a_stream_a_chunk_takes_no_longer_than_it_may(monkeypatch):
    """The stream tells a token between any two chunks. Whatever is slow is read in least chunks."""
    clock = Clock(monkeypatch)
    sequences = Sequences(model(), FixedDepth(0), step_size=FULL, pace=clock.pace(0.5))
    first = sequences.insert(prompt(9), 200)
    begin(sequences, first)
    clock.chunks.clear()
    second = sequences.insert(prompt(700), 1)
    while second in sequences.live():
        prompted, generated = sequences.step()
        assert not prompted or first in [response.uid for response in generated]
    assert all(0.3 <= seconds <= 0.5 for *_, seconds in clock.chunks[1:-1])
    clock.token = 10.0
    clock.chunks.clear()
    begin(sequences, sequences.insert(prompt(200), 1))
    assert set(clock.sizes[1:-1]) == {LEAST}


@pytest.mark.parametrize("depth", [0, 3])
def test_the_last_token_of_a_stream_waits_no_longer_either(monkeypatch, depth):
    """Tokens are told after the chunk of their step, when their stream may have ended already."""
    for last in range(1, 9):  # ended in the batch, or while it moves there
        clock = Clock(monkeypatch)
        sequences = Sequences(model(), FixedDepth(depth), step_size=FULL, pace=clock.pace(0.3))
        first = sequences.insert(prompt(9), 12)
        while len(sequences.told[first]) < 12 - last:
            sequences.step()
        sequences.insert(prompt(700), 1)
        while first in sequences.live():
            before = len(clock.chunks)
            sequences.step()
        seconds = [s for *_, s in clock.chunks[before:] if s > 0.1]  # but for drafts
        assert len(seconds) <= 1 and sum(seconds) <= 0.7
        monkeypatch.undo()


def test_prompts_that_are_read_together_share_the_time(monkeypatch):
    clock = Clock(monkeypatch)
    sequences = Sequences(model(), FixedDepth(0), step_size=FULL, pace=clock.pace(1.0))
    begin(sequences, sequences.insert(prompt(2), 100))
    clock.chunks.clear()
    for seed in (8, 9):
        sequences.insert(prompt(500, seed), 3)
    sequences.run()
    assert {prompts for prompts, *_ in clock.chunks} == {2}
    assert all(0.5 <= seconds <= 1.0 for *_, seconds in clock.chunks[1:-1])


def test_the_first_chunk_is_short():
    pace = clockless()
    assert [pace.size(2048, streams=streams) for streams in (False, True)] == [FIRST_ALONE, FIRST]
    assert pace.size(2048, 0, 4, streams=True) == FIRST // 4
    assert pace.size(10) == 10


def clockless(room=math.inf, growth=0.0):
    """A pace at which every chunk seems to take a second."""
    reading = counted(room)
    object.__setattr__(reading, "growth", growth)
    ticks = itertools.count()
    return PromptPace(reading, 0.5, clock=lambda: float(next(ticks)))


def test_a_chunk_shrinks_as_the_text_before_it_grows():
    """It is judged by the work of the chunks before, which had fewer tokens before them."""
    pace = clockless(growth=0.01)
    pace.start()
    pace.stop(1000, 0)  # 6000 a second
    sizes = [pace.size(8192, held) for held in (0, 1000, 10_000, 100_000)]
    assert sizes == [1328, 688, 96, LEAST]
    for size, held in zip(sizes, (0, 1000, 10_000), strict=False):
        assert 0.75 <= pace._reading.multiply_adds(size, held) / 6000 / 2 <= 0.85


def test_a_chunk_fits_the_memory_whatever_time_it_takes():
    pace = clockless(room=1e6)
    for _ in range(2):
        assert [pace.size(512, held) for held in (0, 4900, 50_000)] == [512, 192, LEAST]
        assert pace.size(512, 4900, 2) == 96
        pace.start()
        pace.stop(10**6)


def test_a_pace_without_a_reading_measures_nothing():
    pace = PromptPace()
    pace.stop(1)
    assert [pace.size(n, streams=True) for n in (1, 100, 2048)] == [1, 100, 2048]


def test_ranks_read_chunks_of_rank_0_s_size():
    """Their own measurements differ, and do not count."""

    class Follower(Group):
        rank, size = 1, 2

        def decide(self, what, value):
            assert what == "chunk" and value != 48
            return 48

    pace = PromptPace(counted(), 0.5, Follower(), clock=iter([0.0, 100.0]).__next__)
    assert pace.size(2048) == 48
    pace.start()
    pace.stop(48)
    assert pace.size(2048, 3, streams=True) == 48


def test_a_batch_tells_how_much_text_is_before_a_chunk():
    class Told(PromptPace):
        def size(self, full, held=0, prompts=1, **_):
            told.append(held)
            return 16

        def stop(self, tokens, held=0, prompts=1):
            assert (held, prompts) == (told[-1], 1)

    told = []
    sequences = Sequences(model(), FixedDepth(0), step_size=FULL, pace=Told())
    begin(sequences, sequences.insert(prompt(5), 40))
    told.clear()
    begin(sequences, sequences.insert(prompt(60), 1))
    assert told[:5] == [0, 0, 16, 32, 48]  # the first one was chosen without the prompt


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_of_any_size_give_the_same_tokens(depth, seed):
    rng = random.Random(seed)

    class Random(PromptPace):
        def size(self, *_, **__):
            return rng.randint(1, 6)

    sequences = Sequences(model(), FixedDepth(depth), pace=Random())
    expected = {}
    for n in rng.sample((1, 2, 9, 17, 6, 30), 6):
        uid = sequences.insert(prompt(n), 10, cuts=[n // 2] if n > 1 else [])
        expected[uid] = greedy(model(), prompt(n), 10, mtp="off")
        for _ in range(rng.randrange(8)):
            sequences.step()
    assert sequences.run() == expected
    for uid, end in sequences.ends.items():
        assert end.all_tokens == sequences.text(uid)
        assert_holds(model(), end.prompt_cache, end.all_tokens, depth > 0)
