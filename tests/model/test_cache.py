"""Rounds take back exactly what was not kept, and mlx-lm's cache tools work on our caches."""

import copy
import functools
import itertools
from pathlib import Path

import mlx.core as mx
import pytest
from float64 import relative_error
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from mlx_qwen3next import load_model
from mlx_qwen3next.compute.gated_delta import Tape
from mlx_qwen3next.model.cache import (
    GatedDeltaCache,
    Round,
    Undo,
    settle,
    tokens_held,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ["base", "eps"]  # taps 4 and 3, r = 2 and 3


@functools.cache
def model(case="base"):
    return load_model(GOLDENS / case)


@functools.cache
def tokens(case="base"):
    return mx.load(str(GOLDENS / case / "expected.safetensors"))["tokens"][None]


def filled(n, case="base"):
    """A cache that plain forwards filled with the first n tokens."""
    cache = model(case).make_cache()
    if n:
        model(case)(tokens(case)[:, :n], cache)
    return cache


def arrays(cache):
    """Every array a cache stands for: rows and states, keys and values up to the offset."""
    settle(cache)
    result = []
    for c in cache:
        if isinstance(c, GatedDeltaCache):
            result += c.cache
        else:
            result += c.keys_and_values() if tokens_held([c]) else []
    return [x for x in result if x is not None]


def assert_same(cache, expected, bound=1e-6):
    pairs = list(zip(arrays(cache), arrays(expected), strict=True))
    assert tokens_held(cache) == tokens_held(expected)
    for i, (x, y) in enumerate(pairs):
        assert x.shape == y.shape
        assert relative_error(x, y) <= bound, f"array {i}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", [0, 1, 2, 37])
@pytest.mark.parametrize("keep", range(6))
def test_a_round_keeps_its_prefix_and_nothing_else(case, start, keep):
    n = 5
    cache = filled(start, case)
    with Round(cache, n) as round:
        model(case)(tokens(case)[:, start : start + n], cache)
        round.commit(keep)
    assert_same(cache, filled(start + keep, case), 1e-5)
    following = tokens(case)[:, start + keep : start + keep + 3]
    expected = model(case)(following, filled(start + keep, case))
    assert relative_error(model(case)(following, cache), expected) <= 1e-5


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_rounds_in_every_order_leave_the_state_of_a_plain_run(order):
    """Lazy commits follow each other without a settle in between."""
    start, cache = 10, filled(10)
    for keep in order:
        with Round(cache, 4) as round:
            model()(tokens()[:, start : start + 4], cache)
            round.commit(keep)
        start += keep
    assert_same(cache, filled(start), 1e-5)


def test_a_round_s_logits_are_those_of_the_plain_forward():
    cache, n = filled(20), 6
    with Round(cache, n) as round:
        logits = model()(tokens()[:, 20 : 20 + n], cache)
        round.commit(0)
    expected = model()(tokens()[:, 20 : 20 + n], filled(20))
    assert relative_error(logits, expected) <= 1e-5


