"""The parts of the bench: bytes, limits, agreement, sides, growth, prompts, random weights."""

import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GOLDENS, relative_error
from mlx_lm.utils import load_model as load_stock

from mlx_qwen3next import load_model
from mlx_qwen3next.bench import prompts, shapes
from mlx_qwen3next.bench.comparison.agreement import Disagreement, check_tie, common_prefix
from mlx_qwen3next.bench.comparison.growth import exponent, fit_quadratic, in_words
from mlx_qwen3next.bench.comparison.measure import fits_another, predicted
from mlx_qwen3next.bench.comparison.run import clipped, link_common_files
from mlx_qwen3next.bench.comparison.sides import Side, partner, sides_of
from mlx_qwen3next.bench.comparison.summary import extrapolated
from mlx_qwen3next.bench.traffic import traffic
from mlx_qwen3next.checkpoint.files import NORMS_FILE, find_files, read_headers
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.reading import Reading
from mlx_qwen3next.storage.safetensors import Tensor


# --- bytes a token -------------------------------------------------------------------------------
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("case", ["base", "base_fused"])
def test_bytes_a_token(case, itemsize):
    """Counted by hand from the config of `base`, in both layouts of the hub."""
    experts = 3 * (3 * 64 * 32)  # three of eight
    moe = experts + 3 * 64 * 32 + 64 * 8 + 64  # …the shared expert, the router, its gate
    linear = 64 * 640 + 64 * 8 + 512 * 4 + 128 * 64 + moe
    attention = 64 * 256 + 2 * 64 * 64 + 128 * 64 + moe
    exact = 3 * (2 * 64 + 4 + 4 + 32) + (2 * 64 + 2 * 32) + 64  # float32 always: norms, A_log…
    row = 64  # of the embedding
    head = (128 * 64 + attention) * itemsize + (2 * 64 + 2 * 32 + 3 * 64) * 4
    states = 2 * 3 * (4 * 32 * 96 * 4 + 3 * 512 * itemsize)

    files = find_files(GOLDENS / case)
    config = Config.from_file(GOLDENS / case / "config.json")
    counted = traffic(read_headers(files), config, itemsize)
    assert counted.trunk == (3 * linear + attention + row) * itemsize + exact * 4
    assert counted.output == 96 * 64 * itemsize
    assert counted.head == (head if case == "base" else 0)
    assert counted.states == states
    assert counted.kv == 2 * 2 * 32 * itemsize
    assert counted.plain(100) == counted.trunk + counted.output + states + 100 * counted.kv
    assert counted.round(100, 2) == counted.plain(100) + 2 * (counted.head + counted.output)


def test_bytes_of_a_prompt():
    """One token's are a step's; of many, every expert's weights are read, once."""
    files = find_files(GOLDENS / "base")
    config = Config.from_file(GOLDENS / "base" / "config.json")
    counted = traffic(read_headers(files), config, 4)
    assert counted.prompt(1) == counted.plain(1)
    others = 4 * 5 * 3 * (64 * 32) * 4  # of four layers, five of eight experts
    assert counted.prompt(200) == counted.plain(200) + others
    two = counted.prompt(2) - counted.plain(2)  # on average three eighths of a token's others
    assert abs(two - others * 3 / 8) <= 1
    assert counted.multiply_adds(7) == Reading(config, 4, 0, False).multiply_adds(7, 0)


def test_quantized_codes_count_as_stored():
    config = Config.from_file(GOLDENS / "base" / "config.json")
    stack = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {
        f"{stack}.weight": Tensor(None, "U32", (8, 32, 8)),
        f"{stack}.scales": Tensor(None, "BF16", (8, 32, 2)),
    }
    counted = traffic(tensors, config, itemsize=4)
    assert counted.trunk == 3 * (32 * 8 * 4 + 32 * 2 * 4)


# --- limits --------------------------------------------------------------------------------------
def test_the_prediction_goes_by_the_longest_shorter_context():
    samples = {n: [{"first": n**2 / 2e4, "further": 0.5}] for n in (100, 200)}
    samples[800] = []
    assert predicted(samples, 400, tokens=8) == 4 + 8 * 0.5
    assert predicted(samples, 150, tokens=0) == 0.75
    assert predicted({}, 400, tokens=8) == 0
    assert predicted({400: [{"first": 9, "further": 9}]}, 100, tokens=8) == 0


