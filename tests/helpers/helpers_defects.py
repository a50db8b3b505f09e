"""Small launches of the package's kernels, for defects to be made in; what a case returns is pairs
of arrays that must have the same bits."""

import mlx.core as mx
import numpy as np

from mlx_qwen3next import metal_kernels

EPS = 0.1  # of the norms, large, so that it is not taken for another


def numbers_from(seed, dtype):
    """A source of normal numbers that bfloat16 can hold."""
    generator = np.random.default_rng(seed)

    def normal(*shape, scale=1.0, kind=dtype):
        values = mx.array(generator.normal(0, scale, shape), mx.float32)
        return values.astype(mx.bfloat16).astype(kind)

    return normal


def rms_norm(dtype):
    normal = numbers_from(0, dtype)
    metal_kernels.rms_norm(normal(3, 328), normal(328, kind=mx.float32), EPS)


def add_rms_norm(dtype):
    normal = numbers_from(0, dtype)
    weight = normal(328, kind=mx.float32)
    total, normed = metal_kernels.add_rms_norm(normal(3, 328), normal(3, 328), weight, EPS)
    return [("normed", normed, metal_kernels.rms_norm(total, weight, EPS))]


class Delta:
    """Inputs of a Gated DeltaNet layer: 2 sequences, 2 value heads that share a key head."""

    B, Hk, Hv, Dk, Dv, K = 2, 1, 2, 64, 8, 4
    C = 2 * Hk * Dk + Hv * Dv

    def __init__(self, L, dtype):
        self.normal = normal = numbers_from(1, dtype)
        self.x = normal(self.B, L, self.C + self.Hv * self.Dv + 2 * self.Hv)
        self.before = normal(self.B, self.K - 1, self.C)
        self.state = normal(self.B, self.Hv, self.Dv, self.Dk, kind=mx.float32)
        self.vectors = normal(2 * self.Hv + self.Dv, kind=mx.float32)
        self.taps = normal(self.C, self.K, 1)

    def step(self, x, before, state, tape=(), keep=0, mask=None, recording=False):
        return metal_kernels.gated_delta_step(
            *(x, before, state, tape, keep, self.taps, self.vectors),
            **{"eps": EPS, "key_heads": self.Hk, "mask": mask, "recording": recording},
        )


def delta_step(dtype):
    """One sequence begins with padding."""
    d = Delta(10, dtype)
    mask = mx.array([[True] * 10, [False] * 3 + [True] * 7])
    d.step(d.x, d.before, d.state, mask=mask)


def delta_round(dtype):
    """After a round of which all three tokens are kept."""
    d = Delta(10, dtype)
    shapes = ((d.Hv,), (d.Hk, d.Dk), (d.Hv, d.Dv))
    g, k, delta = (d.normal(d.B, 3, *shape, kind=mx.float32) for shape in shapes)
    before = mx.concatenate([d.before, d.normal(d.B, 3, d.C)], 1)
    d.step(d.x, before, d.state, (-mx.abs(g), 0.1 * k, delta), 3, recording=True)


def delta_replay(dtype):
    """Two of three tokens kept, by a step and by the replay alone, against two plain tokens."""
    d = Delta(4, dtype)
    _, state, rows, *tape = d.step(d.x[:, :3], d.before, d.state, recording=True)
    _, kept_state, kept_rows = d.step(d.x[:, :2], d.before, d.state)
    replayed = metal_kernels.gated_delta_replay(state, *tape, 2)
    after = d.step(d.x[:, 3:], rows, state, tape, 2)
    expected = d.step(d.x[:, 3:], kept_rows, kept_state)
    names = ("o", "state after a step", "rows")
    return [("replayed state", replayed, kept_state), *zip(names, after, expected, strict=True)]


def heads(dtype):
    normal = numbers_from(2, dtype)
    x, weights = normal(2, 2, 6 * 128), normal(2, 128, kind=mx.float32)
    frequencies = mx.array(10.0 ** -np.arange(0, 4, 0.25), mx.float32)
    metal_kernels.attention_heads(
        *(x, *weights, frequencies, mx.array([5, 0])),
        **{"eps": EPS, "attention_factor": 1.25, "heads": 2, "kv_heads": 1},
    )


def gate(dtype):
    normal = numbers_from(3, dtype)
    metal_kernels.attention_gate(normal(2, 2, 3, 32), normal(2, 3, 6 * 32), kv_heads=1)


EXPERTS, TOP = 64, 3


def routed(dtype):
    """Three rows that share experts. Row 0's third best is a tie in a lane, row 1's of lanes."""
    logits = np.random.default_rng(4).normal(0, 1, (3, EXPERTS + 1))
    logits[:, [7, 20]] = [[9, 8], [8, 9], [9, 8]]
    logits[0, [5, 37]] = logits[1, [12, 11]] = 6
    return metal_kernels.route(
        mx.array(logits).astype(mx.bfloat16).astype(dtype),
        **{"experts": EXPERTS, "top_k": TOP, "normalise": True},
    )


def chosen(dtype):
    logits = np.random.default_rng(9).normal(0, 1, (3, EXPERTS + 1))
    metal_kernels.choose(
        mx.array(logits).astype(mx.bfloat16).astype(dtype),
        **{"experts": EXPERTS, "top_k": TOP, "normalise": True},
    )


def stack(normal, outputs, bits, experts=EXPERTS + 1):
    weight = normal(experts, outputs, 256, scale=1 / 16)
    if bits == 16:
        return metal_kernels.Experts(weight)
    words, *groups = mx.quantize(weight.astype(mx.bfloat16), 64, bits)
    return metal_kernels.Experts(words, *(g.astype(weight.dtype) for g in groups), 64, bits)


def gate_up(dtype, bits=4):
    normal = numbers_from(5, dtype)
    metal_kernels.expert_gate_up(normal(3, 256), stack(normal, 24, bits), routed(dtype))


def gate_up_3(dtype):
    gate_up(dtype, 3)


def gate_up_6(dtype):
    gate_up(dtype, 6)


def gate_up_16(dtype):
    gate_up(dtype, 16)


def gate_up_apart(dtype):
    """The shared expert, which every row has, is stored otherwise than the others."""
    normal = numbers_from(5, dtype)
    weights, shared = stack(normal, 24, 3, EXPERTS), stack(normal, 24, 8, 1)
    metal_kernels.expert_gate_up(normal(3, 256), weights, routed(dtype), shared)


def down(dtype):
    normal = numbers_from(6, dtype)
    x, residual = normal(3 * (TOP + 1), 256), normal(1, 3, 24)
    metal_kernels.expert_down(x, stack(normal, 24, 4), routed(dtype), residual)


def down_apart(dtype):
    normal = numbers_from(6, dtype)
    x, residual = normal(3 * (TOP + 1), 256), normal(1, 3, 24)
    weights, shared = stack(normal, 24, 2, EXPERTS), stack(normal, 24, 5, 1)
    metal_kernels.expert_down(x, weights, routed(dtype), residual, shared)


def combined(dtype):
    normal = numbers_from(7, dtype)
    places = mx.array(np.random.default_rng(8).permutation(15).reshape(3, 5), mx.uint32)
    metal_kernels.combine(normal(15, 24), places, normal(3, 5), normal(3, 24))
