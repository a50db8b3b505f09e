"""Keys and values grow without a second copy of them, and join and leave batches as they are."""

import mlx.core as mx
import pytest

from mlx_qwen3next.model.cache import (
    AttentionCache,
    BatchAttentionCache,
    GatedDeltaCache,
    reserve,
    slots,
)
from mlx_qwen3next.model.quantized_kv import KVQuantization

LAYERS = 6  # of keys and values, so 12 arrays


def grown(entries, tokens, step=250, rows=1):
    """Grows all entries by these steps, each evaluated as a whole.

    Returns the most memory of a step over that of the entries after it.
    """
    new, worst = mx.ones((rows, 1, step, 64)), 0.0
    mx.eval(new)
    for _ in range(0, tokens, step):
        mx.clear_cache()
        before = mx.get_active_memory() - sum(entry.nbytes for entry in entries)
        mx.reset_peak_memory()
        mx.eval([entry.update_and_fetch(new, new) for entry in entries])
        held = sum(entry.nbytes for entry in entries)
        worst = max(worst, (mx.get_peak_memory() - before) / held)
    return worst


def test_no_step_holds_two_copies_of_the_keys_and_values():
    """mlx-lm's entries do, all of them at once: 2.0."""
    entries = [AttentionCache() for _ in range(LAYERS)]
    assert grown(entries, 6000) < 1 + 1.1 / (2 * LAYERS)
    assert {entry.nbytes for entry in entries} == {2 * slots(6000) * 64 * 4}
    assert grown([BatchAttentionCache([0, 3]) for _ in range(LAYERS)], 2048, rows=2) < 1.1


def test_room_that_was_reserved_is_there_at_once():
    entries = [AttentionCache() for _ in range(LAYERS)]
    reserve([GatedDeltaCache(), *entries], 5000)
    assert grown(entries, 1) < 1.01
    held = entries[0].nbytes
    assert held == 2 * slots(5000) * 64 * 4
    assert grown(entries, 4000) < 1.01 and entries[0].nbytes == held
    assert grown(entries, 1024) < 1.1 and entries[0].nbytes > held


@pytest.mark.parametrize("bits", [3, 4])
def test_quantized_room_is_reserved_likewise(bits):
    """From nothing as well, in bits that fill no word."""
    quantization = KVQuantization(bits, 32, 0)
    entries = [AttentionCache() for _ in range(LAYERS)]
    quantization.reserve(entries, 5000)
    quantization.apply(entries, 5000)
    assert grown(entries, 1) < 1.1
    held = entries[0].nbytes
    assert held == 2 * slots(5000) * 64 * quantization.itemsize(4, 5000)
    assert grown(entries, 4000) < 1.1 and entries[0].nbytes == held
    assert grown(entries, 1024) < 1.4 and entries[0].nbytes > held


def test_plain_keys_and_values_have_no_room_for_what_will_be_quantized():
    quantization, entry = KVQuantization(4, 32, 300), AttentionCache()
    entries, new = [entry], mx.ones((1, 1, 300, 64))
    quantization.reserve(entries, 5000)
    entry.update_and_fetch(new, new)
    assert entry.nbytes == 2 * slots(300) * 64 * 4
    quantization.apply(entries, 5000)
    (quantized,) = entries
    assert quantized.nbytes == 2 * slots(5000) * 64 * quantization.itemsize(4, 300)
    assert quantized.offset == 300 and quantization.limited(7, 298) == 2


def test_a_sixteenth_more_room_at_most():
    assert [slots(n) for n in (0, 1, 256, 257, 8191, 8193)] == [0, 256, 256, 512, 8192, 8704]
    assert all(n <= slots(n) <= n + max(256, n // 16) for n in range(1, 300_000, 97))
    assert slots(262_144) == 262_144


def test_one_sequence_joins_a_batch_and_leaves_it_with_its_arrays():
    """Without a copy, and without the two seeing each other's tokens."""
    one, new = AttentionCache(), mx.ones((1, 1, 300, 64))
    mx.eval(one.update_and_fetch(new, new))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    batch = AttentionCache.merge([one])
    batch.filter([0])
    mx.eval(batch.offset)
    again = batch.extract(0)
    assert mx.get_peak_memory() - before < one.nbytes / 2
    more = mx.full((1, 1, 1, 64), 2.0)
    mx.eval(batch.update_and_fetch(more, more))
    assert [batch.size(), again.size(), one.size()] == [301, 300, 300]
    assert batch.keys[0, 0, 300, 0].item() == 2
    assert again.keys[0, 0, 300, 0].item() == one.keys[0, 0, 300, 0].item() == 0


def test_sequences_join_and_leave_a_batch_a_layer_at_a_time():
    def filled_entry(n):
        entry, new = AttentionCache(), mx.random.normal((1, 1, n, 64))
        entry.update_and_fetch(new, -new)
        return entry

    rows = [[filled_entry(n) for _ in range(LAYERS)] for n in (2000, 1500)]
    expected = [[mx.array(entry.keys_and_values()[0]) for entry in row] for row in rows]
    mx.eval(expected, [entry.state for row in rows for entry in row])
    first, second = ([AttentionCache.merge([entry]) for entry in row] for row in rows)
    del rows
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for a, b in zip(first, second, strict=True):
        a.extend(b)
    mx.eval([entry.state for entry in first])
    held = sum(entry.nbytes for entry in first)
    assert mx.get_peak_memory() - before < 0.5 * held
    for i, row in enumerate(expected):
        for entry, keys in zip(first, row, strict=True):
            assert mx.array_equal(entry.extract(i).keys_and_values()[0], keys)
    del a, b, entry, keys, row, expected
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for entry in first:
        entry.filter([1])
    mx.eval([entry.state for entry in first])
    assert mx.get_peak_memory() - before < 0.5 * held
    assert {(entry.left_padding.item(), entry.size()) for entry in first} == {(0, 1500)}
