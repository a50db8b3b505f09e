"""A text of thousands of tokens, with needles, against the float64 oracle.

`examples/long_prompts.py` does the same for up to 262,144 tokens.
"""

import itertools
import random

import long_text
import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen3next import load_model
from mlx_qwen3next.decoding import sequence as sequences
from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.pace import PromptPace
from mlx_qwen3next.decoding.sequence import TokenSequence
from mlx_qwen3next.model.cache import slots
from mlx_qwen3next.model.reading import MOST, Reading

LENGTH, MORE = 1200, 24
BOUND = 1e-4


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The model, the text, the oracle's logits after it, and what attention finds."""
    directory = tmp_path_factory.mktemp("long_text")
    long_text.write(directory)
    tokens = long_text.text(LENGTH, MORE)
    return (
        load_model(directory, dtype=mx.float32),
        tokens,
        *long_text.oracle(directory, tokens, MORE),
    )


def begin(case, pace=None, size=MOST):
    model, tokens, *_ = case
    segments = [tokens[:LENGTH].tolist(), tokens[LENGTH : LENGTH + 1].tolist()]
    cache = model.make_cache()
    return cache, TokenSequence(
        model, cache, [], segments, depth=FixedDepth(0), pace=pace, step_size=size
    )


def assert_continues(case, cache, together):
    """Checks the logits after the text, some of them computed together, the others one by one."""
    model, tokens, expected, _ = case
    more = mx.array(tokens[None, LENGTH:])
    parts = [more[:, :together], *mx.split(more[:, together:], MORE - together, axis=1)]
    logits = np.concatenate([model(part, cache)[0] for part in parts])
    errors = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() <= BOUND


def test_attention_finds_every_needle(case):
    """Without it the logits would be others."""
    *_, attended = case
    shares = long_text.NEEDLES.values()
    assert min(attended[i, int(LENGTH * share)] for i, share in enumerate(shares)) > 0.99


@pytest.mark.parametrize("size", [MOST, 37])
def test_chunks_of_one_size(case, size):
    cache, sequence = begin(case, size=size)
    ends = int(sequence.read())
    assert cache[3].keys.shape[2] == slots(LENGTH + 1)  # at once
    while sequence.is_reading:
        ends += sequence.read()
    assert ends == 1 and len(sequence.tokens) == LENGTH
    assert_continues(case, cache, together=12)


@pytest.mark.parametrize("seed", range(2))
def test_chunks_by_time_and_memory_and_an_interrupted_one(case, monkeypatch, seed):
    """The clock is a whim's. An interrupt comes in a layer of the third chunk."""
    rng = random.Random(seed)
    ticks = itertools.accumulate(rng.uniform(0.1, 4) for _ in itertools.count())
    reading = Reading(case[0].args, 4, 6e6, in_pieces=True)
    pace = PromptPace(reading, clock=lambda: next(ticks))
    cache, sequence = begin(case, pace)
    sizes, forward = [], sequences.forward
    while sequence.is_reading:
        held = len(sequence.tokens)
        if len(sizes) == 2:

            def interrupted(*args):
                forward(*args)
                raise KeyboardInterrupt

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(sequences, "forward", interrupted)
                sequence.read()
            assert len(sequence.tokens) == held
        sequence.read()
        sizes.append(len(sequence.tokens) - held)
        assert reading.scratch(sizes[-1], held) <= reading.room
    assert len(set(sizes)) > 4
    assert_continues(case, cache, together=1)
