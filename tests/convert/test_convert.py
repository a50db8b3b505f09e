"""Conversion: the numbers in the files are the source's, or exactly MLX's quantization of them."""

import contextlib
import io
import json
import shutil

import checkpoints
import mlx.core as mx
import mlx_lm.utils
import pytest
from checkpoints import CASES, GOLDENS, relative_error
from helpers_convert import options
from mlx_lm.convert import convert as convert_by_mlx_lm
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import dequantize_model
from reference_reader import assert_reads_the_same

from mlx_qwen3next import load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.convert import convert
from mlx_qwen3next.convert.source import Source

TOLERANCE = 1e-4  # float32 noise is 2e-5 at most, the smallest structural mistake 1e-2
ROUTERS = ("mlp.gate", "shared_expert_gate")
NEVER_QUANTIZED = ("norm", "norm_embedding", "norm_hidden", "A_log", "dt_bias", "conv1d")
RECIPES = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]


def load32(directory):
    return load_model(directory, dtype=mx.float32, pack=False)


def converted(directory, case="base", **arguments):
    convert(str(GOLDENS / case), str(directory / "out"), **arguments)
    return directory / "out"


def tokens(case="base"):
    return mx.array(checkpoints.expected(case)["tokens"])[None]


def assert_same(result, reference):
    """Arrays by name, bit for bit."""
    assert result.keys() == reference.keys()
    for name, array in reference.items():
        assert result[name].dtype == array.dtype, name
        assert mx.array_equal(result[name], array), name


def stored(directory):
    """All tensors of a converted model, the exact norms not among them."""
    files = [f for f in directory.glob("*.safetensors") if f.name != "norms.safetensors"]
    return {name: w for file in files for name, w in mx.load(str(file)).items()}


def bits(directory):
    """Module path -> bits of what is quantized."""
    modules = load32(directory).named_modules()
    return {path: module.bits for path, module in modules if hasattr(module, "bits")}


