"""Loading: every layout a checkpoint comes in gives the same model, exactly."""

import json
import math
import shutil

import checkpoints
import configs
import float64
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from checkpoints import CASES, GOLDENS, relative_error

from mlx_qwen3next import load, load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.checkpoint.loading import default_dtype
from mlx_qwen3next.model import layouts, mtp_head
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model

TOLERANCE = 1e-4  # float32 noise is 2e-5 at most, the smallest structural mistake 1e-2


def load32(directory):
    return load_model(directory, dtype=mx.float32, pack=False)


def tokens(case):
    return mx.array(checkpoints.expected(case)["tokens"])[None]


def assert_same_parameters(result, reference):
    """Bit for bit, dtypes included."""
    result, reference = checkpoints.parameters(result), checkpoints.parameters(reference)
    assert result.keys() == reference.keys()
    for path, array in reference.items():
        assert result[path].dtype == array.dtype, path
        assert mx.array_equal(result[path], array), path


def assert_golden_logits(model, case):
    assert relative_error(model(tokens(case)), checkpoints.expected(case)["logits"]) < TOLERANCE


def assert_golden_head(model, case):
    """The head alone: from the golden's hidden states."""
    expected = checkpoints.expected(case)
    hidden = mx.array(expected["hidden.final"][:-1])[None]
    m = model.mtp(hidden, tokens(case)[:, 1:])
    assert relative_error(m, expected["mtp_hidden"]) < TOLERANCE
    assert relative_error(model.logits(m), expected["mtp_logits"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_hub_layout_gives_the_golden_logits(case):
    model = load32(GOLDENS / case)
    assert_golden_logits(model, case)
    assert_golden_head(model, case)


def trunk_and_head(case):
    return checkpoints.split(checkpoints.tensors(case))


def sharded(directory, case):
    """As on the hub: the trunk over some shards, the head in a shard after them."""
    trunk, head = trunk_and_head(case)
    names = sorted(trunk)
    third = len(names) // 3
    parts = [names[:third], names[third : 2 * third], names[2 * third :]]
    shards = [*({name: trunk[name] for name in part} for part in parts), head]
    files = {f"model-{i:05}-of-00004.safetensors": shard for i, shard in enumerate(shards, 1)}
    return checkpoints.write(directory, checkpoints.config(case), files, index=True)


def sharded_without_index(directory, case):
    sharded(directory, case)
    (directory / checkpoints.INDEX).unlink()
    return directory


def other_files_beside(directory, case):
    """An index decides which files are read."""
    sharded(directory, case)
    (directory / "model-from-elsewhere.safetensors").write_text("not ours")
    return directory


def per_expert_in_transformers5(directory, case):
    """What save_pretrained writes by default: the hub's names under the new config."""
    config = checkpoints.transformers5(checkpoints.config(case))
    return checkpoints.write(
        directory, config, {"model.safetensors": checkpoints.tensors(case)}, index=True
    )


def fused(directory, case):
    """As transformers 5 saves it, with the head that it would drop."""
    config = checkpoints.transformers5(checkpoints.config(case))
    weights = checkpoints.fuse(checkpoints.tensors(case))
    return checkpoints.write(directory, config, {"model.safetensors": weights})


def converted(directory, case):
    """The model's own parameters, the head in a sidecar."""
    trunk, head = checkpoints.split(checkpoints.parameters(load32(GOLDENS / case)))
    files = {"model.safetensors": trunk, "mtp.safetensors": head}
    return checkpoints.write(directory, checkpoints.config(case), files)


LAYOUTS = [
    sharded,
    sharded_without_index,
    other_files_beside,
    per_expert_in_transformers5,
    fused,
    converted,
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_hold_the_same_model(tmp_path, layout, case):
    assert_same_parameters(load32(layout(tmp_path, case)), load32(GOLDENS / case))


@pytest.mark.parametrize("case", CASES)
def test_without_a_head(tmp_path, case):
    trunk, _ = trunk_and_head(case)
    config = checkpoints.config(case)
    model = load32(checkpoints.write(tmp_path, config, {"model.safetensors": trunk}))
    assert model.mtp is None
    whole = load32(GOLDENS / case)
    logits = whole(tokens(case))
    whole.mtp = None
    assert_same_parameters(model, whole)
    assert mx.array_equal(model(tokens(case)), logits)


def test_what_transformers_saved(tmp_path):
    model = load32(GOLDENS / "base_fused")
    assert model.mtp is None
    reference = load32(GOLDENS / "base")
    assert mx.array_equal(model(tokens("base")), reference(tokens("base")))
    reference.mtp = None
    assert_same_parameters(model, reference)


def with_needless_tensors(directory):
    """`dense`, whose embeddings are tied, with a head of its own all the same."""
    weights = checkpoints.tensors("dense")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.3.self_attn.rotary_emb.inv_freq"] = mx.ones((2,))
    config = checkpoints.config("dense")
    return checkpoints.write(directory, config, {"model.safetensors": weights})


def test_tensors_no_model_needs(tmp_path):
    model = load32(with_needless_tensors(tmp_path))
    assert_same_parameters(model, load32(GOLDENS / "dense"))


@pytest.mark.parametrize(
    ("config", "with_head", "tensors", "count"),
    [
        (configs.INSTRUCT, True, 75_944, 81_324_862_720),
        (configs.CODER, False, 74_391, 79_674_391_296),
    ],
    ids=["Instruct", "Coder-Next"],
)
def test_published_checkpoints_have_a_place_for_every_tensor(config, with_head, tensors, count):
    model = Model(Config.from_dict(config))
    if with_head:
        mtp_head.attach(model)
    shapes = model.parameter_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    origins = layouts.origins(shapes, "hub").values()
    assert len({name for origin in origins for name in origin.names}) == tensors


# --- dtypes --------------------------------------------------------------------------------------
ZERO_CENTRED = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "q_norm.weight",
    "k_norm.weight",
    "model.norm.weight",
    "mtp.norm.weight",
    "pre_fc_norm_embedding.weight",
    "pre_fc_norm_hidden.weight",
)
AS_STORED = ("linear_attn.norm.weight", "A_log", "dt_bias")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("directory", ["base", "base_fused"])
def test_dtypes_and_the_norms_one(directory, dtype):
    stored = float64.read_safetensors(GOLDENS / directory / "model.safetensors")
    counts = {"plus one": 0, "as stored": 0}
    for path, array in checkpoints.parameters(
        load_model(GOLDENS / directory, dtype=dtype, pack=False)
    ).items():
        if path.endswith(ZERO_CENTRED):
            counts["plus one"] += 1
            assert array.dtype == mx.float32, path
            assert np.array_equal(np.array(array), stored[path] + np.float32(1)), path
        elif path.endswith(AS_STORED):
            counts["as stored"] += 1
            assert array.dtype == mx.float32, path
            assert np.array_equal(np.array(array), stored[path]), path
        else:
            assert array.dtype == dtype, path
    # two norms a layer, two in attention, one at the end; with the head seven more
    assert counts == {"plus one": 18 if directory == "base" else 11, "as stored": 9}


def test_default_dtype(monkeypatch):
    for device, dtype in [(mx.cpu, mx.float32), (mx.gpu, mx.bfloat16)]:
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device, 0))
        assert default_dtype() == dtype
        assert load_model(GOLDENS / "base").model.embed_tokens.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [mx.int32, mx.float64, "float32"], ids=str)
