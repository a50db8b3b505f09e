"""The kernels of the sparse experts: router, gate and up, down."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from helpers_metal import (
    DTYPES,
    assert_close,
    assert_same_bits,
    by_host,
    executed,
    ids,
    in_turns,
    mistakes_in_text,
    normal,
    prove,
)

from mlx_qwen3next import metal_kernels as kernels
from mlx_qwen3next.compute import reference
from mlx_qwen3next.metal_kernels import Experts

pytestmark = pytest.mark.metal

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))


# --- the router ----------------------------------------------------------------------------------
class Routed(NamedTuple):
    R: int
    E: int
    top: int
    shared: bool
    normalise: bool
    levels: int = 0  # so many different logits, so that there are ties; 0 for no ties

    def __str__(self):
        flags = (
            "-shared" * self.shared + "-normalised" * self.normalise + "-ties" * bool(self.levels)
        )
        return f"R{self.R}-E{self.E}-top{self.top}{flags}"

    @property
    def options(self):
        return {"experts": self.E, "top_k": self.top, "normalise": self.normalise}

    def logits(self, dtype):
        mx.random.seed(sum(self))
        logits = 2 * normal(self.R, self.E + self.shared)
        if self.levels:
            logits = mx.floor(self.levels * mx.random.uniform(0, 1, logits.shape))
            logits[:, : self.E] += 120  # beyond exp's range
        elif dtype != mx.float32:  # far enough apart to differ after rounding
            ranks = mx.argsort(mx.argsort(logits, axis=1), axis=1)
            logits = ranks * (8 / self.E) if self.E < 256 else logits
        return logits.astype(dtype)


ROUTED = [
    Routed(1, 8, 2, False, True),  # a routing of fewer than 8 pairs
    Routed(2, 8, 8, True, False),
    Routed(3, 33, 4, True, True),
    Routed(5, 40, 10, False, False),
    Routed(16, 70, 1, True, False, levels=6),
    Routed(3, 20, 5, False, False, levels=1),
    Routed(9, 512, 10, True, True, levels=40),
]
LIMITS = [  # the most pairs, of the most experts; the model's own shape for the longest step
    Routed(16, 1024, 31, True, True, levels=60),
    Routed(16, 512, 10, True, True),
]


class Routing(NamedTuple):
    experts: mx.array  # [N]
    rows: mx.array  # [N]
    weights: mx.array  # [N] float32
    starts: mx.array  # [N + 1]


def routing_of(logits, case):
    """The routing by the reference."""
    chosen, weights = reference.route(logits[:, : case.E], case.top, case.normalise)
    if case.shared:
        chosen = mx.concatenate([chosen, mx.full((case.R, 1), case.E, mx.int32)], axis=1)
        gate = mx.sigmoid(logits[:, case.E :].astype(mx.float32))
        weights = mx.concatenate([weights, gate], axis=1)
    return routing_of_choice(chosen.tolist(), weights.tolist())


def routing_of_choice(chosen, weights):
    """The routing for experts of each row and their weights."""
    pairs = sorted(
        (expert, row, weight)
        for row, (experts, of_row) in enumerate(zip(chosen, weights, strict=True))
        for expert, weight in zip(experts, of_row, strict=True)
    )
    N, distinct = len(pairs), sorted({expert for expert, *_ in pairs})
    starts = [[expert for expert, *_ in pairs].index(e) for e in distinct]
    unused = N - len(distinct)
    return Routing(
        mx.array(distinct + [0] * unused, mx.uint32),
        mx.array([row for _, row, _ in pairs], mx.uint32),
        mx.array([weight for *_, weight in pairs]),
        mx.array(starts + [N] * (unused + 1), mx.uint32),
    )


def packed(routing):
    """The routing as the experts' kernels take it."""
    experts, rows, weights, starts = routing
    return mx.concatenate([experts, rows, weights.view(mx.uint32), starts])


def unpacked(routing):
    N = routing.size // 4
    experts, rows, weights, starts = mx.split(routing, [N, 2 * N, 3 * N])
    return Routing(experts, rows, weights.view(mx.float32), starts)


def prove_router(case, dtype, builds):
    logits = case.logits(dtype)
    expected = routing_of(logits, case)._asdict()
    got = prove(lambda: unpacked(kernels.route(logits, **case.options)), expected, builds)
    for name in ("experts", "starts", "rows"):
        assert got[name].tolist() == expected[name].tolist(), name


