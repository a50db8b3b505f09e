"""Adapters: mlx_lm.lora's are added as mlx-lm adds them, and every fault in one is named."""

import json
import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from test_load import assert_same_parameters
from test_load_errors import digest, write_header

from mlx_qwen3next import load
from mlx_qwen3next.checkpoint.adapter import add_adapter, read_adapter
from mlx_qwen3next.checkpoint.loading import load_model

LAYERS = 2
LORA = {"rank": 2, "scale": 5.0, "dropout": 0.5}
QUERY = "model.layers.3.self_attn.q_proj"


def bundled():
    return load_model(dtype=mx.float32, pack=False)


def write(directory, kind="lora", keys=None):
    """Writes an adapter with noise in place of training, as mlx_lm.lora does."""
    parameters = LORA | ({"keys": keys} if keys else {})
    model = bundled()
    model.freeze()
    if kind == "full":
        for layer in model.layers[-LAYERS:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, LAYERS, parameters, use_dora=kind == "dora")
    weights = {
        name: w if w.dtype == mx.uint32 else mx.random.normal(w.shape, key=mx.random.key(i)) * 0.1
        for i, (name, w) in enumerate(tree_flatten(model.trainable_parameters()))
    }
    config = {"fine_tune_type": kind, "num_layers": LAYERS, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "adapters.safetensors"), weights)
    return directory


@pytest.fixture
def adapter(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_model_is_that_of_mlx_lm(tmp_path, kind):
    write(tmp_path, kind, keys=["self_attn.q_proj"] if kind == "dora" else None)
    model, reference = bundled(), bundled()
    add_adapter(model, read_adapter(tmp_path))
    load_adapters(reference, str(tmp_path))
    assert_same_parameters(model, reference)
    assert not model.training
    tokens = mx.array([[*range(9)]])
    loaded, _ = load(dtype=mx.float32, adapter_path=tmp_path, pack=False)
    assert mx.array_equal(loaded(tokens), model(tokens))
    assert not mx.allclose(loaded(tokens), bundled()(tokens), atol=1e-3)


# --- faults --------------------------------------------------------------------------------------
def refusal(directory):
    """The message that an adapter is refused with."""
    before = digest(directory)
    with pytest.raises(ValueError) as caught:
        load(adapter_path=directory)
    assert digest(directory) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(directory, change):
    """Applies a change to the adapter's tensors; returns their file."""
    file = directory / "adapters.safetensors"
    tensors = mx.load(str(file))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors)
    return file


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("part", ["lora_a", "lora_b"])
def test_not_finite(adapter, part, value):
    name = f"{QUERY}.{part}"

    def spoil(tensors):
        tensors[name][1, 1] = value

    file = edit(adapter, spoil)
    assert refusal(adapter) == f"{file}: {name} holds NaN or infinite values"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.99.self_attn.q_proj.lora_a",
        "model.layers.3.self_attn.qkv_proj.lora_b",
        "model.layers.3.self_attn.q_proj.lora_c",
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.mlp.gate.lora_a",  # a layer before the last two
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
    ],
)
def test_tensor_without_a_place(adapter, name):
    file = edit(adapter, lambda tensors: tensors.update({name: mx.ones((2, 2))}))
    assert refusal(adapter) == f"{file}: the tensor {name} has no place in this model"


def test_full_fine_tune_of_another_model(tmp_path):
    """The bundled model's projections are quantized; those of what it was made from were not."""
    write(tmp_path, "full")
    weight = f"{QUERY}.weight"
    file = edit(tmp_path, lambda tensors: tensors.update({weight: tensors[weight] * 1.0}))
    assert refusal(tmp_path) == f"{file}: {weight} is F32, not U32"
    name = "model.layers.99.input_layernorm.weight"
    file = edit(tmp_path, lambda tensors: tensors.update({name: mx.ones((2,))}))
    assert refusal(tmp_path) == f"{file}: the tensor {name} has no place in this model"


@pytest.mark.parametrize("part", ["lora_a", "lora_b"])
def test_tensor_of_another_shape(adapter, part):
    name = f"{QUERY}.{part}"
    shape = list(mx.load(str(adapter / "adapters.safetensors"))[name].shape)
    file = edit(adapter, lambda tensors: tensors.update({name: mx.ones([*shape, 1])}))
    assert refusal(adapter) == (
        f"{file}: {name} has shape {[*shape, 1]}, but the config asks for {shape}"
    )


@pytest.mark.parametrize("part", ["lora_a", "lora_b"])
def test_half_of_a_layer(adapter, part):
    edit(adapter, lambda tensors: tensors.pop(f"{QUERY}.{part}"))
    message = f"{adapter}: the tensor {QUERY}.{part} is missing from every file"
    assert refusal(adapter) == message


def test_integers(adapter):
    name = f"{QUERY}.lora_a"
    file = edit(adapter, lambda tensors: tensors.update({name: tensors[name].astype(mx.int32)}))
    assert refusal(adapter) == f"{file}: {name} is I32, not BF16 or F16 or F32"


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_missing_file(adapter, name):
    (adapter / name).unlink()
    assert refusal(adapter) == f"{adapter} holds no usable adapter: {name} is missing"


def test_no_directory(adapter):
    for path in (adapter / "missing", adapter / "adapters.safetensors"):
        with pytest.raises(ValueError) as caught:
            load(adapter_path=path)
        assert str(caught.value) == f"{path} is no directory, as an adapter of mlx_lm.lora is"


def test_files_that_are_none(adapter):
    file = adapter / "adapters.safetensors"
    write_header(file, {})
    assert refusal(adapter) == f"{file} holds no tensors"
    file.write_bytes(b"none")
    assert refusal(adapter).startswith(f"{file} is truncated in its header, or no safetensors")
    (adapter / "adapter_config.json").write_text("{")
    assert refusal(adapter).startswith(f"{adapter / 'adapter_config.json'} is not valid JSON")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": ...}, " lacks num_layers"),
        ({"lora_parameters": ...}, " lacks lora_parameters"),
        ({"num_layers": "2"}, ": no adapter can be made: "),
        ({"lora_parameters": {}}, ": no adapter can be made: "),
        ({"lora_parameters": LORA | {"dropout": 2}}, ": no adapter can be made: "),
        ({"fine_tune_type": "dora"}, ": no adapter can be made: "),  # experts cannot have it
    ],
    ids=str,
)
def test_config_that_makes_no_adapter(adapter, changes, said):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    assert refusal(adapter).startswith(f"{file}{said}")


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("config", [{"peft_type": "LORA", "r": 8}, None], ids=str)
def test_pefts_form(tmp_path, weights, config):
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {name: mx.ones((2, 2))})
    (tmp_path / "x.safetensors").rename(tmp_path / weights)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds an adapter in PEFT's form ({weights}); the form of mlx_lm.lora is "
        "needed (adapters.safetensors and its adapter_config.json)"
    )


def test_pefts_config_beside_other_weights(adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert refusal(adapter).startswith(
        f"{adapter} holds an adapter in PEFT's form (adapter_config.json has peft_type); "
    )