def test_replay_is_bit_identical_to_token_by_token_decoding():
    cache = filled(20)
    with Round(cache, 4) as round:
        model()(tokens()[:, 20:24], cache)
        round.commit(3)
    first = cache[0]
    tape, before = first._pending.tape, first.cache[1]
    settle(cache)
    S = before
    keys = mx.repeat(tape.k, tape.g.shape[2] // tape.k.shape[2], axis=2)
    for t in range(3):
        S = S * mx.exp(tape.g[:, t])[..., None, None]
        S = S + tape.delta[:, t, :, :, None] * keys[:, t, :, None, :]
    assert mx.array_equal(first.cache[1], S)


def test_an_exception_in_the_forward_takes_everything_back():
    """Whichever layer it happens in: some have a tape by then, some not."""
    for broken in range(len(model().layers)):
        cache = filled(12)

        class Fails(type(model().layers[broken])):
            def __call__(self, *args):
                raise RuntimeError("lost")

        layer = model().layers[broken]
        original = layer.__class__
        layer.__class__ = Fails
        try:
            with pytest.raises(RuntimeError, match="lost"), Round(cache, 3):
                model()(tokens()[:, 12:15], cache)
        finally:
            layer.__class__ = original
        assert_same(cache, filled(12))


def test_leaving_without_commit_keeps_nothing():
    cache = filled(12)
    with Round(cache, 3):
        model()(tokens()[:, 12:15], cache)
    assert_same(cache, filled(12))


def test_a_round_within_a_round_is_refused_and_harms_nothing():
    cache = filled(12)
    with Round(cache, 3) as round:
        model()(tokens()[:, 12:15], cache)
        with pytest.raises(RuntimeError, match="a round is open already"), Round(cache, 1):
            pass
        round.commit(2)
    assert_same(cache, filled(14), 1e-5)


def test_a_round_that_ran_no_forward_changes_nothing():
    cache = filled(12)
    with Round(cache, 3) as round:
        round.commit(0)
    assert_same(cache, filled(12))


def test_no_array_is_copied_for_a_round():
    """States and KV buffers of before are the very arrays afterwards, when nothing was kept."""
    cache = filled(12)
    states = [c.cache[1] for c in cache if isinstance(c, GatedDeltaCache)]
    with Round(cache, 3) as round:
        model()(tokens()[:, 12:15], cache)
        round.commit(0)
    settle(cache)
    after = [c.cache[1] for c in cache if isinstance(c, GatedDeltaCache)]
    assert all(x is y for x, y in zip(states, after, strict=True))


@pytest.mark.parametrize("keep", [-1, 4])
def test_commit_refuses_what_the_round_does_not_hold(keep):
    with (
        Round(filled(5), 3) as round,
        pytest.raises(ValueError, match=f"within 0 and 3, got {keep}"),
    ):
        round.commit(keep)


def test_misused_rounds_are_refused():
    cache = filled(5)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        Round(cache, 0)
    with Round(cache, 2) as round:
        model()(tokens()[:, 5:7], cache)
        with pytest.raises(RuntimeError, match="a round is open"):
            settle(cache)
        with pytest.raises(RuntimeError, match="a round is open"), Round(cache, 2):
            pass
        round.commit(1)
        with pytest.raises(RuntimeError, match="ended already"):
            round.commit(1)


def test_rounds_on_a_quantized_kv_cache():
    def quantized(n):
        cache = filled(n)
        return [c.to_quantized(32, 8) if isinstance(c, KVCache) else c for c in cache]

    cache = quantized(40)
    with Round(cache, 4) as round:
        model()(tokens()[:, 40:44], cache)
        round.commit(1)
    assert [c.offset for c in cache if isinstance(c, QuantizedKVCache)] == [41]
    expected = quantized(40)
    model()(tokens()[:, 40:41], expected)
    following = tokens()[:, 41:43]
    assert relative_error(model()(following, cache), model()(following, expected)) <= 1e-5


def test_deepcopy_is_independent():
    cache = filled(12)
    twin = copy.deepcopy(cache)
    model()(tokens()[:, 12:20], cache)
    assert_same(twin, filled(12))


# --- mlx-lm's protocol -------------------------------------------------------------------------
def test_make_prompt_cache():
    kinds = [type(c).__name__ for c in make_prompt_cache(model())]
    assert kinds == ["GatedDeltaCache"] * 3 + ["AttentionCache"]


@pytest.mark.parametrize("pending", [False, True], ids=["settled", "with-a-tape"])
def test_save_and_load_with_mlx_lm(tmp_path, pending):
    cache = filled(20)
    if pending:
        with Round(cache, 4) as round:
            model()(tokens()[:, 20:24], cache)
            round.commit(3)
    n = tokens_held(cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"model": "base"})
    loaded, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata == {"model": "base"}
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    assert_same(loaded, filled(n), 1e-5)
    following = tokens()[:, n : n + 5]
    expected = model()(following, filled(n))
    assert relative_error(model()(following, loaded), expected) <= 1e-5
    with Round(loaded, 2) as round:  # a loaded entry was made without __init__
        model()(tokens()[:, n + 5 : n + 7], loaded)
        round.commit(1)
    assert_same(loaded, filled(n + 6), 1e-5)


def test_an_empty_cache_survives_saving(tmp_path):
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, [GatedDeltaCache()])
    (loaded,) = load_prompt_cache(file)
    assert isinstance(loaded, GatedDeltaCache) and loaded.empty()


def merged(lengths):
    caches = [filled(n) for n in lengths]
    return [type(entries[0]).merge(list(entries)) for entries in zip(*caches, strict=True)]


def step_of(lengths, cache):
    """One more token of the same text for each sequence of a batch."""
    following = mx.concatenate([tokens()[:, n : n + 1] for n in lengths])
    return model()(following, cache)


def expected_step(lengths):
    return mx.concatenate([model()(tokens()[:, n : n + 1], filled(n)) for n in lengths])


@pytest.mark.parametrize("lengths", [(7, 7), (3, 40, 12), (1, 2)], ids=str)
def test_merge(lengths):
    assert relative_error(step_of(lengths, merged(lengths)), expected_step(lengths)) <= 1e-5


def test_merge_settles_what_is_pending():
    cache = filled(20)
    with Round(cache, 4) as round:
        model()(tokens()[:, 20:24], cache)
        round.commit(2)
    batch = [type(a).merge([a, b]) for a, b in zip(cache, filled(9), strict=True)]
    assert relative_error(step_of((22, 9), batch), expected_step((22, 9))) <= 1e-5


