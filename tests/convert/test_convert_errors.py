"""Unusable sources are refused in one line that names file and tensor, or the argument."""

import json
import os
import shutil

import checkpoints
import mlx.core as mx
import pytest
from checkpoints import GOLDENS, INDEX
from helpers_convert import options, state
from test_foreign import FORMS, in_form, said_of
from test_load_errors import EXPERT, QUERY, edit, header, last_tensor, sharded, write_header

from mlx_qwen3next.convert import convert
from mlx_qwen3next.storage.safetensors import read_header

FUSED = "model.layers.0.mlp.experts"
A_LOG = "model.layers.1.linear_attn.A_log"
NAN, INFINITY = b"\xc0\x7f", b"\x80\x7f"  # in bfloat16
NOT_FINITE = "holds NaN or infinite values"


# --- files and tensors ---------------------------------------------------------------------------
def test_no_source(refusal, tmp_path):
    missing = tmp_path / "missing"
    assert refusal(missing) == f"{missing} does not exist, and is no repository id (owner/name)"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == (
        f"{tmp_path / 'empty'} is no model directory: it has no config.json"
    )
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file").startswith(f"{tmp_path / 'file'} cannot be read")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"], ids=repr)
def test_config_that_is_none(refusal, base, content):
    (base / "config.json").write_bytes(content)
    assert refusal(base).startswith(f"{base / 'config.json'} ")