def test_repeats_end_before_the_limit():
    assert fits_another([], 1)
    assert fits_another([2.0, 4.0], 9.0) and not fits_another([2.0, 4.0], 8.9)


def test_contexts_are_clipped():
    assert clipped([8192, 128, 512, 128], 1000, "--contexts")[0] == [128, 512, 1000]
    assert "8192 became 1000" in clipped([8192], 1000, "--contexts")[1][0]
    assert clipped([8], 8, "--contexts") == ([8], [])
    with pytest.raises(ValueError, match="takes no prompt"):
        clipped([8], 0, "--contexts")


# --- agreement -----------------------------------------------------------------------------------
def test_tokens_are_common_up_to_the_first_difference():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2


def test_a_tie_is_within_a_few_times_the_noise():
    logits = np.array([1.0, 0.9, -1.0, -1.0])  # about 1 typically
    check_tie("both", 3, logits, (0, 1), error=0.02)
    with pytest.raises(Disagreement, match="position 3: 0 and 1"):
        check_tie("both", 3, logits, (0, 1), error=0.01)
    with pytest.raises(Disagreement):
        check_tie("both", 3, logits * np.nan, (0, 1), error=0.1)


# --- sides ---------------------------------------------------------------------------------------
def test_each_dtype_is_compared_once(monkeypatch):
    tensors = read_headers(find_files(BUNDLED))
    here, stored = Side("ours", "float32"), Side("stock", "bfloat16")
    monkeypatch.setattr("mlx_qwen3next.bench.comparison.sides.default_dtype", lambda: mx.float32)
    both = sides_of("both", tensors, stock=True)
    assert both == [here, stored, Side("stock", "float32")]
    assert [partner(side, both) for side in both[1:]] == [here, here]
    assert sides_of("both", tensors, stock=False) == [here]
    monkeypatch.setattr("mlx_qwen3next.bench.comparison.sides.default_dtype", lambda: mx.bfloat16)
    both = sides_of("both", tensors, stock=True)
    assert partner(both[3], both) == here and partner(both[1], both).dtype == "bfloat16"
    assert sides_of("default", tensors, stock=True) == both[:2]


def test_both_sides_get_the_same_files(tmp_path):
    names = {file.name for file in link_common_files(BUNDLED, tmp_path).iterdir()}
    assert names == {file.name for file in BUNDLED.iterdir()} - {NORMS_FILE}
    assert (tmp_path / "model.safetensors").samefile(BUNDLED / "model.safetensors")


# --- growth --------------------------------------------------------------------------------------
def test_growth_in_words():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    rows = [
        {"tokens": n, "seconds": n / 100, "linear": 1e-3, "attention": 1e-3 + n * 1e-8,
         "step": 2e-3, "cache": 1.01 * n, "formula": n} for n in (1000, 2000, 4000)
    ]  # fmt: skip
    reading, parts, linear, attention, _, memory = in_words(rows)
    assert "tokens^1.00" in reading
    assert "10.00 ms a token" in parts and "0% of all at 4000 tokens" in parts
    assert "a linear layer takes 1.00 times" in linear and "+0.0 µs" in linear
    assert "an attention layer takes 1.03 times" in attention and "+10.0 µs" in attention
    assert "within 1.0%" in memory
    n = [1000, 2000, 4000]
    assert fit_quadratic(n, [x * 2e-3 + x * x * 1e-6 for x in n]) == pytest.approx((2e-3, 1e-6, 0))


def test_the_time_outside_the_layers_is_not_extrapolated():
    assert extrapolated(5.0, fixed=1.0, layers=4) == 1.0 + 12 * 4.0
    assert extrapolated(5.0, fixed=1.0, layers=48) == 5.0


