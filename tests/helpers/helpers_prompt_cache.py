"""Helpers of the tests of the prompt cache: small caches whose values follow from the text."""

import itertools

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import QuantizedKVCache

from mlx_qwen3next.model.cache import AttentionCache, GatedDeltaCache, MTPCache
from mlx_qwen3next.model.quantized_kv import KVQuantization
from mlx_qwen3next.prompt_cache.pieces import size
from mlx_qwen3next.prompt_cache.tree import tree

ENOUGH = 2**40
SHORT, LONG, OTHER = (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 9)
WIDTH = 32  # of keys, the smallest group of quantized ones


def rows(tokens, seed=0):
    """[1, 2, n, WIDTH]: each row follows from all tokens up to its own, as keys do."""
    sums = itertools.accumulate(tokens, lambda h, t: (31 * h + t + 1) % 1009, initial=seed)
    return (
        np.array([*sums][1:], np.float32)[None, None, :, None]
        + np.arange(WIDTH, dtype=np.float32)
        + np.array([0, 0.5], np.float32)[None, :, None, None]
    )


def kv_entry(values, kind=AttentionCache, room=5):
    """A cache entry that holds these rows and has room for more, as in use."""
    entry, n = kind(), values.shape[2]
    entry.update_and_fetch(mx.array(values), mx.array(-values))
    more = mx.zeros((1, 2, room, WIDTH))
    entry.update_and_fetch(more, more)
    assert entry.trim(room) == room and entry.offset == n
    return entry


def fake(tokens, head=False, quantized=False):
    """A cache of these tokens: linear, attention, linear; perhaps the MTP head's entry."""
    tokens = list(tokens)
    cache = []
    for seed in (1, 2):
        entry, last = GatedDeltaCache(), rows(tokens, seed)[:, :, -1:]
        entry.cache = [mx.array(last[:, 0]).astype(mx.bfloat16), mx.array(last)]
        cache.append(entry)
    cache.insert(1, kv_entry(rows(tokens, 3)))
    if quantized:
        KVQuantization(8, WIDTH, 0).apply(cache)
    if head:
        entry, of = MTPCache(), rows(tokens, 4)
        if len(tokens) > 1:
            entry = kv_entry(of[:, :, 1:], MTPCache)
        entry.hidden = mx.array(of[:, 0, -1:])
        cache.append(entry)
    return cache


def contents(cache):
    """Every value a cache holds, in float32, with its entry's kind and its dtype."""
    out = []
    for entry in cache:
        if isinstance(entry, GatedDeltaCache):
            arrays = list(entry.cache)
        else:
            keys, values = entry.keys_and_values()
            quantized = isinstance(entry, QuantizedKVCache)
            arrays = [*keys, *values] if quantized else [keys, values]
            arrays += [entry.hidden] if isinstance(entry, MTPCache) else []
        out += [(type(entry), x.dtype, np.array(x.astype(mx.float32))) for x in arrays]
    return out


def same(a, b):
    """Whether two caches hold the same, bit for bit."""
    a, b = contents(a), contents(b)
    return len(a) == len(b) and all(
        x[:2] == y[:2] and np.array_equal(x[2], y[2]) for x, y in zip(a, b, strict=True)
    )


def texts(cache):
    """The texts of which there is a checkpoint, as tuples, after checking the tree."""
    found, root = {}, cache._root
    for node in tree(root):
        if node is root:
            continue
        piece, above = node.piece, node.parent
        assert above.children[piece.tokens[0]] is node
        assert piece.start == above.piece.end and piece.tokens.size > 0
        assert (node in cache._used) == bool(piece.checkpoint)
        assert node.children or piece.checkpoint  # nothing that cannot be reached
        assert (node.nbytes, node.states) == (piece.nbytes, size(piece.checkpoint))
        before = found[above] if above is not root else ()
        found[node] = before + tuple(piece.tokens.tolist())
    assert cache._used.keys() <= found.keys() and len(cache) == len(cache._used)
    parts = [x for node in found for x in node.piece.contents()]
    assert cache.nbytes == sum(x.nbytes for _, x in parts)
    return {found[node] for node in cache._used}


def keep(cache, *kept, head=True, quantized=False):
    for text in kept:
        cache.insert(text, fake(text, head, quantized))
    cache.save()
    return cache


def check(cache, text, head=True, quantized=False):
    fetched, n = cache.fetch([*text, 0])
    assert n == len(text) and same(fetched, fake(text, head, quantized))


def paths(folder):
    return [path for path in folder.iterdir() if path.name != "lock"]


def files(folder):
    return sorted(path.name for path in paths(folder))


def warnings(caplog):
    """The package's messages since the last call."""
    found = [r.getMessage() for r in caplog.records if r.name == "mlx_qwen3next"]
    caplog.clear()
    return found
