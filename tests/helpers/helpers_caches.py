"""Checks that caches hold a text: they go on as after a forward over all of it."""

import copy

import mlx.core as mx
from float64 import relative_error

from mlx_qwen3next.model.cache import tokens_held

NOISE = 1e-4  # relative difference between two right float32 computations

_found = {}


def whole(model, tokens):
    """A forward over all tokens: the logits after them, and the hidden states.

    It is kept, for most tests ask for the same texts again.
    """
    if (id(model), tokens) not in _found:
        hidden = model.model(mx.array([tokens]))
        found = model.logits(hidden[:, -1]), hidden
        mx.eval(found)
        _found[id(model), tokens] = model, found
    return _found[id(model), tokens][1]


def assert_head(model, entry, tokens):
    """Checks that the head's entry holds all pairs of hidden states and next tokens."""
    hidden, head = whole(model, tuple(tokens))[1], model.mtp.make_cache()
    assert entry.offset == len(tokens) - 1
    pairs = [(entry.hidden, hidden[:, -1:])]
    if entry.offset:
        model.mtp(hidden[:, :-1], mx.array([tokens[1:]]), head)
        pairs += zip(entry.keys_and_values(), head[0].keys_and_values(), strict=True)
    for x, y in pairs:
        assert x.shape == y.shape
        assert relative_error(x, y) <= NOISE


def assert_holds(model, cache, tokens, head=None):
    """Checks that a cache holds exactly these tokens.

    Args:
        head: whether the cache has an entry of the MTP head; None reads that from its length.
    """
    layers = len(model.layers)
    assert len(cache) == layers + (head if head is not None else len(cache) > layers)
    assert tokens_held(cache[:layers]) == len(tokens)
    expected, _ = whole(model, (*tokens, 7))
    logits = model(mx.array([[7]]), copy.deepcopy(cache[:layers]))[:, -1]
    assert relative_error(logits, expected) <= NOISE
    for entry in cache[layers:]:
        assert_head(model, entry, tokens)