@pytest.mark.parametrize("case", ROUTED, ids=str)
@every_dtype
def test_router(case, dtype):
    prove_router(case, dtype, in_turns((ROUTED, case), (DTYPES, dtype)))


@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_router_at_the_limits(case):
    assert kernels.takes_router(case.R, case.E, case.top)
    prove_router(case, mx.float32, ["check"] if case == LIMITS[1] else [])


@pytest.mark.parametrize(
    ("rows", "experts", "top", "taken"),
    [
        *((1, 8, 1, False), (2, 8, 1, True), (16, 8, 1, True), (17, 8, 1, False)),
        *((1, 8, 2, True), (0, 8, 2, False)),
        *((1, 1024, 31, True), (1, 1025, 31, False), (1, 1024, 32, False)),
        *((1, 8, 8, True), (1, 8, 9, False), (1, 7, 2, False), (2, 7, 2, True)),
    ],
)
def test_takes_router(rows, experts, top, taken):
    assert kernels.takes_router(rows, experts, top) == taken


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("width", ["one", "all"])
@pytest.mark.parametrize("spoiled", [mx.nan, mx.inf, -mx.inf], ids=str)
def test_a_row_without_numbers_does_not_spoil_another(spoiled, width, normalise):
    case = Routed(3, 33, 4, True, normalise)
    logits = case.logits(mx.float32)

    def pairs():
        routing = unpacked(kernels.route(logits, **case.options))
        experts, rows, weights, starts = (np.array(x) for x in routing)
        assert starts[-1] == 15 and sorted(rows.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
        used = int((starts < 15).sum())
        owners = np.repeat(experts[:used], np.diff(starts[: used + 1]))
        assert (owners <= 33).all()
        return [p for p in zip(owners, rows, weights, strict=True) if p[1] != 1]

    with executed():
        expected = pairs()
    logits[1, slice(0, 33) if width == "all" else 20] = spoiled
    for build in ("fast", "check"):
        with executed(build=build):
            assert pairs() == expected


# --- gate and up, down ---------------------------------------------------------------------------
class Stack(NamedTuple):
    """A stack of experts and which rows use which: gate and up if ``gated``, else down."""

    gated: bool
    outputs: int
    columns: int
    G: int
    chosen: tuple  # experts of each row

    def __str__(self):
        kind = "gate_up" if self.gated else "down"
        E, N = self.experts, sum(map(len, self.chosen))
        return f"{kind}-R{len(self.chosen)}-N{N}-E{E}-out{self.outputs}-in{self.columns}-G{self.G}"

    @property
    def experts(self):
        return 1 + max(max(row) for row in self.chosen)


ALONE = ((3, 6),)
ALIKE = ((0, 2),) * 3
APART = ((4, 0), (1, 3), (2, 5))
MIXED = ((0, 1, 6), (1, 3, 6), (1, 5, 6), (4, 1, 6), (2, 3, 6))  # by one to five rows
SHAPES = [  # columns: a step of a simdgroup and a bit, several
    *((True, 12, 544, 32, MIXED), (True, 20, 320, 64, ALIKE)),
    *((False, 24, 544, 32, MIXED), (False, 40, 320, 64, ALIKE)),
]
SMALL = [  # less than a step, routings of fewer than 8 pairs
    *((True, 4, 32, 32, ALONE), (True, 8, 96, 32, APART)),
    *((False, 8, 32, 32, ALONE), (False, 16, 96, 32, APART)),
]
mx.random.seed(5)
MOST = tuple((*mx.random.permutation(24)[:10].tolist(), 24) for _ in range(16))
LARGEST = [(True, 20, 640, 128, MOST), (False, 40, 640, 128, MOST)]  # 16 rows x 11 pairs
BITS = (2, 3, 4, 5, 6, 8, 16)


def stored(weight, bits, G):
    """Weights as the kernels take them, and their exact values."""
    if bits == 16:
        return Experts(weight), weight.astype(mx.float32)
    words, *scales = mx.quantize(weight, group_size=G, bits=bits)
    exact = [s.astype(mx.float32) for s in scales]
    return Experts(words, *scales, G, bits), mx.dequantize(words, *exact, group_size=G, bits=bits)


class Layer:
    """Inputs of one launch of expert_gate_up or expert_down.

    ``shared`` are bits and group size of the last expert, if it is apart.
    """

    def __init__(self, stack, bits, dtype, shared=None):
        mx.random.seed(stack.outputs + bits)
        self.stack, self.dtype = stack, dtype
        self.R, self.N = len(stack.chosen), sum(map(len, stack.chosen))
        rows = stack.outputs * (1 + stack.gated)
        weight = normal(stack.experts, rows, stack.columns) + 0.5 * normal(stack.experts, rows, 1)
        weight = (weight * stack.columns**-0.5).astype(dtype)
        self.weights, self.exact = stored(weight[:-1] if shared else weight, bits, stack.G)
        self.shared = None
        if shared:
            self.shared, exact = stored(weight[-1], *shared)
            self.exact = mx.concatenate([self.exact, exact[None]])
        weights = mx.random.uniform(0.1, 1, (self.R, len(stack.chosen[0]))).tolist()
        self.routing = routing_of_choice(stack.chosen, weights)
        self.x = normal(self.R if stack.gated else self.N, stack.columns, dtype=dtype)
        self.residual = normal(1, self.R, stack.outputs, dtype=dtype)

    def __call__(self):
        inputs = self.x, self.weights, packed(self.routing)
        if self.stack.gated:
            return [kernels.expert_gate_up(*inputs, self.shared)]
        return [kernels.expert_down(*inputs, self.residual, self.shared)]

    def expected(self):
        x = self.x.astype(mx.float32)
        experts = mx.array(sorted(e for row in self.stack.chosen for e in row))
        if self.stack.gated:
            y = (self.exact[experts] @ x[self.routing.rows, :, None])[..., 0]
            gate, up = mx.split(y, 2, axis=-1)
            return {"y": gate * mx.sigmoid(gate) * up}
        y = (self.exact[experts] @ x[..., None])[..., 0] * self.routing.weights[:, None]
        return {"y": self.residual.astype(mx.float32).at[0, self.routing.rows].add(y)}


def every_stack(shapes):
    stacks = [Stack(*shape) for shape in shapes]
    return pytest.mark.parametrize("stack", stacks, ids=str)


PAIRS = [(4, mx.float32), (8, mx.bfloat16), (16, mx.float16)]
PAIR_IDS = ["4-float32", "8-bfloat16", "16-float16"]


def prove_stack(stack, bits, dtype, builds):
    layer = Layer(stack, bits, dtype)
    got = prove(layer, layer.expected(), builds)
    assert got["y"].dtype == dtype


# Bits and shapes, each with one dtype in turns; 4 bits and unquantized ones with every dtype.
COMBINATIONS = [
    pytest.param(Stack(*shape), bits, dtype, id=f"{Stack(*shape)}-{bits}-{ids([dtype])[0]}")
    for i, bits in enumerate(BITS)
    for j, shape in enumerate(SHAPES)
    for k, dtype in enumerate(DTYPES)
    if k == (i + j) % 3 or (bits in (4, 16) and shape[-1] == MIXED)
]


@pytest.mark.parametrize(("stack", "bits", "dtype"), COMBINATIONS)
def test_experts(stack, bits, dtype):
    turn = (SHAPES, tuple(stack)), (BITS, bits), (DTYPES, dtype)
    prove_stack(stack, bits, dtype, in_turns(*turn))


@every_stack(SHAPES[1:3])
@pytest.mark.parametrize(
    ("bits", "shared", "dtype"),
    [(3, (8, 32), mx.bfloat16), (16, (5, 32), mx.float32), (2, (16, 0), mx.float16)],
    ids=["3-8-bfloat16", "16-5-float32", "2-16-float16"],
)
def test_a_shared_expert_that_is_stored_otherwise(stack, bits, shared, dtype):
    layer = Layer(stack, bits, dtype, shared)
    prove(layer, layer.expected(), ["check"] if bits == 3 else [])


@every_stack(SMALL)
@pytest.mark.parametrize(("bits", "dtype"), PAIRS, ids=PAIR_IDS)
def test_few_experts(stack, bits, dtype):
    prove_stack(stack, bits, dtype, ["check"] if bits == 8 else [])


@every_stack(LARGEST)
@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, mx.bfloat16), (16, mx.float32)], ids=["4-bfloat16", "16-float32"]
)
def test_experts_at_the_limits(stack, bits, dtype):
    prove_stack(stack, bits, dtype, ["check"])