def test_dtype_that_cannot_be_held(dtype):
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got "):
        load_model(GOLDENS / "base", dtype=dtype)


# --- mlx-lm's conversions ------------------------------------------------------------------------
def mixed(path, module):
    """Bits by path, as mlx-lm's recipes choose them; the embedding stays as it is."""
    if path.endswith(("mlp.gate", "shared_expert_gate")):
        return {"group_size": 64, "bits": 8}
    if path == "model.embed_tokens":
        return False
    return {"group_size": 32, "bits": 6 if "down_proj" in path else 3}


CONVERSIONS = {
    "unquantized": {},
    "4 bits": {"group_size": 32, "bits": 4},
    "8 bits, narrow matrices left out": {"group_size": 64, "bits": 8},
    "mixed": {"group_size": 32, "bits": 4, "quant_predicate": mixed},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


@pytest.fixture(scope="module")
def conversions(tmp_path_factory):
    """Directory of each of CONVERSIONS, made when asked for."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name.split(",")[0].replace(" ", "_"))
            made[name] = checkpoints.convert(directory, **CONVERSIONS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", CONVERSIONS)
def test_converted_computes_as_in_mlx_lm(conversions, name):
    directory = conversions(name)
    stock, _ = mlx_lm.utils.load_model(directory)
    reference = checkpoints.in_float32(stock)(tokens("base"))
    model = load32(directory)
    result = model(tokens("base"))
    assert result.dtype == mx.float32
    assert model.mtp is None
    assert relative_error(result, reference) < TOLERANCE


def test_quantized_parameters(conversions):
    model = load_model(conversions("mixed"), dtype=mx.bfloat16, pack=False)
    layer = model.layers[3]
    assert (layer.self_attn.q_proj.bits, layer.mlp.switch_mlp.down_proj.bits) == (3, 6)
    assert (layer.mlp.gate.bits, layer.mlp.gate.group_size) == (8, 64)
    for path, array in checkpoints.parameters(model).items():
        if path.endswith((*ZERO_CENTRED, *AS_STORED)):
            assert array.dtype == mx.float32, path
        elif path.endswith(("scales", "biases", "conv1d.weight", "embed_tokens.weight")):
            assert array.dtype == mx.bfloat16, path
        else:
            assert array.dtype == mx.uint32, path


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_activations_have_the_dtype_where_scales_are_bytes(conversions, mode, dtype):
    model = load_model(conversions(mode), dtype=dtype)
    embedding = model.model.embed_tokens
    assert embedding.mode == mode and embedding.scales.dtype == mx.uint8
    assert embedding(mx.array([[1, 2]])).dtype == dtype


def test_scale_per_expert(tmp_path):
    """mlx-lm's nvfp4 may have it. Only GPUs compute with it, but every machine can hold it."""
    nvfp4 = CONVERSIONS["nvfp4"] | {"global_scale": True}
    directory = checkpoints.convert(tmp_path, **nvfp4)
    stored = mx.load(str(directory / "model.safetensors"))
    name = "model.layers.0.mlp.switch_mlp.up_proj.global_scale"
    assert stored[name].shape == (8,)
    result = checkpoints.parameters(load32(directory))
    assert result.keys() == stored.keys()
    assert mx.array_equal(result[name], stored[name])


# --- the head in a sidecar -----------------------------------------------------------------------
def raw_head():
    return trunk_and_head("base")[1]


def fused_head():
    return checkpoints.fuse(raw_head())


def own_head():
    return checkpoints.split(checkpoints.parameters(load32(GOLDENS / "base")))[1]


@pytest.mark.parametrize("trunk", ["hub", "unquantized", "4 bits"])
@pytest.mark.parametrize("head", [raw_head, fused_head, own_head], ids=lambda f: f.__name__)
def test_sidecar_in_any_layout_beside_any_trunk(tmp_path, conversions, trunk, head):
    if trunk == "hub":
        weights = {"model.safetensors": trunk_and_head("base")[0]}
        checkpoints.write(tmp_path, checkpoints.config("base"), weights)
    else:
        shutil.copytree(conversions(trunk), tmp_path, dirs_exist_ok=True)
    without = load32(tmp_path)(tokens("base"))
    mx.save_safetensors(str(tmp_path / "mtp.safetensors"), head())
    model = load32(tmp_path)
    assert_same_parameters(model.mtp, load32(GOLDENS / "base").mtp)
    assert mx.array_equal(model(tokens("base")), without)
    if trunk != "4 bits":  # the head shares the trunk's embedding and lm_head
        assert_golden_head(model, "base")


def test_a_quantized_head_beside_an_unquantized_trunk(tmp_path):
    """The config says nothing of it then: the tensors do."""
    model = load32(GOLDENS / "base")
    nn.quantize(model.mtp, 32, 4)
    trunk, head = checkpoints.split(checkpoints.parameters(model))
    files = {"model.safetensors": trunk, "mtp.safetensors": head}
    result = load32(checkpoints.write(tmp_path, checkpoints.config("base"), files))
    assert_same_parameters(result, model)
    assert result.mtp.fc.bits == 4


def test_sidecar_of_quantized_parameters(tmp_path):
    model = load32(GOLDENS / "base")
    model, config = mlx_lm.utils.quantize_model(model, checkpoints.config("base"), 32, 4)
    trunk, head = checkpoints.split(checkpoints.parameters(model))
    files = {"model.safetensors": trunk, "mtp.safetensors": head}
    loaded = load32(checkpoints.write(tmp_path, config, files))
    assert loaded.mtp.fc.bits == 4 and loaded.mtp.layers[0].mlp.gate.bits == 8
    assert_same_parameters(loaded, model)
    hidden, following = mx.ones((1, 3, 64)), mx.array([[1, 2, 3]])
    assert mx.array_equal(loaded.mtp(hidden, following), model.mtp(hidden, following))


# --- through mlx-lm's loader ---------------------------------------------------------------------
def load_by_mlx_lm(directory):
    model, _ = mlx_lm.utils.load_model(directory, get_model_classes=lambda config: (Model, Config))
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("case", [*CASES, "base_fused"])
def test_mlx_lm_loads_into_this_model(case):
    model = load_by_mlx_lm(GOLDENS / case)
    reference = load32(GOLDENS / case)
    reference.mtp = None
    assert_same_parameters(model, reference)


def test_mlx_lm_leaves_out_tensors_no_model_needs(tmp_path):
    model = load_by_mlx_lm(with_needless_tensors(tmp_path))
    assert_same_parameters(model, load_by_mlx_lm(GOLDENS / "dense"))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_mlx_lm_loads_a_conversion_into_this_model(conversions, name):
    model, reference = load_by_mlx_lm(conversions(name)), load32(conversions(name))
    assert_same_parameters(model, reference)


def test_mlx_lm_quantizes_this_model_with_routers_at_8_bits():
    model, config = mlx_lm.utils.quantize_model(
        load_by_mlx_lm(GOLDENS / "base"), checkpoints.config("base"), 32, 4
    )
    bits = {path: module.bits for path, module in model.named_modules() if hasattr(module, "bits")}
    routers = {path for path in bits if path.endswith(("mlp.gate", "shared_expert_gate"))}
    assert len(routers) == 8
    assert {path for path, n in bits.items() if n == 8} == routers
    assert config["quantization"]["model.layers.0.mlp.gate"]["bits"] == 8


def test_mlx_lm_finds_a_missing_expert_and_a_surplus_tensor(tmp_path):
    weights, expert = checkpoints.tensors("base"), "model.layers.0.mlp.experts.3.up_proj.weight"
    missing = {name: w for name, w in weights.items() if name != expert}
    surplus = weights | {"model.layers.0.mlp.bias": mx.zeros((2,))}
    for name, tensors in [("experts.2.up_proj", missing), ("mlp.bias", surplus)]:
        directory = tmp_path / name
        checkpoints.write(directory, checkpoints.config("base"), {"model.safetensors": tensors})
        with pytest.raises(ValueError, match=f"(?s)not in model.*{name}"):
            load_by_mlx_lm(directory)


# --- the bundled model and its tokenizer ---------------------------------------------------------
def test_bundled_model():
    model, tokenizer = load()
    assert model.mtp is not None
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"
    assert tokenizer.vocab_size <= model.args.vocab_size
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
    assert tokenizer.eos_token_ids == ends


def test_stop_tokens_are_those_of_generation_config_or_config(tmp_path):
    shutil.copytree(BUNDLED, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    for content, stops in [('{"eos_token_id": [5, 6]}', {5, 6}), ("{}", {7}), (None, {7})]:
        file = tmp_path / "generation_config.json"
        file.write_text(content) if content else file.unlink()
        _, tokenizer = load(tmp_path)
        end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")  # added by mlx-lm
        assert tokenizer.eos_token_ids == stops | {end_of_turn}
