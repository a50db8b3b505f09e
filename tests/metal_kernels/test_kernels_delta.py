"""The gated delta kernels: a step, a round that may be taken back, and the replay of its tape."""

from typing import NamedTuple

import mlx.core as mx
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

pytestmark = pytest.mark.metal

EPS = 1e-2  # large enough to count
ROWS = 16
MOST_ROWS = 20  # 1 + 2 + 3 + 5 + 9


class Case(NamedTuple):
    B: int
    Hk: int
    Hv: int
    Dk: int
    Dv: int
    K: int
    masked: bool = False
    slow: bool = False  # q and k so short that l2norm's eps counts, softplus small; float32 taps

    def __str__(self):
        sizes = zip(self._fields, self[:6], strict=False)
        names = "-".join(f"{name}{size}" for name, size in sizes)
        return names + "-masked" * self.masked + "-slow" * self.slow


CASES = [
    Case(1, 1, 3, 32, 8, 4),  # inputs of fewer than 8 elements
    Case(2, 2, 4, 32, 48, 4, masked=True),
    Case(3, 2, 2, 64, 24, 3, slow=True),
    Case(1, 1, 2, 128, 128, 4),
    Case(1, 2, 6, 32, 40, 3),
]
LIMITS = [  # of registers, and chunks of 3 to 8 tokens
    Case(1, 1, 1, 256, 128, 4),
    Case(1, 1, 1, 1024, 32, 2),
    Case(1, 1, 1, 32, 1024, 4),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))


