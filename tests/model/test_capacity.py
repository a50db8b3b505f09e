"""Memory: what a model and its cache take, the refusal of what does not fit, loading by layers."""

import json
import math
import os
import re
import struct
import sys
import warnings

import checkpoints
import configs
import forked
import mlx.core as mx
import pytest

from mlx_qwen3next import load_model
from mlx_qwen3next.model import capacity as memory
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model


@pytest.mark.parametrize("case", ["base", "eps"])
@pytest.mark.parametrize("chunks", [[1], [256], [257], [255, 1, 1]], ids=str)
def test_cache_bytes_are_the_caches(case, chunks):
    model = load_model(checkpoints.GOLDENS / case, dtype=mx.float32)
    trunk, head = model.make_cache(), model.mtp.make_cache()
    for length in chunks:
        tokens = mx.zeros((1, length), mx.int32)
        hidden = model.model(tokens, trunk)
        mx.eval(hidden, model.mtp(hidden, tokens, head))
    held = sum(entry.nbytes for entry in trunk)
    count = sum(chunks)
    assert memory.cache_bytes(model.args, count, mtp=False, itemsize=4) == held
    held += sum(entry.nbytes for entry in head)
    assert memory.cache_bytes(model.args, count, mtp=True, itemsize=4) == held


def test_cache_bytes_of_the_80b_model():
    config = Config.from_dict(configs.INSTRUCT)
    state, rows, kv = 32 * 128 * 128 * 4, 3 * 8192 * 2, 2 * 2 * 256 * 2
    assert memory.cache_bytes(config, 262144, mtp=False, itemsize=2) == (
        36 * (state + rows) + 12 * 262144 * kv
    )
    grown = memory.cache_bytes(config, 262144, mtp=True, itemsize=2)
    assert grown - memory.cache_bytes(config, 262144, mtp=False, itemsize=2) == 262144 * kv


# --- what does not fit ---------------------------------------------------------------------------
def claim(directory, config):
    """Writes a checkpoint of that config, terabytes by its header and size, nothing on disk."""
    header, end = {}, 0
    for path, shape in Model(Config.from_dict(config)).parameter_shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        header[path] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (directory / "config.json").write_text(json.dumps(config))
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)
    return end


@pytest.mark.parametrize(("dtype", "ratio"), [(mx.bfloat16, 1), (mx.float32, 2)], ids=str)
def test_too_large_a_model_is_refused_before_its_first_weight(tmp_path, dtype, ratio):
    sizes = {"vocab_size": 2**31 - 1, "hidden_size": 256}
    stored = claim(tmp_path, checkpoints.config("base") | sizes)
    assert stored > 2e12
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path, dtype=dtype)
    assert mx.get_peak_memory() - before < 1e6
    pattern = (
        r"the model needs ([\d.]+) GB \(weights ([\d.]+), cache at 8192 tokens ([\d.]+)\), "
        r"but this machine has ([\d.]+) GB for it\. Use a smaller quantization \(.*\), a "
        r"shorter context, or a converted model with its experts on disk \(.*\)\."
    )
    need, weights, cache, available = map(float, re.fullmatch(pattern, str(caught.value)).groups())
    assert weights == pytest.approx(stored * ratio / 1e9, rel=1e-3)
    assert need == pytest.approx(weights + cache, abs=0.11)
    assert 0 < available < need


def test_context_counts_and_is_at_most_the_models(tmp_path, monkeypatch):
    """`base` takes 2.1 MB, and 1 kB of cache a token."""
    monkeypatch.setattr(memory, "_capacity", lambda: (4e6, 4e6))
    base = checkpoints.GOLDENS / "base"
    load_model(base, dtype=mx.float32, context=1000)
    with pytest.raises(ValueError, match=r"cache at 10000 tokens"):
        load_model(base, dtype=mx.float32, context=10_000)
    with pytest.raises(ValueError, match=r"cache at 262144 tokens"):
        load_model(base, dtype=mx.float32, context=10**9)