@pytest.mark.parametrize(
    ("bits", "G", "outputs", "columns", "taken"),
    [
        *((4, 32, 8, 32, True), (8, 32, 8, 32, True), (16, 0, 8, 32, True), (7, 32, 8, 32, False)),
        *((4, 64, 8, 64, True), (4, 128, 8, 128, True), (4, 16, 8, 32, False)),
        *((8, 32, 24, 96, True), (8, 32, 12, 96, False), (16, 0, 12, 32, False)),
        *((16, 0, 8, 48, False), (16, 0, 8, 16, False), (6, 32, 8, 96, True)),
        *((3, 32, 8, 32, True), (2, 32, 8, 96, True), (5, 32, 8, 48, False)),
    ],
)
def test_takes_experts(bits, G, outputs, columns, taken):
    words = columns if bits == 16 else columns * bits // 32
    assert kernels.takes_experts((2, outputs, words), bits, G) == taken


def mixture(x, logits, gate_up, down, residual, case):
    routing = kernels.route(logits, **case.options)
    y = kernels.expert_gate_up(x, gate_up, routing)
    return kernels.expert_down(y, down, routing, residual[None])[0]


@pytest.mark.parametrize(
    ("bits", "dtype", "build"),
    [(4, mx.float32, "fma"), *((*pair, "fast") for pair in PAIRS)],
    ids=["4-float32-fma", *PAIR_IDS],
)
def test_a_row_does_not_depend_on_the_others(bits, dtype, build):
    case = Routed(5, 6, 3, True, True)  # several rows an expert
    gate_up = Layer(Stack(True, 32, 96, 32, ((6,),)), bits, dtype).weights
    down = Layer(Stack(False, 24, 32, 32, ((6,),)), bits, dtype).weights
    logits = case.logits(dtype)
    x, residual = normal(5, 96, dtype=dtype), normal(5, 24, dtype=dtype)
    with executed(build=build):
        every = mixture(x, logits, gate_up, down, residual, case)
        for rows in ([3], [4, 1, 2]):
            of = [a[mx.array(rows)] for a in (x, logits)]
            some = mixture(*of, gate_up, down, residual[mx.array(rows)], case)
            assert_same_bits(f"rows {rows}", some, every[mx.array(rows)])
        for spoiled in (mx.inf, mx.nan):
            bad, bad_logits = mx.array(x), mx.array(logits)
            bad[2, 40] = spoiled
            bad_logits[3] = spoiled
            y = mixture(bad, bad_logits, gate_up, down, residual, case)
            rest = mx.array([0, 1, 4])
            assert_same_bits("rows beside", y[rest], every[rest])
            assert not mx.isfinite(y[2]).all()