def reconfigure(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def test_config_of_another_model(refusal, base):
    config = reconfigure(base, model_type="llama")
    assert refusal(base).startswith(f"{config}: model_type is 'llama'")


def test_config_of_too_large_a_model(refusal, base):
    config = reconfigure(base, hidden_size=2**31 - 1)
    assert refusal(base) == f"{config.parent}: the config's sizes are beyond MLX's arrays"


@pytest.mark.parametrize("dtype", ["int8", None, ["bfloat16"]], ids=str)
def test_config_without_a_dtype_leaves_it_to_the_weights(base, tmp_path, dtype):
    reconfigure(base, torch_dtype=dtype)
    convert(str(base), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_files_that_are_not_whole(refusal, base):
    file = base / "model.safetensors"
    whole, name = file.read_bytes(), last_tensor(file)
    os.truncate(file, len(whole) - 1)
    assert refusal(base).startswith(f"{file} is truncated: {name} ends at byte {len(whole)}")
    os.truncate(file, 5000)
    assert refusal(base).startswith(f"{file} is truncated in its header")
    file.write_bytes(whole + b"\0")
    assert refusal(base).startswith(f"{file} has {len(whole) + 1} bytes, but its last tensor ends")
    file.unlink()
    assert refusal(base) == f"{base} has no model*.safetensors"


def test_tensors_that_overlap(refusal, base):
    file = base / "model.safetensors"
    entries, data = header(file)
    entries[QUERY]["data_offsets"] = [n - 4 for n in entries[QUERY]["data_offsets"]]
    write_header(file, entries, data)
    assert refusal(base).startswith(f"{file}: {QUERY} begins at byte ")


def test_missing_shard(refusal, base):
    sharded(base)
    shard = base / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert refusal(base) == f"{shard} is missing; {INDEX} lists it. Download it again."


@pytest.mark.parametrize("name", [QUERY, EXPERT, "lm_head.weight", "mtp.fc.weight"])
def test_missing_tensor(refusal, base, name):
    edit(base, lambda tensors: tensors.pop(name))
    assert refusal(base) == f"{base}: the tensor {name} is missing from every file"


@pytest.mark.parametrize(
    "name", [EXPERT.replace(".3.", ".8."), "mtp.layers.1.norm.weight", f"{QUERY}_scale_inv"]
)
def test_surplus_tensor(refusal, base, name):
    file = edit(base, lambda tensors: tensors.update({name: mx.ones((2,))}))
    assert refusal(base) == f"{file}: the tensor {name} has no place in this model"


@pytest.mark.parametrize("name", [QUERY, EXPERT, "model.norm.weight", "mtp.norm.weight"])
def test_wrong_shape_or_dtype(refusal, base, name):
    right = checkpoints.tensors("base")[name]
    file = edit(base, lambda tensors: tensors.update({name: right[..., None]}))
    assert refusal(base) == (
        f"{file}: {name} has shape {[*right.shape, 1]}, but the config asks for {list(right.shape)}"
    )
    edit(base, lambda tensors: tensors.update({name: right.astype(mx.int32)}))
    assert refusal(base) == f"{file}: {name} is I32, not BF16 or F16 or F32"


def poke(file, name, value):
    """Overwrites the last number of a tensor in a file."""
    tensor = read_header(file).tensors[name]
    with file.open("r+b") as stream:
        stream.seek(tensor.start + tensor.nbytes - len(value))
        stream.write(value)


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["nan", "infinity"])
@pytest.mark.parametrize(
    "name",
    [
        QUERY,
        EXPERT,
        "model.norm.weight",
        A_LOG,
        "model.embed_tokens.weight",
        "mtp.fc.weight",
        "mtp.layers.0.mlp.experts.7.down_proj.weight",
        "mtp.pre_fc_norm_hidden.weight",
    ],
)
def test_not_finite(refusal, base, name, value):
    file = base / "model.safetensors"
    poke(file, name, value)
    for arguments in ({}, {"quantize": True, "q_group_size": 32}):
        assert refusal(base, begun=True, **arguments) == f"{file}: {name} {NOT_FINITE}"
        shutil.rmtree(base.with_name("out.partial"))


@pytest.mark.parametrize("name", [f"{FUSED}.gate_up_proj", f"{FUSED}.down_proj"])
def test_not_finite_in_stacked_experts(refusal, tmp_path, name):
    source = shutil.copytree(GOLDENS / "base_fused", tmp_path / "fused")
    poke(source / "model.safetensors", name, NAN)
    assert refusal(source, begun=True) == f"{source / 'model.safetensors'}: {name} {NOT_FINITE}"


def test_once_mended_it_goes_on(refusal, base, tmp_path):
    file = base / "model.safetensors"
    convert(str(base), str(tmp_path / "whole" / "out"))
    time, value = file.stat().st_mtime_ns, file.read_bytes()
    poke(file, "lm_head.weight", NAN)
    os.utime(file, ns=(time, time))
    refusal(base, begun=True)
    file.write_bytes(value)
    os.utime(file, ns=(time, time))
    convert(str(base), str(tmp_path / "out"))
    assert state(tmp_path / "out") == state(tmp_path / "whole" / "out")


@pytest.mark.parametrize("name", [QUERY, "model.norm.weight"])
def test_too_large_for_float16(refusal, base, tmp_path, name):
    file = edit(base, lambda tensors: tensors.update({name: tensors[name] * 1e6}))
    message = f"{file}: {name} overflows in --dtype float16"
    assert refusal(base, begun=True, dtype="float16") == message
    convert(str(base), str(tmp_path / "other"), dtype="bfloat16")


# --- FP8 -----------------------------------------------------------------------------------------
SCALE = f"{QUERY}_scale_inv"


@pytest.fixture
def fp8(tmp_path):
    return checkpoints.write_fp8(tmp_path / "fp8", "base", mx.bfloat16)


def edit_fp8(directory, change, coded=()):
    file = directory / "model.safetensors"
    names = [name for name, t in read_header(file).tensors.items() if t.dtype == "F8_E4M3"]
    edit(directory, change)
    checkpoints.declare_fp8(file, [*names, *coded])
    return file


@pytest.mark.parametrize(
    ("name", "value"), [(QUERY, b"\x7f"), (EXPERT, b"\xff"), (SCALE, NAN), (SCALE, INFINITY)]
)
def test_fp8_that_is_not_finite(refusal, fp8, name, value):
    file = fp8 / "model.safetensors"
    poke(file, name, value)
    assert refusal(fp8, begun=True) == f"{file}: {name} {NOT_FINITE}"


def test_fp8_without_scale(refusal, fp8):
    edit_fp8(fp8, lambda tensors: tensors.pop(SCALE))
    assert refusal(fp8) == f"{fp8}: the tensor {SCALE} is missing from every file"


def test_fp8_with_another_scale(refusal, fp8):
    file = edit_fp8(fp8, lambda tensors: tensors.update({SCALE: mx.ones((1, 1))}))
    wanted = f"{file}: {SCALE} has shape [1, 1], but the config asks for [2, 1]"
    assert refusal(fp8) == wanted
    edit_fp8(fp8, lambda tensors: tensors.update({SCALE: mx.ones((2, 1), mx.int32)}))
    assert refusal(fp8) == f"{file}: {SCALE} is I32, not BF16 or F16 or F32"


@pytest.mark.parametrize("scale", [{}, {f"{A_LOG}_scale_inv": mx.ones((1,))}])
def test_fp8_where_there_are_no_blocks(refusal, fp8, scale):
    file = edit_fp8(
        fp8, lambda tensors: tensors.update({A_LOG: mx.zeros((4,), mx.uint8)} | scale), [A_LOG]
    )
    assert refusal(fp8) == f"{file}: {A_LOG} is F8_E4M3, not BF16 or F16 or F32"


def test_fp8_that_the_config_does_not_mention(refusal, fp8):
    reconfigure(fp8, quantization_config=None)
    assert "_scale_inv has shape" in refusal(fp8)


@pytest.mark.parametrize("block", [None, [], [128], [0, 128], [128.0, 128], [True, 128], "128"])
def test_fp8_in_strange_blocks(refusal, fp8, block):
    config = reconfigure(fp8, quantization_config=checkpoints.FP8 | {"weight_block_size": block})
    assert refusal(fp8).startswith(
        f"{config}: quantization_config has quant_method 'fp8' and weight_block_size {block!r}; "
    )


def test_fp8_in_blocks_larger_than_anything(fp8, tmp_path):
    reconfigure(fp8, quantization_config=checkpoints.FP8 | {"weight_block_size": [2**40, 2**40]})

    def one_factor_each(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name][:1, :1]

    edit_fp8(fp8, one_factor_each)
    convert(str(fp8), str(tmp_path / "out"))


@pytest.mark.parametrize("method", ["gptq", None, {}], ids=str)
def test_fp8_that_the_config_calls_something_else(refusal, fp8, method):
    config = reconfigure(fp8, quantization_config={"quant_method": method, "bits": 4})
    message = f"{config}: quantization_config has quant_method {method!r} and weight_block_size"
    assert refusal(fp8).startswith(message)


@pytest.mark.parametrize(
    "left_over",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": checkpoints.FP8},
        {"quantization_config": "awq"},
        {"quantization": {"group_size": 64, "bits": 4}},
    ],
    ids=str,
)
def test_whole_weights_convert_whatever_the_config_says(base, tmp_path, left_over):
    convert(str(base), str(tmp_path / "whole"), quantize=True, q_group_size=32)
    reconfigure(base, **left_over)
    convert(str(base), str(tmp_path / "out"), quantize=True, q_group_size=32)
    same = [mx.load(str(tmp_path / name / "model.safetensors")) for name in ("whole", "out")]
    assert same[0].keys() == same[1].keys()
    assert all(mx.array_equal(w, same[1][name]) for name, w in same[0].items())
    configs = [(tmp_path / name / "config.json").read_text() for name in ("whole", "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("parts", FORMS, ids=" ".join)
def test_forms_of_other_libraries(refusal, base, parts):
    shown, form, methods = FORMS[parts]
    for method in methods:
        in_form(base, parts, method)
        name = f"{QUERY.removesuffix('weight')}{shown}"
        assert refusal(base) == refusal(base, dequantize=True) == said_of(base, name, form)


# --- MLX's own quantization ----------------------------------------------------------------------
SCALES = "model.layers.0.mlp.switch_mlp.up_proj.scales"
BIASES = SCALES.replace("scales", "biases")


@pytest.fixture
def quantized(tmp_path):
    return checkpoints.convert(tmp_path / "quantized", group_size=32, bits=4)


def test_quantized_already(refusal, quantized, base):
    said = f"{quantized} is quantized already; -d (--dequantize) makes it whole"
    assert refusal(quantized) == refusal(quantized, quantize=True) == said
    said = f"{base} is not quantized: there is nothing to dequantize"
    assert refusal(base, dequantize=True) == said


@pytest.mark.parametrize("name", [SCALES, BIASES])
def test_scales_that_are_not_finite(refusal, quantized, name):
    file = quantized / "model.safetensors"
    poke(file, name, NAN)
    message = refusal(quantized, begun=True, dequantize=True)
    assert message == f"{file}: {name} {NOT_FINITE}"


def test_biases_missing(refusal, quantized):
    edit(quantized, lambda tensors: tensors.pop(BIASES))
    message = refusal(quantized, dequantize=True)
    assert message == f"{quantized}: the tensor {BIASES} is missing from every file"


@pytest.mark.parametrize("name", [SCALES, BIASES])
@pytest.mark.parametrize("shape", [(8, 31, 2), (8, 32), (8, 32, 3), (8, 32, 65), ()], ids=str)
def test_scales_of_another_shape(refusal, quantized, name, shape):
    file = edit(quantized, lambda tensors: tensors.update({name: mx.ones(shape)}))
    message = refusal(quantized, dequantize=True)
    assert message.startswith(f"{file}: {name.rpartition('.')[0]}.")


# --- arguments -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantize": True, "dequantize": True}, "either -q (--quantize) or -d (--dequantize)"),
        ({"q_bits": 4}, "--q-bits, --q-group-size and --q-mode need -q"),
        ({"q_bits": 0}, "--q-bits, --q-group-size and --q-mode need -q"),
        ({"q_group_size": 32}, "--q-bits, --q-group-size and --q-mode need -q"),
        ({"q_mode": "mxfp4"}, "--q-bits, --q-group-size and --q-mode need -q"),
        ({"quant_predicate": "mixed_3_6"}, "--quant-predicate needs -q"),
        ({"quant_predicate": lambda path, module: True}, "--quant-predicate needs -q"),
        (
            {"quantize": True, "quant_predicate": "mixed_3_6", "q_mode": "mxfp4"},
            "--quant-predicate mixed_3_6 needs --q-mode affine, not mxfp4",
        ),
        ({"quantize": True, "quant_predicate": "mixed_1_2"}, "mixed_1_2"),
        (
            {"quantize": True, "quant_predicate": lambda path, module: {"bits": 7}},
            "--q-mode affine has no --q-bits 7 with --q-group-size 64",
        ),
        ({"mtp": "drop", "mtp_bits": 4}, "--mtp-bits: there is no MTP head to convert in base"),
        ({"attach_mtp": True, "quantize": True}, "--attach-mtp converts the head alone"),
        ({"attach_mtp": True, "dequantize": True}, "--attach-mtp converts the head alone"),
        ({"attach_mtp": True, "mtp": "drop"}, "--attach-mtp converts the head alone"),
        ({"attach_mtp": True}, "/out does not exist"),
        ({"stream": True}, "--stream is for hub repositories; "),
        ({"q_mode": "nf4"}, "q_mode must be one of affine, mxfp4, nvfp4, mxfp8, got 'nf4'"),
        ({"dtype": "float64"}, "dtype must be one of None, float16, bfloat16, float32, got 'float"),
        ({"mtp": "off"}, "mtp must be one of keep, drop, got 'off'"),
        ({"mtp_bits": 7}, "mtp_bits must be one of None, 2, 3, 4, 5, 6, 8, 16, got 7"),
    ],
    ids=options,
)
def test_arguments_that_make_no_sense(refusal, base, arguments, said):
    assert said in refusal(base, **arguments)


def test_bits_of_a_head_that_is_not_there(refusal, tmp_path):
    message = refusal(GOLDENS / "base_fused", mtp_bits=4)
    assert message == "--mtp-bits: there is no MTP head to convert in base_fused"


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", bits, 64) for bits in (-1, 0, 7, 9, 16)]
    + [("affine", 4, group_size) for group_size in (-64, 0, 1, 16, 48, 256, 2**40)]
    + [("mxfp4", 8, 32), ("mxfp4", 4, 64), ("nvfp4", 4, 32), ("mxfp8", 4, 32), ("mxfp8", 8, 64)],
)
def test_quantizations_that_mlx_lacks(refusal, base, mode, bits, group_size):
    message = refusal(base, quantize=True, q_mode=mode, q_bits=bits, q_group_size=group_size)
    start = f"--q-mode {mode} has no --q-bits {bits} with --q-group-size {group_size}: "
    assert message.startswith(start)


def test_upload_without_login(refusal, base, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(base, upload_repo="tester/out")
    assert message == "--upload-repo needs a login: run `hf auth login`, or set HF_TOKEN"
    assert hub.requests == []
