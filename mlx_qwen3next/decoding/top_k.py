"""Draws tokens from the k most probable ones, without sorting the vocabulary.

The k largest of many numbers lie in the k blocks whose maxima are largest, so that two short sorts
find them. All rows are drawn at once. The tokens are mlx-lm's for the same random numbers, ties
included: of equal ones, those with the lowest ids are kept.

The tokens that are kept lie on a line in the order of their ids, each as long as its weight, and
the one at a point is drawn. They are the first m of the k, and m depends on a running sum of
probabilities; where a token begins on the line depends on m. Both are summed in one launch, for
every m, and the right m is picked with the token.
"""

from __future__ import annotations

import math

import mlx.core as mx

MOST = 1024  # tokens that are few, so that an array [k, k] is small
_LARGEST_BLOCK = 64  # tokens
_UNIT = 2**30  # of probabilities, as integers
# The a and b of factors (x + a) (s x) + b, whose product's 8th power is exp(x): see _exp. Fitted.
_FACTORS = (
    (66.641808, 0.96409219),
    (55.128876, 0.921969),
    (30.317533, 0.92353058),
    (-15.57832, 1.2181866),
)
_SLOPE, _LEAST = 8.3915994e-4, -28


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
        self._top_p = top_p if 0 < top_p < 1 else math.inf
        self._min_p = math.log(min_p) if min_p else -math.inf
        self._top_k = top_k
        self._places = mx.array(list(range(top_k + 1)), mx.uint32)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draws with numbers from ``mx.random``."""
        return self.draw(logprobs, mx.random.uniform(shape=(len(logprobs), 1)))

    def draw(self, logprobs: mx.array, uniform: mx.array) -> mx.array:
        """Draws with given numbers.

        Args:
            logprobs: ``[n, vocab]``, floating.
            uniform: numbers ``[n, 1]`` float32, at least 0 and below 1.
        """
        if self._sums_to_one(logprobs):
            return self._draw(logprobs, mx.array(1.0), uniform)
        return self._draw_rounded(logprobs, mx.zeros((1, 1), logprobs.dtype), uniform)[0]

    def choose(self, logits: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
        """Draws as :meth:`draw`, from logits; returns log-probabilities ``[n, vocab]`` as well."""
        log_total = mx.logsumexp(logits, axis=-1, keepdims=True)
        if not self._sums_to_one(logits):
            return self._draw_rounded(logits, log_total, uniform)
        logprobs = logits - log_total
        return self._draw(logprobs, mx.array(1.0), uniform), logprobs

    def _sums_to_one(self, numbers: mx.array) -> bool:
        """Whether probabilities sum to 1, or to anything where their sum does not count.

        Those of 16-bit log-probabilities are rounded by several percent.
        """
        return numbers.dtype == mx.float32 or self._top_p == math.inf

    def _draw_rounded(
        self, logits: mx.array, log_total: mx.array, uniform: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Draws from ``logits - log_total`` in 16 bits; returns these as well."""
        logprobs, probabilities = _rounded(logits, log_total)
        return self._draw(logprobs, probabilities.sum(-1)[:, None, None], uniform), logprobs

    def _draw(self, logprobs: mx.array, total: mx.array, uniform: mx.array) -> mx.array:
        """Draws where the sum of the probabilities is known, ``[n, 1, 1]`` or one for all."""
        k, dtype = self._top_k, logprobs.dtype
        values, tokens = largest(logprobs, k + 1)  # the last one tells whether a tie goes on
        first, last, after = values[:, None, :1], values[:, None, :k], values[:, None, 1:]
        row, rows = tokens[:, None, :k], (tokens[..., None], self._places[:, None])
        weight = first, mx.array(self._scale, dtype), uniform[..., None]
        # Of one shape, lest a compiled function fall into several.
        sums = _terms(*mx.broadcast_arrays(last, row, *rows, *weight)).cumsum(-1)
        ends = last, after, first, mx.array(self._min_p, dtype), self._places[:0:-1]
        limit = sums[:, k:], total, mx.array(self._top_p * _UNIT)
        column = sums[:, :k], values[:, :k, None], tokens[:, :k, None]
        picks = _picks(*mx.broadcast_arrays(*ends, *limit, *column))
        return picks.max((-2, -1), keepdims=True).view(mx.uint32)[:, 0, 0]


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
def _rounded(logits: mx.array, log_total: mx.array) -> tuple[mx.array, mx.array]:
    """Log-probabilities in 16 bits, and the probabilities that they stand for, in float32."""
    logprobs = logits - log_total
    return logprobs, _exp(logprobs.astype(mx.float32))


def _exp(x: mx.array) -> mx.array:
    """Exponentials of float32 numbers up to 0, for a sum of them.

    The formula's relative error is 1.2e-7 down to -12, and grows below as exp(x) falls, to 6e-13 of
    absolute error at most; rounding adds 2e-6. Below -28 the result is constant.

    On a CPU MLX's own exp takes six times as long, since it calls a function for each step, and its
    power twice. The formula is nine operations deep; with the two before it these are as many as
    MLX compiles into one function.
    """
    x = mx.maximum(x, _LEAST)
    slope = x * _SLOPE
    a, b, c, d = ((x + shift) * slope + at_0 for shift, at_0 in _FACTORS)
    return mx.square(mx.square(mx.square((a * b) * (c * d))))


@mx.compile
def _keys(bits: mx.array, blocks: mx.array) -> mx.array:
    """Joins the bits ``[n, k, block]`` of numbers and their places into uint64, to sort by both."""
    block = bits.shape[-1]
    tokens = blocks * block + mx.arange(block, dtype=mx.uint32)
    return bits.astype(mx.uint64) << (64 - 8 * bits.itemsize) | tokens.astype(mx.uint64)


@mx.compile
def _terms(
    values: mx.array,
    tokens: mx.array,
    others: mx.array,
    places: mx.array,
    first: mx.array,
    scale: mx.array,
    uniform: mx.array,
) -> mx.array:
    """The share of each of the k tokens in the sums, ``[n, k + 1, k]`` int32.

    Row j: to where token j begins, counted from the point that is drawn; row k: to the probability.
    """
    k = tokens.shape[-1]
    unit = math.log(2**31 / k)  # the whole line stays below 2^31
    origin = (first * scale).astype(mx.float32) - unit
    lengths = mx.exp((values * scale).astype(mx.float32) - origin)
    before = mx.where(tokens < others, lengths, 0).astype(mx.int32)
    begins = before - (lengths * uniform).astype(mx.int32)
    probabilities = mx.round(mx.exp(values.astype(mx.float32)) * _UNIT)
    return mx.where(places == k, probabilities.astype(mx.int32), begins)


@mx.compile
def _picks(
    last: mx.array,
    after: mx.array,
    first: mx.array,
    min_p: mx.array,
    places: mx.array,
    mass: mx.array,
    total: mx.array,
    top_p: mx.array,
    begins: mx.array,
    values: mx.array,
    tokens: mx.array,
) -> mx.array:
    """Numbers ``[n, k, k]`` uint64 whose maximum has the token drawn as its lower half.

    Column m stands for m + 1 tokens that are kept, the least probable of them ``last``; the first
    column that is right has the largest upper half. Rows are tokens: of those that are kept and
    begin at the point or before it, the last counts.
    """
    is_mass_reached = (mass.astype(mx.float32) >= top_p * total) & (last > after)
    is_right = is_mass_reached | (after < first + min_p) | (places == 1)
    upper = mx.where(is_right & (values >= last) & (begins <= 0), places, 0)
    return upper.astype(mx.uint64) << 32 | tokens.astype(mx.uint64)
