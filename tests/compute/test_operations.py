"""The calls that kernels take; facts tell apart all that kinds tell apart."""

import mlx.core as mx
import pytest

from mlx_qwen3next.compute import attention, operations
from mlx_qwen3next.compute.gated_delta import DeltaWeights, LayerState, Tape
from mlx_qwen3next.compute.rope import Rope, Yarn
from mlx_qwen3next.metal_kernels import Experts
from mlx_qwen3next.model.packed.layers import PackedGatedDeltaNet

HALF, FULL = mx.bfloat16, mx.float32


def kind(operation, *args, **options):
    return operation.kind(*operation.facts(*args, **options))


def norm(x=HALF, y=HALF, weight=FULL, H=64, rows=2):
    return mx.zeros((1, rows, H), x), mx.zeros((1, rows, H), y), mx.ones((H,), weight), 1e-6


def delta(x=HALF, before=HALF, state=FULL, vectors=FULL, L=2, Dk=32, tape=None, **options):
    Hk, Hv, Dv, K = 1, 2, 16, 4
    C = 2 * Hk * Dk + Hv * Dv
    arguments = (
        mx.zeros((1, L, C + Hv * Dv + 2 * Hv), x),
        LayerState(mx.zeros((1, K - 1, C), before), mx.zeros((1, Hv, Dv, Dk), state), tape),
        DeltaWeights(mx.zeros((C, K, 1), x), mx.ones((2 * Hv + Dv,), vectors)),
    )
    flags = {"key_heads": Hk, "mask": None, "recording": False, "lengths": None, "eps": 1e-6}
    return arguments, flags | options


def heads(x=HALF, q=FULL, k=FULL, offset=7, L=2, hd=32):
    arguments = mx.zeros((1, L, 6 * hd), x), mx.ones((hd,), q), mx.ones((hd,), k), offset
    sizes = {"heads": 2, "kv_heads": 1, "rope": Rope(16, 1e4, Yarn(4.0, 100, 1.25)), "eps": 1e-6}
    return arguments, sizes


