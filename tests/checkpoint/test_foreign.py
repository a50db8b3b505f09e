"""Other libraries' quantized forms: tensors decide, and what cannot be read is named."""

import json
import shutil

import checkpoints
import mlx.core as mx
import pytest
from checkpoints import GOLDENS
from test_load import assert_same_parameters, load32
from test_load_errors import QUERY, edit, reconfigure, refusal

from mlx_qwen3next import load
from mlx_qwen3next.checkpoint.hub import BUNDLED, read_config

# What stands in place of each "weight" -> the part that shows the form, the form as the message
# names it, and the quant_methods that leave it so.
FORMS = {
    ("qweight", "qzeros", "scales", "g_idx"): ("g_idx", "GPTQ", ["gptq", "awq", None]),
    ("qweight", "qzeros", "scales"): ("qweight", "AWQ", ["awq"]),
    ("qweight", "scales", "qzeros"): ("qweight", "GPTQ", ["gptq"]),
    ("scales", "qweight", "qzeros"): ("qweight", "AWQ or GPTQ or auto-round", [None, "fp8"]),
    ("weight_packed", "weight_scale", "weight_shape"): (
        "weight_packed",
        "compressed-tensors",
        ["compressed-tensors", None],
    ),
    ("weight", "weight_scale", "weight_scale_2", "input_scale"): (
        "weight_scale_2",
        "modelopt",
        ["modelopt", None],
    ),
    ("weight", "weight_scale", "input_scale"): ("weight_scale", "modelopt", ["modelopt"]),
    ("weight", "weight_scale"): ("weight_scale", "compressed-tensors", ["compressed-tensors"]),
    ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"): (
        "weight.absmax",
        "bitsandbytes",
        ["bitsandbytes", None],
    ),
    ("weight", "SCB"): ("SCB", "bitsandbytes", ["bitsandbytes", None]),
    ("weight",): ("weight", "hqq", ["hqq"]),  # no telling name, but no number either
}


def in_form(directory, parts, method):
    """Puts bytes under other names in place of the query projection, and the method in the config;
    the tensors that were there before are gone."""
    stem = QUERY.removesuffix("weight")

    def rename(tensors):
        for name in [name for name in tensors if name.startswith(stem)]:
            del tensors[name]
        tensors.update({stem + part: mx.ones((8, 8), mx.uint8) for part in parts})

    edit(directory, rename)
    reconfigure(directory, quantization_config={"quant_method": method, "bits": 4})


def said_of(directory, name, form):
    """The refusal of a checkpoint in a form that the tensor shows."""
    return (
        f"{directory / 'model.safetensors'}: {name} is in the quantized form of {form}, which can "
        "be neither loaded nor converted here; use the unquantized repository or a conversion for "
        "MLX"
    )


@pytest.mark.parametrize("parts", FORMS, ids=" ".join)
def test_forms_are_named_by_tensors_first(base, parts):
    shown, form, methods = FORMS[parts]
    for method in methods:
        in_form(base, parts, method)
        assert refusal(base) == said_of(base, f"{QUERY.removesuffix('weight')}{shown}", form)


def test_the_config_may_lack_the_method(base):
    in_form(base, ("qweight", "qzeros", "scales", "g_idx"), None)
    reconfigure(base)
    assert " is in the quantized form of GPTQ, " in refusal(base)
    in_form(base, ("weight",), None)
    assert refusal(base).endswith(f"{QUERY} is U8, not BF16 or F16 or F32")


@pytest.mark.parametrize(
    "left_over",
    [
        {"quantization_config": {"quant_method": method}}
        for method in ("fp8", "awq", "gptq", "compressed-tensors", "modelopt", "bitsandbytes")
    ]
    + [{"quantization_config": "fp8"}, {"quantization": {"group_size": 64, "bits": 4}}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_whole_weights_load_whatever_the_config_says(base, left_over, dtype):
    edit(base, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(dtype)}))
    whole = load32(base)
    reconfigure(base, **left_over)
    assert_same_parameters(load32(base), whole)


def test_mlxs_own_form_loads_whatever_the_config_says(tmp_path):
    directory = checkpoints.convert(tmp_path / "mlx", group_size=32, bits=4, mode="mxfp4")
    whole = load32(directory)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    for left_over in (config, {k: v for k, v in config.items() if k != "quantization"}):
        file.write_text(json.dumps(left_over))
        assert_same_parameters(load32(directory), whole)


# --- FP8 -----------------------------------------------------------------------------------------
CONVERT = "which is not loaded directly; convert it first: python -m mlx_qwen3next.convert"


@pytest.mark.parametrize("config", [{}, {"quantization_config": checkpoints.FP8}], ids=len)
def test_fp8_has_to_be_converted_first(tmp_path, config):
    directory = checkpoints.write_fp8(tmp_path / "fp8", "base", mx.bfloat16)
    reconfigure(directory, **config)
    shutil.copyfile(BUNDLED / "tokenizer.json", directory / "tokenizer.json")
    start = f"{directory / 'model.safetensors'}: model.layers."
    for message in (refusal(directory), refusal(directory, load)):
        assert message.startswith(start)
        assert message.endswith(f"weight is FP8, {CONVERT} --hf-path …")


# --- repositories --------------------------------------------------------------------------------
def repository(hub, directory, names, method):
    """A repository whose index lists the names; no file with weights is there."""
    config = checkpoints.config("base") | {"quantization_config": {"quant_method": method}}
    checkpoints.write(directory, config, {})
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (directory / checkpoints.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    hub.add("maker/model", directory)


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("q_proj.qweight", "awq", "maker/model: q_proj.qweight is in the quantized form of AWQ, "),
        ("q_proj.weight_scale_inv", "fp8", f"maker/model: q_proj.weight is FP8, {CONVERT}"),
    ],
    ids=["awq", "fp8"],
)
def test_a_repository_is_refused_before_its_weights_are_fetched(hub, tmp_path, name, method, said):
    repository(hub, tmp_path / "source", [name], method)
    with pytest.raises(ValueError) as caught:
        read_config("maker/model")
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_repository_of_whole_weights_is_not_refused(hub, tmp_path):
    repository(hub, tmp_path / "source", [QUERY], "awq")
    assert read_config("maker/model").num_hidden_layers == 4
    hub.add("maker/single", shutil.copytree(GOLDENS / "base", tmp_path / "single"))
    file = tmp_path / "single" / "config.json"
    file.write_text(json.dumps(checkpoints.config("base") | {"quantization_config": "awq"}))
    hub.add("maker/single", tmp_path / "single")  # without an index
    assert read_config("maker/single").num_hidden_layers == 4
