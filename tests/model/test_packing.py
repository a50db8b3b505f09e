"""A packed model computes what it was packed from."""

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import GOLDENS, relative_error
from mlx.utils import tree_flatten

from mlx_qwen3next import load_model
from mlx_qwen3next.model.cache import Round
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.packed import packing, widening
from mlx_qwen3next.model.packed.layers import PackedSparseMoE
from mlx_qwen3next.model.packed.packing import pack
from mlx_qwen3next.model.qwen3_next import Model, SparseMoE

CASES = ("base", "base_fused", "dense", "eps", "permutation")


def outputs(model):
    """Logits of a long prompt, a step, a round and the step after it; the head's, if it has one."""
    cache, text = model.make_cache(), mx.array([[*range(2, 72)]]) % 80
    results = [model(text, cache), model(mx.array([[5]]), cache)]
    with Round(cache, 4) as last:
        results.append(model(mx.array([[7, 8, 9, 10]]), cache))
        last.commit(2)
    results.append(model(mx.array([[11]]), cache))
    if model.mtp is not None:
        results.append(model.mtp(model.model(text), text, model.mtp.make_cache()))
    return results


def assert_same(packed, plain):
    for a, b in zip(outputs(packed), outputs(plain), strict=True):
        # Rows of a matmul may be summed in another order when there are more of them.
        assert relative_error(a.astype(mx.float32), b.astype(mx.float32)) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_goldens(case):
    assert_same(load_model(GOLDENS / case), load_model(GOLDENS / case, pack=False))


def quantized(predicate):
    """The golden `base`, its weights quantized by a predicate of path and module."""
    model = load_model(GOLDENS / "base", dtype=mx.float32, pack=False)
    nn.quantize(model, class_predicate=lambda p, m: hasattr(m, "to_quantized") and predicate(p, m))
    return model


def all_alike(**how):
    return lambda path, module: {"group_size": 32, **how}


@pytest.mark.parametrize(
    "how",
    [{"bits": 2}, {"bits": 4}, {"bits": 5}, {"bits": 8}, {"bits": 4, "mode": "mxfp4"}],
    ids=str,
)
def test_quantized(how):
    assert_same(pack(quantized(all_alike(**how))), quantized(all_alike(**how)))


def test_all_is_packed_where_all_is_alike():
    model = pack(quantized(all_alike(bits=4)))
    assert_all_is_packed(model)
    for layer in [*model.layers, *model.mtp.layers]:
        assert layer.mlp.down_proj.weight.shape[0] == layer.mlp.num_experts + 1


def assert_all_is_packed(model):
    for layer in [*model.layers, *model.mtp.layers]:
        mixer = layer.linear_attn if layer.is_linear else layer.self_attn
        names = {path for path, _ in tree_flatten(mixer.parameters())}
        assert not [name for name in names if name.startswith(("in_proj_", "q_p", "k_p", "v_"))]
        assert not names & {"A_log", "dt_bias", "norm.weight"}
        assert set(layer.mlp) >= {"gate", "gate_up_proj", "down_proj"}
        assert not set(layer.mlp) & {"switch_mlp", "shared_expert", "shared_expert_gate"}
        assert layer.mlp.gate.weight.shape[0] == layer.mlp.num_experts + 1


def is_shared_expert_apart(mlp):
    """Whether it has a stack of its own, for the launches of the others."""
    return "gate_up_proj" in mlp.get("shared_expert", {}) and "shared_expert_gate" not in mlp


MIXED = {
    "in_proj_ba": lambda layer: "in_proj" not in layer.linear_attn,
    "k_proj": lambda layer: "in_proj" not in layer.self_attn,
    "switch_mlp.up_proj": lambda layer: not isinstance(layer.mlp, PackedSparseMoE),
    "switch_mlp.down_proj": lambda layer: is_shared_expert_apart(layer.mlp),
    "shared_expert.up_proj": lambda layer: "shared_expert" in layer.mlp,
    "shared_expert_gate": lambda layer: "shared_expert" in layer.mlp,
}


OTHERWISE = {"8 bits": {"bits": 8, "group_size": 32}, "floats": False}