# --- prompts -------------------------------------------------------------------------------------
def test_prompts_are_text_if_there_is_a_tokenizer():
    ids, kind = prompts.tokens(BUNDLED, 200_000, 4096)
    assert kind == "Python library files" and len(ids) == 200_000
    assert len(set(ids)) > 1000 and max(ids) < 4096
    assert prompts.tokens(BUNDLED, 50, 4096)[0] == ids[:50]


def test_prompts_without_a_tokenizer_are_random_but_always_the_same():
    ids, kind = prompts.tokens(GOLDENS / "base", 500, 96)
    assert kind == "random tokens" and set(ids) == set(range(96))
    assert prompts.tokens(GOLDENS / "base", 500, 96)[0] == ids


# --- random weights ------------------------------------------------------------------------------
@pytest.mark.parametrize("experts", [4, 3])
def test_random_weights_run_on_both_sides(tmp_path, monkeypatch, experts):
    bits = partial(shapes.bits_of, experts=experts)
    tiny = {"vocab_size": 512, "hidden_size": 128, "num_experts": 8, "head_dim": 32}
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.SHAPES["small"] | tiny)
    shapes.write(tmp_path, "small", 4, bits)
    files = find_files(tmp_path)
    assert len(files) == 6  # four layers, the rest of the trunk, the head
    written, planned = read_headers(files), shapes.headers("small", 4, bits)
    form = [{name: (t.dtype, t.shape) for name, t in of.items()} for of in (written, planned)]
    assert form[0] == form[1]
    assert sum(t.nbytes for t in written.values()) == shapes.size_of("small", 4, bits)
    ours, (stock, _) = load_model(tmp_path, dtype=mx.float32), load_stock(tmp_path)
    stock.set_dtype(mx.float32)
    tokens = mx.arange(40)[None]
    logits = ours(tokens)
    assert relative_error(logits, stock(tokens)) < 1e-4
    assert 0.3 < logits.std().item() < 3
    assert ours.mtp is not None and ours.args.max_position_embeddings >= 65536
    said = ours.args.quantization
    assert said["model.layers.3.mlp.gate"]["bits"] == 8
    assert said.get("model.layers.3.mlp.switch_mlp.up_proj", said)["bits"] == experts
    layers = [*ours.layers, *ours.mtp.layers]
    assert all(layer.mlp.down_proj.bits == experts for layer in layers)
    assert all(("shared_expert" in layer.mlp) == (experts != 4) for layer in layers)


def test_random_weights_need_room(tmp_path, monkeypatch):
    room = shapes.size_of("small", 4) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, room))
    with pytest.raises(ValueError, match=r"4 layers need .* GB in"):
        shapes.write(tmp_path, "small", 4)
    assert not list(tmp_path.iterdir())


def test_as_many_layers_as_fit(monkeypatch):
    few, more = (shapes.size_of("80b", n) for n in (4, 8))
    period = more - few
    monkeypatch.setattr(shapes.capacity, "spare", lambda: (few + 2.5 * period) / shapes.ROOM)
    assert shapes.layers_that_fit("80b", models=1) == 12
    assert shapes.layers_that_fit("80b", models=2) == 4
    monkeypatch.setattr(shapes.capacity, "spare", lambda: 10**12)
    assert shapes.layers_that_fit("80b", models=2) == 48
    assert shapes.layers_that_fit("small", models=2) == 8
    monkeypatch.setattr(shapes.capacity, "spare", lambda: few)
    with pytest.raises(ValueError, match="does not fit"):
        shapes.layers_that_fit("80b", models=1)


def test_random_weights_of_the_small_shape_are_tame(tmp_path, monkeypatch):
    """Rounding to bfloat16 must not change the experts everywhere, or the sides could not agree."""
    shape = shapes.SHAPES["small"] | {"vocab_size": 512, "num_experts": 16}
    monkeypatch.setitem(shapes.SHAPES, "small", shape)
    shapes.write(tmp_path, "small", 4)
    tokens = mx.array(np.random.default_rng(0).integers(0, 512, (1, 16)))
    exact = load_model(tmp_path)(tokens)[0, -1]
    stock, _ = load_stock(tmp_path)
    assert relative_error(stock(tokens)[0, -1].astype(mx.float32), exact) < 0.1
