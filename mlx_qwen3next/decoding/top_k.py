"""Draws tokens from the k most probable ones, without sorting the vocabulary.

The k largest of many numbers lie in the k blocks whose maxima are largest, so that two short sorts
find them. All rows are drawn at once. The tokens are mlx-lm's for the same random numbers, ties
included: of equal ones, those with the lowest ids are kept.
"""

from __future__ import annotations

import math

import mlx.core as mx

MOST = 1024  # tokens that are few, so that an array [k, k] is small
_LARGEST_BLOCK = 64  # tokens


class TopKSampler:
    """A sampler: log-probabilities ``[n, vocab]`` to tokens ``[n]`` uint32.

    Args:
        temp: above 0.
        top_p: 0 and 1 keep all.
        min_p: 0 keeps all.
        top_k: from 1 to ``MOST``, and less than the vocabulary.
    """

    def __init__(self, temp: float, top_p: float, min_p: float, top_k: int):
        self._scale = 1 / temp
        self._top_p = top_p if 0 < top_p < 1 else 1.0
        self._min_p = math.log(min_p) if min_p else -math.inf
        self._top_k = top_k

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draws with numbers from ``mx.random``."""
        return self.draw(logprobs, mx.random.uniform(shape=(len(logprobs), 1)))

    def draw(self, logprobs: mx.array, uniform: mx.array) -> mx.array:
        """Draws with given numbers.

        Args:
            logprobs: ``[n, vocab]``, floating.
            uniform: numbers ``[n, 1]`` float32, at least 0 and below 1.
        """
        dtype = logprobs.dtype
        values, tokens = largest(logprobs, self._top_k)
        row, column = (values[:, None], tokens[:, None]), (values[..., None], tokens[..., None])
        mass_above, top_p = mx.array(0.0), mx.array(self._top_p)
        if self._top_p < 1:
            # The mass of float32 probabilities is 1; others are rounded by several percent.
            total = mx.array(0.0) if dtype == mx.float32 else mx.logsumexp(logprobs, -1)
            terms = _mass_above(*mx.broadcast_arrays(row[0], column[0], total.reshape(-1, 1, 1)))
            mass_above = terms.sum(-1)[:, None]
        options = mx.array(self._scale, dtype), mx.array(self._min_p, dtype), top_p
        inputs = *row, column[1], row[0][..., :1], uniform[..., None], mass_above, *options
        # Of one shape, lest a compiled function fall into several.
        line = _line(*mx.broadcast_arrays(*inputs))
        return line.sum(-1).max(-1, keepdims=True).view(mx.uint32)[:, 0]


def largest(logprobs: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Finds the k largest log-probabilities of each row, in descending order.

    Args:
        logprobs: ``[n, vocab]``; at most one of a row is above 0 (by rounding).

    Returns:
        The values ``[n, k]``, and their tokens ``[n, k]`` uint32. Of equal values the one with the
        lowest token comes first.
    """
    rows, vocab = logprobs.shape
    # The bits of negative numbers, read as integers, ascend where the numbers descend.
    unsigned = mx.uint16 if logprobs.itemsize == 2 else mx.uint32
    bits = logprobs.view(unsigned)
    block = min(_LARGEST_BLOCK, 1 << (vocab // k).bit_length() // 2)
    if vocab % block:
        last = mx.array(mx.iinfo(unsigned).max, unsigned)
        bits = mx.pad(bits, [(0, 0), (0, -vocab % block)], constant_values=last)
    blocks = bits.reshape(rows, -1, block)
    chosen = mx.argpartition(blocks.min(-1), kth=k - 1, axis=-1)[:, :k, None]
    keys = _keys(mx.take_along_axis(blocks, chosen, axis=1), chosen)
    keys = mx.sort(keys.reshape(rows, -1), axis=-1)[:, :k, None]
    return keys.view(logprobs.dtype)[..., -1], keys.view(mx.uint32)[..., 0]


@mx.compile
def _keys(bits: mx.array, blocks: mx.array) -> mx.array:
    """Joins the bits ``[n, k, block]`` of numbers and their places into uint64, to sort by both."""
    block = bits.shape[-1]
    tokens = blocks * block + mx.arange(block, dtype=mx.uint32)
    return bits.astype(mx.uint64) << (64 - 8 * bits.itemsize) | tokens.astype(mx.uint64)


@mx.compile
def _mass_above(values: mx.array, others: mx.array, log_total: mx.array) -> mx.array:
    """Terms ``[n, k, k]`` of the probability of all that are more probable than each."""
    return mx.where(values > others, mx.exp(values.astype(mx.float32) - log_total), 0)


@mx.compile
def _line(
    values: mx.array,
    tokens: mx.array,
    others: mx.array,
    first: mx.array,
    uniform: mx.array,
    mass_above: mx.array,
    scale: mx.array,
    min_p: mx.array,
    top_p: mx.array,
) -> mx.array:
    """Terms ``[n, k, k]`` uint64 of a sum whose maximum has the token drawn as its lower half.

    The tokens that are kept lie on a line in the order of their ids, each as long as its weight.
    The upper half says where a token begins, counted from behind the point that is drawn. What
    begins before it is negative, and hence, as the number has no sign, larger than all others.
    """
    is_kept = (mass_above < top_p) & (values >= first + min_p)
    unit = math.log(2**31 / tokens.shape[-1])  # the whole line stays below 2^31
    origin = (first * scale).astype(mx.float32) - unit
    lengths = mx.where(is_kept, mx.exp((values * scale).astype(mx.float32) - origin), 0)
    before = mx.where(tokens < others, lengths, 0).astype(mx.uint64)
    start = before - (lengths * uniform).astype(mx.uint64)
    own = mx.where(tokens == others, tokens.astype(mx.uint64) - 2**32, 0)
    return (start << 32) + own
