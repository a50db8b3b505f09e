"""What cannot be loaded is refused in one line that names file and tensor, and stays as it was."""

import hashlib
import json
import os
import shutil
import struct

import checkpoints
import mlx.core as mx
import pytest
from checkpoints import INDEX

from mlx_qwen3next import load, load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.3.self_attn.q_proj.weight"


def digest(directory):
    """Of every name and every byte below the directory."""
    state = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        state.update(str(file).encode() + (file.read_bytes() if file.is_file() else b""))
    return state.hexdigest()


def refusal(directory, loader=load_model, **arguments):
    """The message the directory is refused with."""
    before = digest(directory)
    with pytest.raises(ValueError) as caught:
        loader(directory, **arguments)
    assert digest(directory) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- files ---------------------------------------------------------------------------------------
def sharded(directory):
    """Splits `base` into two shards with an index."""
    trunk, head = checkpoints.split(checkpoints.tensors("base"))
    (directory / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": trunk, "model-00002-of-00002.safetensors": head}
    checkpoints.write(directory, checkpoints.config("base"), files, index=True)


def header(file):
    """(header as a dict, data) of a safetensors file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def last_tensor(file):
    entries, _ = header(file)
    entries.pop("__metadata__", None)
    return max(entries, key=lambda name: entries[name]["data_offsets"][1])


def test_tensors_that_overlap(base):
    """Sizes alone would not show it."""
    file = base / "model.safetensors"
    entries, data = header(file)
    entries.pop("__metadata__", None)
    begin, end = entries[QUERY]["data_offsets"]
    before = next(e for e in entries.values() if e["data_offsets"][1] == begin)
    entries[QUERY]["data_offsets"] = [begin - 4, end - 4]
    write_header(file, entries, data)
    at = file.stat().st_size - len(data)
    assert refusal(base) == (
        f"{file}: {QUERY} begins at byte {at + begin - 4}, "
        f"the data before it ends at {at + before['data_offsets'][1]}. Download it again."
    )


def test_bytes_after_the_last_tensor(base):
    file = base / "model.safetensors"
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"\0" * 8)
    assert refusal(base) == (
        f"{file} has {size + 8} bytes, but its last tensor ends at {size}. Download it again."
    )


def test_cut_off_in_the_data(base):
    file = base / "model.safetensors"
    size, name = file.stat().st_size, last_tensor(file)
    os.truncate(file, size - 1)
    assert refusal(base) == (
        f"{file} is truncated: {name} ends at byte {size}, the file at {size - 1}. "
        "Download it again."
    )


@pytest.mark.parametrize("size", [0, 5, 8, 5000])
def test_cut_off_in_the_header(base, size):
    file = base / "model.safetensors"
    os.truncate(file, size)
    assert refusal(base).startswith(f"{file} is truncated in its header, or no safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 1064520",
        struct.pack("<Q", 2**62) + bytes(100),
    ],
    ids=["git-lfs pointer", "header without end"],
)
def test_something_else_under_the_name(base, content):
    file = base / "model.safetensors"
    file.write_bytes(content)
    assert refusal(base).startswith(f"{file} is truncated in its header, or no safetensors file")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"no JSON",
        b"\xff\xfe",
        b"[" * 200_000,
        [1, 2],
        {"x": 1},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": ENTRY | {"shape": ["2"]}},
        {"x": ENTRY | {"shape": 2}},
        {"x": ENTRY | {"shape": [-2]}},
        {"x": ENTRY | {"data_offsets": [8]}},
        {"x": ENTRY | {"data_offsets": [-8, 0]}},
    ],
    ids=lambda content: str(content)[:50],
)
def test_header_that_makes_no_sense(base, content):
    file = base / "model.safetensors"
    write_header(file, content, bytes(16))
    assert refusal(base) == f"{file} is not a safetensors file: its header says no tensors"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY | {"dtype": "F31"}, "x is F31 [2] in 8 bytes, which does not agree"),
        (ENTRY | {"shape": [3]}, "x is F32 [3] in 8 bytes, which does not agree"),
        (ENTRY | {"data_offsets": [8, 0]}, "x is F32 [2] in -8 bytes, which does not agree"),
    ],
    ids=["dtype", "shape", "backwards"],
)
def test_header_that_contradicts_itself(base, entry, message):
    file = base / "model.safetensors"
    write_header(file, {"x": entry}, bytes(16))
    assert refusal(base) == f"{file}: {message}"


def test_no_weights(base):
    (base / "model.safetensors").unlink()
    assert refusal(base) == f"{base} has no model*.safetensors"


def test_weight_file_is_a_directory(base):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").mkdir()
    assert refusal(base) == f"{base / 'model.safetensors'} cannot be read: Is a directory"


def test_missing_shard(base):
    sharded(base)
    shard = base / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert refusal(base) == f"{shard} is missing; {INDEX} lists it. Download it again."


def test_missing_shard_without_an_index(base):
    sharded(base)
    (base / INDEX).unlink()
    (base / "model-00001-of-00002.safetensors").unlink()
    assert refusal(base) == (
        f"{base}: the tensor model.embed_tokens.weight is missing from every file"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 200_000,
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"x": 1}}',
        b'{"weight_map": {"x": ["model.safetensors"]}}',
    ],
    ids=lambda content: repr(content)[:40],
)
def test_index_that_is_none(base, content):
    (base / INDEX).write_bytes(content)
    assert refusal(base).startswith(f"{base / INDEX} is not a safetensors index")


# --- tensors -------------------------------------------------------------------------------------
def edit(directory, change, file="model.safetensors"):
    """Applies `change` to the tensors of a file, in place; returns the file."""
    tensors = mx.load(str(directory / file))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(directory / file), tensors)
    return directory / file


@pytest.mark.parametrize(
    "name", [QUERY, EXPERT, "model.layers.0.linear_attn.A_log", "lm_head.weight", "mtp.fc.weight"]
)
def test_missing_tensor(base, name):
    edit(base, lambda tensors: tensors.pop(name))
    assert refusal(base) == f"{base}: the tensor {name} is missing from every file"


def test_first_expert_missing_everywhere(base):
    """Without expert 0 the layout still shows."""

    def remove(tensors):
        for name in [name for name in tensors if ".experts.0." in name]:
            del tensors[name]

    edit(base, remove)
    message = refusal(base)
    assert message.startswith(f"{base}: the tensor ") and ".mlp.experts.0." in message


def test_no_tensors_at_all(base):
    write_header(base / "model.safetensors", {"__metadata__": {"format": "pt"}})
    assert refusal(base).startswith(f"{base}: the tensor ")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.mlp.experts.8.up_proj.weight",
        "model.layers.3.self_attn.q_proj.bias",
        "model.layers.3.self_attn.q_proj.weight_scale_inv",
        "mtp.layers.1.input_layernorm.weight",
        "fc.weight",
    ],
)
def test_surplus_tensor(base, name):
    file = edit(base, lambda tensors: tensors.update({name: mx.ones((2,))}))
    assert refusal(base) == f"{file}: the tensor {name} has no place in this model"


@pytest.mark.parametrize("name", [QUERY, EXPERT, "model.norm.weight", "mtp.norm.weight"])
def test_wrong_shape(base, name):
    shape = list(checkpoints.tensors("base")[name].shape)
    file = edit(base, lambda tensors: tensors.update({name: mx.ones([*shape, 1])}))
    assert refusal(base) == (
        f"{file}: {name} has shape {[*shape, 1]}, but the config asks for {shape}"
    )


def test_wrong_dtype(base):
    file = edit(base, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(mx.int32)}))
    assert refusal(base) == f"{file}: {QUERY} is I32, not BF16 or F16 or F32"


def test_float8_without_scales(base):
    """MLX would read it as integers."""
    file = edit(base, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(mx.uint8)}))
    entries, data = header(file)
    entries[QUERY]["dtype"] = "F8_E4M3"
    write_header(file, entries, data)
    assert refusal(base) == f"{file}: {QUERY} is F8_E4M3, not BF16 or F16 or F32"


def test_tensor_in_two_files(base):
    sharded(base)
    second = base / "model-00002-of-00002.safetensors"
    edit(base, lambda tensors: tensors.update({EXPERT: mx.ones((2,))}), second.name)
    first = base / "model-00001-of-00002.safetensors"
    assert refusal(base) == f"{EXPERT} is in both {first} and {second}"


def test_head_in_the_shards_and_in_a_sidecar(base):
    _, head = checkpoints.split(checkpoints.tensors("base"))
    mx.save_safetensors(str(base / "mtp.safetensors"), head)
    message = refusal(base)
    assert message.startswith("mtp.") and message.endswith(
        f"is in both {base / 'model.safetensors'} and {base / 'mtp.safetensors'}"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    "name",
    [QUERY, EXPERT, "model.norm.weight", "model.layers.1.linear_attn.A_log", "mtp.fc.weight"],
)
def test_not_finite(base, name, value):
    def spoil(tensors):
        flat = tensors[name].flatten()
        flat[flat.size // 2] = value
        tensors[name] = flat.reshape(tensors[name].shape)

    file = edit(base, spoil)
    assert refusal(base) == f"{file}: {name} holds NaN or infinite values"


def test_too_large_for_float16(base):
    file = edit(base, lambda tensors: tensors.update({QUERY: tensors[QUERY] * 1e6}))
    assert refusal(base, dtype=mx.float16) == f"{file}: {QUERY} overflows in the dtype asked for"
    load_model(base, dtype=mx.float32)


# --- config --------------------------------------------------------------------------------------
def reconfigure(directory, **changes):
    config = checkpoints.config("base") | changes
    (directory / "config.json").write_text(json.dumps(config))


def test_config_of_another_model(base):
    reconfigure(base, model_type="llama")
    assert refusal(base).startswith(f"{base / 'config.json'}: model_type is 'llama'")
    assert refusal(base, load).startswith(f"{base / 'config.json'}: model_type is 'llama'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 9}, ".mlp.gate.weight has shape [8, 64], but the config asks for [9, 64]"),
        ({"num_hidden_layers": 5}, "the tensor model.layers.4."),
        ({"num_hidden_layers": 3}, "the tensor model.layers.3."),
        ({"full_attention_interval": 2}, "the tensor model.layers.1.self_attn."),
        ({"tie_word_embeddings": True, "vocab_size": 97}, "embed_tokens.weight has shape [96, 64]"),
        ({"linear_conv_kernel_dim": 3}, "conv1d.weight has shape [512, 1, 4]"),
        ({"hidden_size": 2**31 - 1}, "the config's sizes are beyond MLX's arrays"),
    ],
    ids=["experts", "more layers", "fewer layers", "interval", "vocabulary", "taps", "too large"],
)
def test_config_that_does_not_fit_the_weights(base, changes, message):
    reconfigure(base, **changes)
    assert message in refusal(base)


def test_no_config(base):
    (base / "config.json").unlink()
    assert refusal(base) == f"{base} is no model directory: it has no config.json"


# --- quantized checkpoints -----------------------------------------------------------------------
@pytest.fixture
def quantized(tmp_path):
    return checkpoints.convert(tmp_path / "quantized", group_size=32, bits=4)


SCALES = "model.layers.0.mlp.switch_mlp.up_proj.scales"


def test_scales_that_are_not_finite(quantized):
    file = edit(quantized, lambda tensors: tensors.update({SCALES: tensors[SCALES] * float("nan")}))
    assert refusal(quantized) == f"{file}: {SCALES} holds NaN or infinite values"


def test_scales_without_weight(quantized):
    weight = SCALES.replace("scales", "weight")
    file = edit(quantized, lambda tensors: tensors.pop(weight))
    assert refusal(quantized) == f"{file}: {SCALES} has no {weight} beside it"


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F32", [8, 32, 3]),
        ("F32", [8, 32, 0]),
        ("F32", [8, 32, 65]),
        ("F32", []),
        ("U8", [8, 32, 1]),
    ],
    ids=str,
)
def test_scales_of_no_known_quantization(quantized, dtype, shape):
    scales = mx.ones(shape, {"F32": mx.float32, "U8": mx.uint8}[dtype])
    file = edit(quantized, lambda tensors: tensors.update({SCALES: scales}))
    assert refusal(quantized) == (
        f"{file}: model.layers.0.mlp.switch_mlp.up_proj is quantized in no way MLX knows: "
        f"64 columns, weight U32 [8, 32, 8], scales {dtype} {shape}"
    )


def test_biases_missing(quantized):
    biases = SCALES.replace("scales", "biases")
    edit(quantized, lambda tensors: tensors.pop(biases))
    assert refusal(quantized) == f"{quantized}: the tensor {biases} is missing from every file"


def test_scale_per_tensor_where_there_can_be_none(quantized):
    name = "model.layers.3.self_attn.q_proj.global_scale"
    file = edit(quantized, lambda tensors: tensors.update({name: mx.ones(())}))
    assert refusal(quantized) == f"{file}: the tensor {name} has no place in this model"


# --- tokenizer -----------------------------------------------------------------------------------
@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(BUNDLED, tmp_path / "bundle")


def test_no_tokenizer(base):
    assert refusal(base, load) == f"{base} has no tokenizer.json"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"added_tokens": 1}'])
def test_tokenizer_that_is_none(bundle, content):
    (bundle / "tokenizer.json").write_text(content)
    message = refusal(bundle, load)
    assert message.startswith(f"{bundle}: the tokenizer cannot be loaded: ")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "holds list, not a JSON object"),
        (b"\xff", "is not valid JSON"),
    ],
)
def test_generation_config_that_is_none(bundle, content, fault):
    file = bundle / "generation_config.json"
    file.write_bytes(content)
    assert refusal(bundle, load).startswith(f"{file} {fault}")