class Layer:
    """Inputs of a step and of the ones after it, from a position in the middle of a sequence."""

    def __init__(self, case, dtype, rows=MOST_ROWS):
        mx.random.seed(sum(case))
        B, Hk, Hv, Dk, Dv, K = case[:6]
        C = 2 * Hk * Dk + Hv * Dv
        x = normal(B, rows, C + Hv * Dv + 2 * Hv)
        if not case.slow:
            x[..., -Hv:] = 6 * x[..., -Hv:]  # softplus where it bends and where it does not
            x[:, 4::5, -Hv:] = -25.0
        self.x = x.astype(dtype)
        self.before = normal(B, K - 1, C, dtype=dtype)
        self.state = normal(B, Hv, Dv, Dk)
        taps = normal(C, K, 1) / 2
        dt_bias = normal(Hv)
        if case.slow:
            taps[: 2 * Hk * Dk] *= 1e-3
            dt_bias -= 10 * (1 + mx.arange(Hv))
        self.taps = taps if case.slow else taps.astype(dtype)
        self.vectors = normal(Hv), dt_bias, normal(Dv)
        self.key_heads = Hk
        self.mask = None
        if case.masked:  # padding left, right and in between
            columns, lengths = mx.arange(rows)[None], 3 * mx.arange(B)[:, None]
            self.mask = (columns >= lengths + 1) & (columns % 7 != 5) & (columns != 15 - lengths)
        mx.eval(self.x)

    def step(self, start, stop, before=None, state=None, tape=(), keep=0, *, recording=False):
        return kernels.gated_delta_step(
            self.x[:, start:stop],
            self.before if before is None else before,
            self.state if state is None else state,
            *(tape, keep, self.taps, mx.concatenate(self.vectors)),
            eps=EPS,
            key_heads=self.key_heads,
            mask=None if self.mask is None else self.mask[:, start:stop],
            recording=recording,
        )

    def expected(self, stop):
        """By the reference: o, the state and the tape after the first tokens."""
        Hk, (B, Hv, Dv, Dk) = self.key_heads, self.state.shape
        C, (A_log, dt_bias, norm_weight) = self.before.shape[2], self.vectors
        x = self.x[:, :stop].astype(mx.float32)
        mask = mx.ones((B, stop), mx.bool_) if self.mask is None else self.mask[:, :stop]
        qkv, z, b, a = mx.split(x, [C, C + Hv * Dv, C + Hv * Dv + Hv], axis=-1)
        qkv = mx.where(mask[..., None], qkv, 0)
        beta = mx.where(mask[..., None], mx.sigmoid(b), 0)
        g = mx.where(mask[..., None], reference.decay(a, A_log, dt_bias), 0)
        rows = mx.concatenate([self.before.astype(mx.float32), qkv], axis=1)
        y, _ = reference.causal_conv(qkv, self.taps, self.before)
        q, k, v = mx.split(y, [Hk * Dk, 2 * Hk * Dk], axis=-1)
        q = reference.l2norm(q.reshape(B, stop, Hk, Dk)) * Dk**-0.5
        k = reference.l2norm(k.reshape(B, stop, Hk, Dk))
        v = v.reshape(B, stop, Hv, Dv)
        o, delta, S = [], [], self.state
        for t in range(stop):
            key = mx.repeat(k[:, t], Hv // Hk, axis=1)[..., None]
            predicted = (S * mx.exp(g[:, t])[..., None, None] @ key)[..., 0]
            delta.append(beta[:, t, :, None] * (v[:, t] - predicted))
            at = slice(t, t + 1)
            out, S = reference.gated_delta_rule(*(i[:, at] for i in (q, k, v, g, beta)), S)
            o.append(out)
        o = mx.concatenate(o, axis=1)
        o = reference.gated_rms_norm(o, z.reshape(o.shape), norm_weight, EPS)
        o, delta = o.reshape(B, stop, Hv * Dv), mx.stack(delta, axis=1)
        plain = {"o": o, "state": S, "rows": rows[:, stop:]}
        tape = {"g": g, "k": k, "delta": delta}
        return {**plain, "round's o": o, "round's state": self.state, "round's rows": rows, **tape}


def prove_case(case, dtype, builds):
    layer = Layer(case, dtype)

    def call():
        return [*layer.step(0, ROWS), *layer.step(0, ROWS, recording=True)]

    expected = layer.expected(ROWS)
    got = prove(call, expected, builds)
    for head in range(case.Hv):  # whose decays differ by orders of magnitude
        assert_close(f"g of head {head}", got["g"][..., head], expected["g"][..., head])
    assert_same_bits("round's o", got["round's o"], got["o"])
    assert_same_bits("round's state", got["round's state"], layer.state)
    assert got["o"].dtype == got["rows"].dtype == got["round's rows"].dtype == dtype


@every_case
@every_dtype
def test_step_and_round(case, dtype):
    prove_case(case, dtype, in_turns((CASES, case), (DTYPES, dtype)))


@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_step_and_round_at_the_limits(case):
    assert kernels.takes_gated_delta(ROWS, case.Dk, case.Dv)
    prove_case(case, mx.bfloat16, ["check"])


@pytest.mark.parametrize(
    ("L", "Dk", "Dv", "taken"),
    [
        *((1, 32, 8, True), (0, 32, 8, False), (16, 32, 8, True), (99, 32, 8, True)),
        *((1, 16, 8, False), (1, 48, 8, False), (1, 32, 7, False), (1, 32, 31, True)),
        *((1, 256, 128, True), (1, 288, 128, False), (1, 256, 160, False), (1, 128, 256, True)),
        *((1, 1024, 32, True), (1, 1056, 32, False), (1, 32, 1024, True), (1, 32, 1056, False)),
        (1, 32, 37, False),  # a prime: one simdgroup would own all rows
    ],
)
def test_takes(L, Dk, Dv, taken):
    assert kernels.takes_gated_delta(L, Dk, Dv) == taken


@every_case
@pytest.mark.parametrize(
    ("dtype", "build"),
    [(mx.float32, "fma"), *((dtype, "fast") for dtype in DTYPES)],
    ids=["float32-fma", *ids(DTYPES)],
)
def test_results_do_not_depend_on_the_length_of_a_step(case, dtype, build):
    layer = Layer(case, dtype)
    start, before, state = 0, layer.before, layer.state
    with executed(build=build):
        o, *after = layer.step(0, MOST_ROWS)
        _, _, rows, *tape = layer.step(0, MOST_ROWS, recording=True)
        for T in (1, 2, 3, 5, 9):
            stop = start + T
            again, _, some_rows, *part = layer.step(start, stop, before, state, recording=True)
            out, state, before = layer.step(start, stop, before, state)
            assert_same_bits(f"o, T={T}", out, o[:, start:stop])
            assert_same_bits(f"round's o, T={T}", again, out)
            assert_same_bits(f"round's rows, T={T}", some_rows, rows[:, start : stop + case.K - 1])
            for name, some, whole in zip(("g", "k", "delta"), part, tape, strict=True):
                assert_same_bits(f"{name}, T={T}", some, whole[:, start:stop])
            start = stop
    assert_same_bits("state", state, after[0])
    assert_same_bits("rows", before, after[1])


REPLAYS = [
    *((case, 9, DTYPES[i % 3], "fast") for i, case in enumerate(CASES)),
    *((CASES[0], n, dtype, "fast") for n in (1, 2) for dtype in DTYPES),  # small tapes
    *((case, 5, mx.float32, "fma") for case in CASES),
    (CASES[4], 16, mx.float16, "fast"),
    (CASES[1], 3, mx.bfloat16, "check"),
    (CASES[0], 2, mx.bfloat16, "check"),
    (LIMITS[1], 2, mx.bfloat16, "fast"),
]


@pytest.mark.parametrize(
    ("case", "n", "dtype", "build"),
    [pytest.param(*r, id=f"{r[0]}-n{r[1]}-{ids([r[2]])[0]}-{r[3]}") for r in REPLAYS],
)
def test_a_taken_back_round_leaves_the_very_bits_of_the_kept_tokens(case, n, dtype, build):
    layer = Layer(case, dtype)
    with executed(build=build) as launches:
        _, _, rows, *tape = layer.step(0, n, recording=True)
        for keep in range(n + 1):
            state, before = layer.state, layer.before
            if keep:
                _, state, before = layer.step(0, keep)
            expected = layer.step(n, n + 3, before, state)
            named = zip(("o", "state", "rows"), expected, strict=True)

            replayed = kernels.gated_delta_replay(layer.state, *tape, keep)
            assert_same_bits(f"replayed, keep={keep}", replayed, state)
            got = layer.step(n, n + 3, rows, layer.state, tape, keep)
            for (name, value), result in zip(named, got, strict=True):
                assert_same_bits(f"{name}, keep={keep}", result, value)
            o, same_state, new_rows, *_ = layer.step(
                n, n + 3, rows, layer.state, tape, keep, recording=True
            )
            assert_same_bits(f"round's o, keep={keep}", o, expected[0])
            assert_same_bits(f"round's state, keep={keep}", same_state, state)
            assert_same_bits(f"round's rows, keep={keep}", new_rows[:, -case.K + 1 :], expected[2])
            assert_same_bits(f"rows before, keep={keep}", new_rows[:, : case.K - 1], before)
    assert launches["gated_delta_replay"] == n + 1


@every_case
def test_replay_in_every_order_and_rounding(case):
    """Of any tape, not only of one that a round wrote."""
    layer = Layer(case, mx.float32)
    B, Hk, Hv, Dk, Dv = case[:5]
    tape = -mx.abs(normal(B, 5, Hv)), normal(B, 5, Hk, Dk), normal(B, 5, Hv, Dv)
    state = layer.state
    for t in range(4):
        g, k, delta = (x[:, t] for x in tape)
        key = mx.repeat(k, Hv // Hk, axis=1)[:, :, None]
        state = state * mx.exp(g)[..., None, None] + delta[..., None] * key
    prove(lambda: [kernels.gated_delta_replay(layer.state, *tape, 4)], {"state": state})


@pytest.mark.parametrize("recording", [False, True], ids=["step", "round"])
def test_padding_may_hold_anything(recording):
    layer = Layer(CASES[1], mx.bfloat16)
    valid = layer.mask[:, :ROWS, None]
    with executed():
        expected = layer.step(0, ROWS, recording=recording)
        layer.x = mx.where(layer.mask[..., None], layer.x, mx.array(mx.nan, layer.x.dtype))
        got = layer.step(0, ROWS, recording=recording)
    expected[0], got[0] = (mx.where(valid, o, 0) for o in (expected[0], got[0]))
    for i, (result, value) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"output {i}", result, value)


def test_a_sequence_does_not_spoil_another():
    layer = Layer(CASES[2], mx.float16)
    with executed():
        expected = layer.step(0, 3, recording=True)
        layer.x[1] = mx.inf
        got = layer.step(0, 3, recording=True)
    for i, (result, value) in enumerate(zip(got, expected, strict=True)):
        for b in (0, 2):
            assert_same_bits(f"output {i} of sequence {b}", result[b], value[b])


@by_host
def test_text():
    def calls(case, dtype):
        def call():
            layer = Layer(case, dtype)
            few = case.masked or case == CASES[0]  # masks and tapes of fewer than 8 elements
            for T in (1, ROWS) if few else (ROWS,):
                layer.step(0, T)
                _, _, rows, *tape = layer.step(0, T, recording=True)
                layer.step(0, T, rows, layer.state, tape, 1)
                layer.step(0, T, rows, layer.state, tape, 1, recording=True)
                kernels.gated_delta_replay(layer.state, *tape, 1)

        return call

    every = [calls(case, dtype) for case in CASES for dtype in DTYPES]
    assert mistakes_in_text(*every, *(calls(case, mx.bfloat16) for case in LIMITS)) == []
