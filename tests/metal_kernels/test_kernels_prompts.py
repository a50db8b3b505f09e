"""The kernels of many rows' experts: those before and after MLX's own products."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from helpers_metal import DTYPES, by_host, executed, ids, in_turns, mistakes_in_text, normal, prove
from test_kernels_experts import Routed

from mlx_qwen3next import metal_kernels as kernels
from mlx_qwen3next.compute import experts

pytestmark = pytest.mark.metal

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))


# --- before them ---------------------------------------------------------------------------------
CHOSEN = [  # as many simdgroups as a threadgroup has, fewer, some of the last one
    Routed(8, 33, 4, True, True),
    Routed(3, 40, 31, False, False),
    Routed(19, 70, 1, True, False, levels=6),
    Routed(17, 512, 10, True, True, levels=40),
]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
@every_dtype
def test_choose(case, dtype):
    logits = case.logits(dtype)
    chosen, weights = experts.choose(logits, mx.zeros(0), **case.options)
    expected = {"experts": chosen, "weights": weights}
    builds = in_turns((CHOSEN, case), (DTYPES, dtype))
    got = prove(lambda: kernels.choose(logits, **case.options), expected, builds)
    assert got["experts"].tolist() == chosen.tolist()
    assert got["weights"].dtype == dtype


@pytest.mark.parametrize("spoiled", [mx.nan, mx.inf], ids=str)
def test_a_row_without_numbers_has_experts_that_there_are(spoiled):
    """And does not spoil another."""
    case = CHOSEN[0]
    logits = case.logits(mx.float32)
    with executed(build="check"):
        expected = kernels.choose(logits, **case.options)
        logits[1, :33] = spoiled
        got = kernels.choose(logits, **case.options)
    assert got[0].max().item() <= 33
    for a, b in zip(got, expected, strict=True):
        assert mx.array_equal(a[2:], b[2:]) and mx.array_equal(a[0], b[0])


@pytest.mark.parametrize(
    ("rows", "E", "top", "taken"),
    [(8192, 512, 10, True), (1, 1024, 31, True), (1, 1025, 31, False), (9, 64, 32, False)],
)
def test_takes_choice(rows, E, top, taken):
    assert kernels.takes_choice(rows, E, top) == taken
    assert not kernels.takes_choice(0, E, top)


# --- after them ----------------------------------------------------------------------------------
class Combined(NamedTuple):
    R: int
    k: int
    H: int

    def __call__(self, dtype):
        """Results, places, weights and residual, of distinct rows."""
        mx.random.seed(sum(self))
        places = mx.random.permutation(self.R * self.k).astype(mx.uint32).reshape(self.R, self.k)
        weights = mx.random.uniform(0, 1, places.shape).astype(dtype)
        y, residual = normal(places.size, self.H, dtype=dtype), normal(self.R, self.H, dtype=dtype)
        return y, places, weights, residual


COMBINED = [  # less than a threadgroup, several a row; few pairs and many
    *(Combined(1, 8, 8), Combined(7, 3, 132), Combined(3, 11, 1040), Combined(2, 32, 64)),
]


@pytest.mark.parametrize("case", COMBINED, ids=lambda case: "R{}-k{}-H{}".format(*case))
@every_dtype
def test_combine(case, dtype):
    inputs = case(dtype)
    y, places, weights, residual = (np.array(a.astype(mx.float32)) for a in inputs)
    sums = (weights[..., None] * y[places.astype(int)]).sum(axis=1)
    builds = in_turns((COMBINED, case), (DTYPES, dtype))
    got = prove(lambda: [kernels.combine(*inputs)], {"y": mx.array(residual + sums)}, builds)
    assert got["y"].dtype == dtype


def test_the_pairs_of_a_row_are_added_in_their_order():
    """In float32, onto the residual last: only then nothing is left of the large ones."""
    y = mx.array([1.0, 2.0**25, -(2.0**25), 1.0, 2.0**25, 1.0, -(2.0**25), 0.0])
    inputs = mx.repeat(y[:, None], 8, 1), mx.arange(8, dtype=mx.uint32).reshape(2, 4)
    with executed():
        sums = kernels.combine(*inputs, mx.ones((2, 4)), mx.full((2, 8), 0.5))
    assert sums[:, 0].tolist() == [1.5, 0.5]


@pytest.mark.parametrize(
    ("rows", "k", "H", "taken"),
    [(8192, 11, 2048, True), (1, 8, 8, True), (1, 7, 8, False), (4, 2, 6, False), (0, 8, 8, False)],
)
def test_takes_combine(rows, k, H, taken):
    assert kernels.takes_combine(rows, k, H) == taken


# --- the text ------------------------------------------------------------------------------------
@by_host
def test_text():
    def calls(dtype):
        kernels.choose(CHOSEN[0].logits(dtype), **CHOSEN[0].options)
        kernels.choose(CHOSEN[1].logits(dtype), **CHOSEN[1].options)
        kernels.combine(*COMBINED[0](dtype))

    assert mistakes_in_text(*(lambda d=dtype: calls(d) for dtype in DTYPES)) == []