@pytest.mark.parametrize("how", OTHERWISE)
@pytest.mark.parametrize("other", MIXED)
def test_parts_of_other_bits_stay_apart(other, how, monkeypatch):
    monkeypatch.setattr(widening, "FEW", 0)

    def predicate(path, module):
        return OTHERWISE[how] if path.endswith(other) else {"group_size": 32, "bits": 4}

    model = pack(quantized(predicate))
    layers = [layer for layer in model.layers if layer.is_linear == (other != "k_proj")]
    assert all(MIXED[other](layer) for layer in layers)
    assert_same(model, quantized(predicate))


@pytest.mark.parametrize("bits", [3, 6])
def test_dense_parts_of_more_bits_than_the_experts(bits):
    """As recipes choose them: the shared expert is apart, and all else is packed."""

    def predicate(path, module):
        return {"group_size": 32, "bits": bits if "switch_mlp" in path else 8}

    model = pack(quantized(predicate))
    for layer in [*model.layers, *model.mtp.layers]:
        assert is_shared_expert_apart(layer.mlp)
        assert "in_proj" in (layer.linear_attn if layer.is_linear else layer.self_attn)
    assert_same(model, quantized(predicate))


@pytest.mark.parametrize("bits", [3, 5])
def test_a_few_codes_are_stored_at_more_bits(bits):
    """With the values that they have: in all that is stacked, every second part is narrower."""
    narrow = "q_proj", "v_proj", "in_proj_ba", "gate_proj", "shared_expert_gate"

    def predicate(path, module):
        wide = {"group_size": 32, "bits": bits + 1}
        return {"group_size": 64, "bits": bits} if path.endswith(narrow) else wide

    model, plain = pack(quantized(predicate)), quantized(predicate)
    assert_all_is_packed(model)
    assert_same(model, plain)


def test_a_shared_expert_of_another_width_stays_apart():
    model = load_model(GOLDENS / "eps")
    assert all("shared_expert" in layer.mlp for layer in model.layers)


def test_mxfp4_experts_stay_as_they_are():
    model = pack(quantized(all_alike(bits=4, mode="mxfp4")))
    assert all(type(layer.mlp) is SparseMoE for layer in model.layers)


def test_packing_again_changes_nothing():
    once = load_model(GOLDENS / "base")
    before = dict(tree_flatten(once.parameters()))
    twice = pack(once)
    assert twice is once
    after = dict(tree_flatten(twice.parameters()))
    assert before.keys() == after.keys()
    assert_same(twice, load_model(GOLDENS / "base", pack=False))


def test_training_and_saving_are_refused(tmp_path):
    model, file = load_model(GOLDENS / "base"), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="for inference; load it with pack=False to train it"):
        model.train()
    with pytest.raises(ValueError, match="for inference; load it with pack=False to save it"):
        model.save_weights(str(file))
    assert not file.exists()
    model.eval()
    unpacked = load_model(GOLDENS / "base", pack=False)
    unpacked.train()
    unpacked.save_weights(str(file))


def test_interrupted_it_is_not_packed(monkeypatch):
    model = load_model(GOLDENS / "base", pack=False)

    def interrupt(layer):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "packed_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(model)
    model.train()


@pytest.mark.parametrize("spoil", ["bias", "dtype"])
def test_a_shared_expert_of_another_kind_stays_apart(spoil):
    def model():
        made = load_model(GOLDENS / "base", dtype=mx.float32, pack=False)
        down = made.layers[0].mlp.shared_expert.down_proj
        if spoil == "bias":
            down.bias = mx.ones((64,))
        else:
            down.weight = down.weight.astype(mx.float16)
        return made

    packed = pack(model())
    assert "shared_expert" in packed.layers[0].mlp
    assert packed.layers[0].mlp.down_proj.weight.dtype == mx.float32
    assert_same(packed, model())


def test_memory_stays_near_the_models_size():
    """A layer at a time: nothing of the unpacked model remains, and two layers are the most."""
    raw = checkpoints.config("base") | {"num_hidden_layers": 16, "num_experts": 64}
    model = Model(Config.from_dict(raw))
    model.eval()
    mx.eval(model.parameters())
    largest = max(
        sum(a.nbytes for _, a in tree_flatten(layer.parameters())) for layer in model.layers
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pack(model)
    assert mx.get_peak_memory() - before < 2 * largest
    assert mx.get_active_memory() - before < 0.1 * largest