def test_more_than_macos_keeps_resident_is_a_warning(monkeypatch):
    monkeypatch.setattr(memory, "_capacity", lambda: (64e9, 48e9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.check(47_000_000_000, 1_000_000_000, 8192)
    with pytest.warns(UserWarning) as caught:
        memory.check(49_000_000_000, 1_000_000_000, 8192)
    (warning,) = caught
    assert str(warning.message) == (
        "the model needs 50.0 GB (weights 49.0, cache at 8192 tokens 1.0), more than the 48.0 GB "
        "macOS lets the GPU keep resident, so it may be slow or fail. To raise the limit: "
        f"sudo sysctl iogpu.wired_limit_mb={int(55e9 / 2**20)}"
    )
    with pytest.warns(UserWarning, match=f"iogpu.wired_limit_mb={int(64e9 / 2**20)}$"):
        memory.check(62_000_000_000, 1_000_000_000, 8192)
    with pytest.raises(ValueError, match=r"needs 65\.0 GB .* has 64\.0 GB"):
        memory.check(64_000_000_000, 1_000_000_000, 8192)


@pytest.mark.parametrize(
    ("system", "info", "capacity"),
    [
        ("Darwin", {"memory_size": 64e9, "max_recommended_working_set_size": 48e9}, (64e9, 48e9)),
        ("Linux", {"total_memory": 80e9}, (80e9, 80e9)),
    ],
    ids=["Apple", "CUDA"],
)
def test_capacity_of_gpus(monkeypatch, system, info, capacity):
    monkeypatch.setattr(memory.platform, "system", lambda: system)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert memory._capacity() == capacity


def test_capacity_of_this_machine():
    total, comfortable = memory._capacity()
    assert 0 < comfortable <= total
    if mx.default_device() == mx.cpu:
        assert total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- loading -------------------------------------------------------------------------------------
LOAD = """
import sys
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_qwen3next import load_model
mx.reset_peak_memory()
model = load_model(sys.argv[1], dtype=getattr(mx, sys.argv[2]))
arrays = dict(tree_flatten(model.parameters()))
layer = sum(a.nbytes for name, a in arrays.items() if name.startswith("model.layers.1."))
print(mx.get_peak_memory(), mx.get_active_memory(), sum(a.nbytes for a in arrays.values()), layer)
"""


def thirty_megabytes(directory, layout):
    """A checkpoint in bf16 of eight layers of which the experts are nearly all."""
    config = checkpoints.config("base") | {
        "num_hidden_layers": 8,
        "num_experts": 16,
        "moe_intermediate_size": 640,
    }
    weights = {}
    for path, shape in Model(Config.from_dict(config)).parameter_shapes().items():
        if path.endswith("conv1d.weight"):
            shape = (shape[0], shape[2], shape[1])
        if ".switch_mlp." in path:
            count, *shape = shape
            names = [path.replace("switch_mlp", f"experts.{e}") for e in range(count)]
        else:
            names = [path]
        weights |= {name: mx.full(shape, 0.5, mx.bfloat16) for name in names}
    if layout == "fused":
        weights = checkpoints.fuse(weights)
    return checkpoints.write(directory, config, {"model.safetensors": weights})


@pytest.mark.parametrize(
    ("layout", "dtype"), [("hub", "float32"), ("hub", "bfloat16"), ("fused", "bfloat16")]
)
def test_loading_needs_little_more_than_the_model(tmp_path, layout, dtype):
    directory = thirty_megabytes(tmp_path, layout)
    command = [sys.executable, "-c", LOAD, str(directory), dtype]
    result = forked.run(command)
    result.check_returncode()
    peak, active, held, layer = map(int, result.stdout.split())
    assert held > 30e6
    assert active < held + 0.1 * layer
    # Half a layer at most: one parameter as stored, and marks of which values are finite.
    assert peak < held + 0.75 * layer