def test_the_mixture():
    """The three kernels together, as the layer runs them."""
    case = Routed(5, 6, 3, True, True)
    dtype = mx.float32
    gate_up = Layer(Stack(True, 32, 96, 32, ((6,),)), 4, dtype)
    down = Layer(Stack(False, 24, 32, 32, ((6,),)), 4, dtype)
    logits, x, residual = case.logits(dtype), normal(5, 96), normal(5, 24)
    chosen, weights = reference.route(logits[:, :6], 3, True)
    chosen = mx.concatenate([chosen, mx.full((5, 1), 6, mx.int32)], axis=1)
    weights = mx.concatenate([weights, mx.sigmoid(logits[:, 6:])], axis=1)
    gate, up = mx.split(gate_up.exact[chosen] @ x[:, None, :, None], 2, axis=2)
    y = down.exact[chosen] @ (gate * mx.sigmoid(gate) * up)
    expected = residual + (weights[..., None] * y[..., 0]).sum(axis=1)
    with executed() as launches:
        result = mixture(x, logits, gate_up.weights, down.weights, residual, case)
    assert_close("y", result, expected)
    assert launches == {"router": 1, "expert_gate_up": 1, "expert_down": 1}


# --- the text ------------------------------------------------------------------------------------
@by_host
def test_text():
    def calls(dtype):
        for case in ROUTED + LIMITS:
            kernels.route(case.logits(dtype), **case.options)
        for shape in SHAPES[1:3]:
            for bits in BITS:
                Layer(Stack(*shape), bits, dtype)()
            Layer(Stack(*shape), 3, dtype, shared=(8, 32))()

    assert mistakes_in_text(*(lambda d=dtype: calls(d) for dtype in DTYPES)) == []