def stored(E, outputs, columns, bits, scales, biases):
    groups = E, outputs, columns // 32
    words = mx.zeros((E, outputs, columns * bits // 32), mx.uint32)
    return words, mx.zeros(groups, scales), mx.zeros(groups, biases)


def shared_expert(bits=6, scales=HALF):
    stacks = (stored(1, *shape, bits, scales, scales) for shape in ((64, 64), (64, 32)))
    return tuple(Experts(*(a[0] for a in stack), 32, bits) for stack in stacks)


def experts(rows=2, x=HALF, scales=HALF, biases=HALF, residual=HALF, bits=4, top_k=2, **options):
    E, H, I = 8, 64, 32

    def stack(outputs, columns):
        return Experts(*stored(E, outputs, columns, bits, scales, biases), 32, bits)

    arguments = (
        *(mx.zeros((1, rows, H), x), mx.zeros((1, rows, E), x), stack(2 * I, H), stack(H, I)),
        mx.zeros((1, rows, H), residual),
    )
    return arguments, {"experts": E, "top_k": top_k, "normalise": True} | options


def test_norms():
    assert kind(operations.add_rms_norm, *norm()) == "bfloat16 rows=2 H=64"
    assert kind(operations.rms_norm, *norm(rows=9)[::2], 1e-6) == "bfloat16 rows=9-16 H=64"
    for refused in ({"y": FULL}, {"weight": HALF}, {"H": 4}, {"rows": 0}):
        assert kind(operations.add_rms_norm, *norm(**refused)) is None, refused


def test_gated_delta_step():
    arguments, options = delta()
    expected = "bfloat16 rows=2 B=1 Hk=1 Hv=2 Dk=32 Dv=16 K=4"
    assert kind(PackedGatedDeltaNet.mix, *arguments, **options) == expected
    for other, said in (
        ({"recording": True}, " round"),
        ({"tape": Tape(*[mx.zeros((1, 2, 2))] * 3)}, " replay"),
        ({"mask": 1}, " masked"),
    ):
        arguments, options = delta(**other)
        assert kind(PackedGatedDeltaNet.mix, *arguments, **options) == expected + said
    refusals = {"before": FULL, "state": HALF, "vectors": HALF, "Dk": 48, "L": 0, "lengths": 1}
    for name, value in refusals.items():
        arguments, options = delta(**{name: value})
        assert kind(PackedGatedDeltaNet.mix, *arguments, **options) is None, name


def test_attention():
    arguments, options = heads()
    expected = "bfloat16 rows=2 B=1 nh=2 nkv=1 hd=32 rotary=16"
    assert kind(operations.attention_heads, *arguments, **options) == expected
    for name, value in {"q": HALF, "k": HALF, "L": 0, "hd": 4, "offset": mx.array([1.0])}.items():
        arguments, options = heads(**{name: value})
        assert kind(operations.attention_heads, *arguments, **options) is None, name
    o, x = mx.zeros((1, 2, 3, 32), HALF), mx.zeros((1, 3, 192), HALF)
    assert (
        kind(operations.attention_gate, o, x, kv_heads=1)
        == "bfloat16 rows=3-4 B=1 nh=2 nkv=1 hd=32"
    )
    assert kind(operations.attention_gate, o, x.astype(FULL), kv_heads=1) is None


def test_sparse_experts():
    arguments, options = experts()
    expected = "bfloat16 rows=2 E=8 top=2 H=64 I=32 bits=4/32,4/32 normalised"
    assert kind(operations.sparse_experts, *arguments, **options) == expected
    arguments, options = experts(normalise=False)
    assert kind(operations.sparse_experts, *arguments, **options) == expected.removesuffix(
        " normalised"
    )
    arguments, options = experts(shared=shared_expert(), normalise=False, bits=3)
    said = kind(operations.sparse_experts, *arguments, **options)
    assert said.endswith(" bits=3/32,3/32,6/32,6/32")
    for name, value in {
        "scales": FULL,
        "biases": FULL,
        "residual": FULL,
        "bits": 7,
        "rows": 17,
        "shared": shared_expert(scales=FULL),
    }.items():
        arguments, options = experts(**{name: value})
        assert kind(operations.sparse_experts, *arguments, **options) is None, name


def chosen(logits=HALF, like=HALF, rows=32, E=8, top_k=2, columns=None):
    arrays = mx.zeros((rows, columns or E), logits), mx.zeros((rows, 64), like)
    return arrays, {"experts": E, "top_k": top_k, "normalise": True}


def test_choose():
    def said(**changes):
        arguments, options = chosen(**changes)
        return kind(operations.choose, *arguments, **options)

    assert said() == "bfloat16 rows=17-32 E=8 top=2 normalised"
    assert said(columns=9) == "bfloat16 rows=17-32 E=8 top=2 shared normalised"
    for refused in ({"like": FULL}, {"E": 1025}, {"rows": 31}, {"E": 64, "top_k": 32}):
        assert said(**refused) is None, refused
    assert said(rows=22, columns=9) is not None  # the shared expert makes 66 pairs


def combined(y=HALF, weights=HALF, residual=HALF, places=mx.uint32, rows=32, H=64):
    shape = rows, 3
    return (
        *(mx.zeros((3 * rows, H), y), mx.zeros(shape, places), mx.zeros(shape, weights)),
        mx.zeros((rows, H), residual),
    )


def test_combine():
    assert kind(operations.combine, *combined()) == "bfloat16 rows=17-32 k=3 H=64"
    for refused in ({"weights": FULL}, {"residual": FULL}, {"places": mx.int32}, {"H": 66}):
        assert kind(operations.combine, *combined(**refused)) is None, refused


@pytest.mark.parametrize("rows", [40, 3000])
def test_a_proof_of_combine_takes_the_first_rows(rows):
    """All experts of them, in mixed places, and no residual."""
    y, places, weights, residual = combined(rows=rows, H=8)
    places = mx.random.permutation(3 * rows).astype(mx.uint32).reshape(rows, 3)
    residual = residual + 1
    *_, of_residual = proved = operations.combine.proof(y, places, weights, residual)
    most = min(rows, operations.PROVED_ROWS)
    assert [len(a) for a in proved] == [3 * most, most, most, most]
    flat = proved[1].flatten()
    assert sorted(flat.tolist()) == [*range(3 * most)] != flat.tolist()
    assert not of_residual.any()
    whole = kind(operations.combine, y, places, weights, residual)
    assert kind(operations.combine, *proved) == whole  # so a finding is that of what was run


def test_kinds_of_rows():
    names = [
        operations.rows_class(rows).removeprefix("rows=")
        for rows in (1, 2, 3, 4, 5, 8, 9, 17, 2048)
    ]
    assert names == ["1", "2", "3-4", "3-4", "5-8", "5-8", "9-16", "17-32", "1025-2048"]


@pytest.mark.parametrize("offset", [0, 1000, mx.array([3, 900])], ids=["0", "1000", "each"])
def test_exact_heads_are_the_composition(offset):
    """Up to the angles, which are the same at small positions."""
    x = mx.random.normal((2, 3, 6 * 32), key=mx.random.key(1))
    weight = mx.linspace(0.5, 1.5, 32)
    _, options = heads()
    results = [
        f(x, weight, weight, offset, **options)
        for f in (operations._exact_heads, attention.attention_heads)
    ]
    for exact, composition in zip(*results, strict=True):
        assert (mx.linalg.norm(exact - composition) / mx.linalg.norm(composition)).item() < 1e-5