# --- unquantized ---------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_unquantized_is_the_source(tmp_path, case):
    result = load32(converted(tmp_path, case, dtype="float32"))
    assert_same(checkpoints.parameters(result), checkpoints.parameters(load32(GOLDENS / case)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_to_a_dtype_all_but_the_norms(tmp_path, dtype):
    kind = getattr(mx, dtype)
    directory = converted(tmp_path, dtype=dtype)
    source = load32(GOLDENS / "base")
    expected = {
        path: w if path.endswith(NEVER_QUANTIZED[3:5]) or "norm" in path else w.astype(kind)
        for path, w in checkpoints.parameters(source).items()
    }
    result = checkpoints.parameters(load32(directory))
    assert_same(result, {path: w.astype(mx.float32) for path, w in expected.items()})
    # What mlx-lm reads has one dtype throughout, or it would compute in float32.
    trunk = mx.load(str(directory / "model.safetensors"))
    gates = {"F32" for name in trunk if name.endswith(("A_log", "dt_bias"))}
    assert gates and {
        w.dtype for name, w in trunk.items() if not name.endswith(("A_log", "dt_bias"))
    } == {kind}


def test_the_config_says_the_dtype(tmp_path):
    """The source's, where none is asked for."""
    config = json.loads((converted(tmp_path) / "config.json").read_text())
    assert config["torch_dtype"] == checkpoints.config("base")["torch_dtype"] == "bfloat16"
    assert mx.load(str(tmp_path / "out/model.safetensors"))["lm_head.weight"].dtype == mx.bfloat16
    other = converted(tmp_path / "other", dtype="float16")
    assert json.loads((other / "config.json").read_text())["torch_dtype"] == "float16"


def test_every_layout_gives_the_same_files(tmp_path):
    """Per expert, fused, in shards, under either config."""
    config = checkpoints.config("base")
    weights = checkpoints.tensors("base")
    trunk, head = checkpoints.split(weights)
    sources = {
        "hub": (config, {"model.safetensors": weights}),
        "fused": (
            checkpoints.transformers5(config),
            {"model.safetensors": checkpoints.fuse(weights)},
        ),
        "sharded": (config, {"model-1.safetensors": head, "model-2.safetensors": trunk}),
    }
    outputs = []
    for name, (config, files) in sources.items():
        checkpoints.write(tmp_path / name, config, files, index=True)
        convert(str(tmp_path / name), str(tmp_path / f"{name}-out"), quantize=True, q_group_size=32)
        outputs.append(tmp_path / f"{name}-out")
    for other in outputs[1:]:
        assert_same(stored(other), stored(outputs[0]))


def test_what_transformers_saved(tmp_path):
    result = load32(converted(tmp_path, "base_fused", dtype="float32"))
    assert result.mtp is None
    reference = load32(GOLDENS / "base_fused")
    assert_same(checkpoints.parameters(result), checkpoints.parameters(reference))


def test_drop_the_head(tmp_path):
    directory = converted(tmp_path, mtp="drop", dtype="float32")
    assert not (directory / "mtp.safetensors").exists()
    reference = load32(GOLDENS / "base")
    reference.mtp = None
    assert_same(checkpoints.parameters(load32(directory)), checkpoints.parameters(reference))


# --- quantized -----------------------------------------------------------------------------------
MODES = [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]


@pytest.mark.parametrize("mode, group_size, count", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_is_mlxs_quantization_of_the_source(tmp_path, mode, group_size, count, dtype):
    directory = converted(
        tmp_path, quantize=True, q_mode=mode, q_group_size=group_size, q_bits=count, dtype=dtype
    )
    result, quantized = stored(directory), bits(directory)
    source = checkpoints.parameters(load32(GOLDENS / "base"))
    assert len(quantized) > 40
    for path in quantized:
        weight = source[f"{path}.weight"].astype(getattr(mx, dtype))
        params = {"group_size": group_size, "bits": count, "mode": mode}
        if path.endswith(ROUTERS):
            params = {"group_size": 64, "bits": 8, "mode": "affine"}
        elif path.startswith("mtp."):
            params = {"group_size": group_size if mode == "affine" else 64, "bits": 4}
        kinds = ("weight", "scales", "biases")
        for kind, expected in zip(kinds, mx.quantize(weight, **params), strict=False):
            assert mx.array_equal(result[f"{path}.{kind}"], expected), (path, kind)


@pytest.mark.parametrize(
    "arguments",
    [
        {"q_group_size": 32},
        {"q_group_size": 32, "q_bits": 3},
        {"q_mode": "mxfp4"},
        {"q_mode": "nvfp4"},
        {"q_mode": "mxfp8"},
        {"q_group_size": 64},
    ],
    ids=str,
)
def test_the_trunk_is_mlx_lms_conversion(tmp_path, arguments):
    """Name for name and bit for bit, shards and index included, as mlx-lm would load it."""
    source = shutil.copytree(BUNDLED, tmp_path / "source")  # for its tokenizer
    for file in source.glob("*.safetensors"):
        file.unlink()
    checkpoints.write(
        source,
        checkpoints.config("base"),
        {"model.safetensors": bfloat16(checkpoints.tensors("base"))},
    )
    convert(str(source), str(tmp_path / "ours"), quantize=True, **arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        convert_by_mlx_lm(str(source), str(tmp_path / "theirs"), quantize=True, **arguments)
    ours, theirs = (mx.load(str(tmp_path / d / "model.safetensors")) for d in ("ours", "theirs"))
    assert_same(ours, theirs)
    a, b = (json.loads((tmp_path / d / checkpoints.INDEX).read_text()) for d in ("ours", "theirs"))
    assert a["weight_map"] == b["weight_map"]
    assert a["metadata"]["total_size"] == b["metadata"]["total_size"]
    a, b = (mlx_lm.utils.load_model(tmp_path / d)[0] for d in ("ours", "theirs"))
    assert mx.array_equal(checkpoints.in_float32(a)(tokens()), checkpoints.in_float32(b)(tokens()))


def bfloat16(weights):
    return {name: w.astype(mx.bfloat16) for name, w in weights.items()}


@pytest.mark.parametrize("mode, group_size, count", MODES)
def test_mlx_lm_computes_the_same(tmp_path, mode, group_size, count):
    """In float32, with norms in float32 as well: in bfloat16 they are rounded for mlx-lm only."""
    arguments = {"q_mode": mode, "q_group_size": group_size, "q_bits": count, "dtype": "float32"}
    directory = converted(tmp_path, quantize=True, **arguments)
    stock, _ = mlx_lm.utils.load_model(directory)
    expected = checkpoints.in_float32(stock)(tokens())
    assert relative_error(load32(directory)(tokens()), expected) < TOLERANCE


@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_recipes_are_mlx_lms_but_for_the_routers(tmp_path, recipe):
    directory = converted(
        tmp_path, quantize=True, q_group_size=32, quant_predicate=recipe, dtype="float32"
    )
    ours = bits(directory)
    model, _ = mlx_lm.utils.load_model(GOLDENS / "base")
    predicate = mixed_quant_predicate_builder(recipe, model, 32)
    modules = dict(model.named_modules())
    trunk = [path for path in ours if not path.startswith("mtp.") and not path.endswith(ROUTERS)]
    assert {path: ours[path] for path in trunk} == {
        path: predicate(path, modules[path])["bits"] for path in trunk
    }
    assert len({ours[path] for path in trunk}) == 2
    stock, _ = mlx_lm.utils.load_model(directory)
    expected = checkpoints.in_float32(stock)(tokens())
    assert relative_error(load32(directory)(tokens()), expected) < TOLERANCE


@pytest.mark.parametrize(
    "arguments",
    [
        {"q_group_size": 32, "q_bits": 2},
        {"q_mode": "mxfp4"},
        *({"q_group_size": 32, "quant_predicate": recipe} for recipe in RECIPES),
        {"q_group_size": 32, "quant_predicate": lambda path, module: {"bits": 3, "group_size": 32}},
    ],
    ids=options,
)
def test_under_every_recipe(tmp_path, arguments):
    directory = converted(tmp_path, quantize=True, dtype="bfloat16", **arguments)
    quantized = bits(directory)
    routers = [path for path in quantized if path.endswith(ROUTERS)]
    assert len(routers) == 2 * 5 and {quantized[path] for path in routers} == {8}
    for name, array in stored(directory).items():
        module = name.rpartition(".")[0]
        if module.endswith(NEVER_QUANTIZED) or name.endswith(NEVER_QUANTIZED):
            assert mx.issubdtype(array.dtype, mx.floating), name
    table = json.loads((directory / "config.json").read_text())["quantization"]
    assert table["group_size"] and table["bits"] and table["mode"]
    for path, entry in table.items():
        if isinstance(entry, dict):
            assert entry["group_size"] and entry["bits"] == quantized[path] and entry["mode"], path


def test_a_predicate_may_leave_modules_out(tmp_path):
    def only_experts(path, module):
        return "switch_mlp" in path

    directory = converted(
        tmp_path, quantize=True, q_group_size=32, quant_predicate=only_experts, mtp_bits=16
    )
    assert {p for p in bits(directory) if not p.endswith(ROUTERS)} == {
        f"model.layers.{i}.mlp.switch_mlp.{part}_proj"
        for i in range(4)
        for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize("quantize", [True, False])
def test_bits_of_the_head(tmp_path, quantize, count):
    directory = converted(tmp_path, quantize=quantize, mtp_bits=count)
    quantized = bits(directory)
    head = {n for p, n in quantized.items() if p.startswith("mtp.") and not p.endswith(ROUTERS)}
    assert head == (set() if count == 16 else {count})
    assert ("lm_head" in quantized) == quantize
    mlx_lm.utils.load_model(directory)


def test_dequantize(tmp_path):
    """The quantized model's weights in floating point."""
    quantized = converted(tmp_path, quantize=True, q_group_size=32, dtype="float32")
    convert(str(quantized), str(tmp_path / "whole"), dequantize=True)
    reference = load32(quantized)
    head = dequantize_model(reference.mtp)
    reference = dequantize_model(reference)
    reference.mtp = head
    result = load32(tmp_path / "whole")
    assert_same(checkpoints.parameters(result), checkpoints.parameters(reference))
    assert "quantization" not in json.loads((tmp_path / "whole/config.json").read_text())
    mlx_lm.utils.load_model(tmp_path / "whole")


# --- FP8 -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scales", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fp8(tmp_path, case, scales):
    """The same as from codes times factors made by numpy, and close to what they were made from.

    e4m3 has three bits behind the leading one: at most 1/16 off, evenly spread 1/16/sqrt(3)/1.5.
    """
    source = checkpoints.write_fp8(tmp_path / "fp8", case, scales)
    weights = mx.load(str(source / "model.safetensors"))
    coded = [name for name in weights if f"{name}_scale_inv" in weights]
    assert len(coded) > 30
    originals = checkpoints.tensors(case)
    for name in coded:
        factors = weights.pop(f"{name}_scale_inv")
        whole = checkpoints.from_fp8(weights[name], factors)
        assert relative_error(whole, originals[name].astype(mx.float32)) < 0.03, name
        weights[name] = mx.array(whole)
    config = checkpoints.config(case)
    checkpoints.write(tmp_path / "whole", config, {"model.safetensors": weights})
    convert(str(source), str(tmp_path / "out"), dtype="float32")
    result, reference = load32(tmp_path / "out"), load32(tmp_path / "whole")
    assert_same(checkpoints.parameters(result), checkpoints.parameters(reference))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_fp8_blocks(tmp_path):
    """Several blocks each way, the last ones cut off, and more rows than are read at once."""
    assert checkpoints.config("base")["hidden_size"] == 64  # one block across, everywhere
    weight = mx.random.normal((1000, 300))
    codes, scale = checkpoints.to_fp8(weight, mx.float32)
    file = tmp_path / "model.safetensors"
    fused = {"fused": mx.stack([codes, codes]), "fused_scale_inv": mx.stack([scale, 2 * scale])}
    mx.save_safetensors(str(file), {"w": codes, "w_scale_inv": scale} | fused)
    checkpoints.declare_fp8(file, ["w", "fused"])
    config = checkpoints.config("base") | {"quantization_config": checkpoints.FP8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Source(tmp_path)
    expected = mx.array(checkpoints.from_fp8(codes, scale))
    for rows in [(0, 1000), (0, 128), (256, 640), (896, 1000)]:
        assert mx.array_equal(source.read("w", *rows), expected[slice(*rows)])
    assert mx.array_equal(source.read("fused", 1, 2), 2 * expected[None])
    assert relative_error(expected, weight) < 0.03


def test_fp8_logits(tmp_path):
    """Checks a trained model; the others have weights that magnify every error."""
    source = checkpoints.write_fp8(tmp_path / "fp8", "permutation", mx.bfloat16)
    convert(str(source), str(tmp_path / "out"), dtype="float32")
    result, reference = load32(tmp_path / "out"), load32(GOLDENS / "permutation")
    a, b = result(tokens("permutation")), reference(tokens("permutation"))
    assert relative_error(a, b) < 0.1
    assert (a.argmax(-1) == b.argmax(-1)).astype(mx.float32).mean().item() > 0.9


# --- what else is in the folder ------------------------------------------------------------------
def test_other_files(tmp_path):
    source = shutil.copytree(BUNDLED, tmp_path / "source")
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Theirs\n")
    for name in ("hf_quant_config.json", "quantize_config.json", "consolidated.index.json"):
        (source / name).write_text('{"quantization": {"quant_algo": "FP8"}}')  # of other weights
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    convert(str(source), str(tmp_path / "out"), dequantize=True)
    result = {
        str(file.relative_to(tmp_path / "out"))
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    assert result == {
        "README.md", "LICENSE", "config.json", "generation_config.json", "heldout.txt",
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
        "additional_chat_templates/rag.jinja",
        "model.safetensors", checkpoints.INDEX, "mtp.safetensors", "norms.safetensors",
    }  # fmt: skip
    for name in ("LICENSE", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "license: apache-2.0" in card and "library_name: mlx" in card and "# out" in card
    assert "Theirs" not in card


def test_the_config_is_the_hubs(tmp_path):
    """mlx-lm reads no other dialect."""
    directory = converted(tmp_path, "base_fused")
    config = json.loads((directory / "config.json").read_text())
    for key in ("rope_theta", "partial_rotary_factor", "full_attention_interval"):
        assert config[key] == checkpoints.config("base")[key]
    assert not {"rope_parameters", "layer_types", "dtype"} & config.keys()
    model, _ = mlx_lm.utils.load_model(directory)
    assert model(tokens()).shape[-1] == config["vocab_size"]


def test_layers_in_no_regular_order(tmp_path):
    """Kept by name: an interval could not say it."""
    config = checkpoints.transformers5(checkpoints.config("base"))
    kinds = config["layer_types"]
    weights, _ = checkpoints.split(checkpoints.tensors("base"))
    order = [3, 0, 1, 2]  # the attention layer first
    config["layer_types"] = [kinds[i] for i in order]
    swapped = {}
    for name, array in weights.items():
        for new, old in enumerate(order):
            if name.startswith(f"model.layers.{old}."):
                name = name.replace(f"layers.{old}.", f"layers.{new}.", 1)
                break
        swapped[name] = array
    source = checkpoints.write(tmp_path / "in", config, {"model.safetensors": swapped})
    convert(str(source), str(tmp_path / "out"), dtype="float32")
    assert mx.array_equal(load32(tmp_path / "out")(tokens()), load32(source)(tokens()))


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_reference_library_reads_every_file(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("mlx_qwen3next.convert.weights.LARGEST_FILE", 150_000)
    group_size = 32 if mode == "affine" else None
    out = converted(tmp_path, quantize=True, q_mode=mode, q_group_size=group_size)
    files = {file.name: file for file in out.glob("*.safetensors")}
    assert len(files) > 3 and {"mtp.safetensors", "norms.safetensors"} < files.keys()
    for file in files.values():
        assert_reads_the_same(file)


def test_shards(tmp_path, monkeypatch):
    """Small ones here; numbered, in order, listed in the index, the head beside them."""
    whole = converted(tmp_path / "whole")
    monkeypatch.setattr("mlx_qwen3next.convert.weights.LARGEST_FILE", 150_000)
    directory = converted(tmp_path)
    files = sorted(file.name for file in directory.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    weight_map = json.loads((directory / checkpoints.INDEX).read_text())["weight_map"]
    for file in files:
        size = (directory / file).stat().st_size
        tensors = mx.load(str(directory / file))
        assert size <= 150_000 and len(tensors) > 1
        assert set(tensors) == {name for name, f in weight_map.items() if f == file}
    assert_same(stored(directory), stored(whole))
    reference = load32(whole)
    assert mx.array_equal(load32(directory)(tokens()), reference(tokens()))
    stock, _ = mlx_lm.utils.load_model(directory)
    assert stock(tokens()).shape == reference(tokens()).shape


def test_the_mark_settles_what_names_do_not(tmp_path):
    """A dense head has no tensor whose name shows the layout; beside a hub trunk it would be
    taken for the hub's, and its norms get their + 1 twice."""
    weights = checkpoints.tensors("dense")
    trunk, _ = checkpoints.split(weights)
    directory = converted(tmp_path, "dense", dtype="float32")
    (directory / "model.safetensors").unlink()
    (directory / checkpoints.INDEX).unlink()
    mx.save_safetensors(str(directory / "model.safetensors"), trunk)
    result, reference = load32(directory), load32(GOLDENS / "dense")
    assert_same(checkpoints.parameters(result), checkpoints.parameters(reference))