def test_filter_and_extend():
    batch = merged((3, 40, 12))
    for c in batch:
        c.filter(mx.array([2, 0]))
    assert relative_error(step_of((12, 3), batch), expected_step((12, 3))) <= 1e-5
    other = merged((25,))
    for c, d in zip(batch, other, strict=True):
        c.extend(d)
    lengths = (13, 4, 25)
    assert relative_error(step_of(lengths, batch), expected_step(lengths)) <= 1e-5


def test_extract():
    batch = merged((3, 40, 12))
    for i, n in enumerate((3, 40, 12)):
        one = [c.extract(i) for c in batch]
        assert isinstance(one[0], GatedDeltaCache)
        assert_same(one, filled(n), 1e-5)


def test_a_batch_keeps_or_drops_a_round_together():
    batch = merged((3, 40))
    following = mx.concatenate([tokens()[:, n : n + 4] for n in (3, 40)])
    with Round(batch, 4) as round:
        model()(following, batch)
        round.commit(2)
    assert relative_error(step_of((5, 42), batch), expected_step((5, 42))) <= 1e-5


def test_nbytes_counts_states_and_a_pending_tape():
    cache = filled(20)
    entry = cache[0]
    settled = sum(x.nbytes for x in entry.cache)
    assert entry.nbytes == settled
    with Round(cache, 4) as round:
        model()(tokens()[:, 20:24], cache)
        round.commit(2)
    rows, state, tape, _ = entry._pending
    assert entry.nbytes == sum(x.nbytes for x in (rows, state, *tape))
    settle(cache)
    assert entry.nbytes == settled


# --- padding, with a round's tokens not yet replayed ---------------------------------------------


def pending(lengths=None):
    """A cache of two sequences after a round whose first two of four tokens stay."""
    cache = model().make_cache()
    text = mx.concatenate([tokens()[:, :20], tokens()[:, 20:40]])
    model()(text, cache)
    if lengths is not None:
        prepare(cache, lengths)
    with Round(cache, 4) as round:
        model()(text[:, 5:9], cache)
        round.commit(2)
    return cache, text


def prepare(cache, lengths):
    for entry in cache:
        if isinstance(entry, GatedDeltaCache):
            entry.prepare(lengths=lengths)


def finished(cache, text):
    """Logits of a token after the padded ones, and all states."""
    model()(text[:, :8], cache)
    for entry in cache:
        if isinstance(entry, GatedDeltaCache):
            entry.finalize()
    states = [c for entry in cache if isinstance(entry, GatedDeltaCache) for c in entry.cache]
    return [model()(text[:, :1], cache), *states]


def assert_same_bits(results, expected):
    assert all(mx.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_lengths_count_from_the_end_of_what_is_pending():
    cache, text = pending(lengths=[10, 8])
    expected, _ = pending(lengths=[10, 8])
    settle(expected)
    assert_same_bits(finished(cache, text), finished(expected, text))


def test_lengths_given_while_something_is_pending():
    (cache, text), (expected, _) = pending(), pending()
    settle(expected)
    for entry in (cache, expected):
        prepare(entry, [8, 6])
    assert_same_bits(finished(cache, text), finished(expected, text))


def test_undo_restores_the_padding():
    cache = model().make_cache(left_padding=[2, 0])
    text = mx.concatenate([tokens()[:, :6], tokens()[:, 6:12]])
    model()(text, cache)
    before = [entry.left_padding.tolist() for entry in cache if isinstance(entry, GatedDeltaCache)]
    with Undo(cache) as undo:
        model()(text[:, :2], cache)
        undo()
    after = [entry.left_padding.tolist() for entry in cache if isinstance(entry, GatedDeltaCache)]
    assert after == before


def test_a_state_put_in_leaves_nothing_pending():
    cache, text = pending()
    other = model().make_cache()
    model()(text, other)
    for entry, source in zip(cache, other, strict=True):
        entry.state = source.state
    assert_same_bits([model()(text[:, :1], cache)], [model()(text[:, :1], other)])


def test_padding_shrinks_by_the_tokens_that_a_round_keeps():
    """A round on a row that is padded on the left: only its kept tokens use the padding up."""
    entry = GatedDeltaCache(left_padding=[5])
    zeros = mx.zeros
    tape = Tape(zeros((1, 3, 2)), zeros((1, 3, 1, 4)), zeros((1, 3, 2, 4)))
    entry.begin()
    entry.store([zeros((1, 6, 8)), zeros((1, 2, 4, 4)), *tape], 3)
    entry.commit(2)
    assert entry.make_mask(5).tolist() == [[False] * 3 + [True] * 2]
