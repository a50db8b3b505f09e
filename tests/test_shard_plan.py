"""What dividing a model takes, as `--shard-plan` computes it, beside what ranks hold and send."""

import json
import math
import re
import shutil

import mlx.core as mx
import pytest
from checkpoints import GOLDENS
from mlx.utils import tree_flatten

from mlx_qwen3next import load_model, memory
from mlx_qwen3next.bench import shapes, shard_plan, shard_report
from mlx_qwen3next.bench.__main__ import main
from mlx_qwen3next.bench.shard_plan import (
    MODES,
    busiest,
    divide,
    messages_a_step,
    own,
    parameters,
    quantized,
    sent_a_step,
    smallest_mac,
)
from mlx_qwen3next.config import Config
from mlx_qwen3next.group import Group
from mlx_qwen3next.load import BUNDLED
from mlx_qwen3next.sharding import Shard, split_layers

BASE = Config.from_file(GOLDENS / "base" / "config.json")
DEMO = Config.from_file(BUNDLED / "config.json")
FULL = Config.from_dict(shapes.config("80b", shapes.FULL))
RATES = {"link": 2.0, "latency": 10.0, "memory_bandwidth": 100.0}


def bfloat16(path, module):
    return False


def parts(config, size, mode):
    layers = [range(0)] * size
    if mode == "pipeline":
        layers = split_layers(config.num_hidden_layers, [1] * size)
    return [Shard(config, rank, size, mode, layers[rank]) for rank in range(size)]


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


# --- on the wire ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config, size, mode, measured",
    [
        (DEMO, 2, "tensor", [17408] * 2),
        (DEMO, 2, "expert", [17408] * 2),
        (BASE, 4, "tensor", [3744] * 4),
        (DEMO, 2, "pipeline", [2048, 1024]),
        (DEMO, 1, "tensor", [0]),
        (DEMO, 1, "pipeline", [0]),
    ],
)
def test_bytes_sent_are_those_measured(config, size, mode, measured):
    """Counted by the kernel, of real processes (tests/rank.py), in float32."""
    assert sent_a_step(config, size, mode, itemsize=4) == measured
    twice = sent_a_step(config, size, mode, itemsize=2, rows=2)
    assert twice == measured


def test_messages_in_a_row():
    sums = 1 + 2 * 4
    assert messages_a_step(BASE, 1, "tensor") == messages_a_step(BASE, 1, "pipeline") == 0
    assert messages_a_step(BASE, 4, "tensor") == messages_a_step(BASE, 4, "expert") == sums * 6 + 3
    assert messages_a_step(BASE, 4, "pipeline") == 3 + 6


# --- memory --------------------------------------------------------------------------------------
class Place(Group):
    """A rank's place in a group, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("directory, size", [(GOLDENS / "base", 4), (BUNDLED, 2), (BUNDLED, 1)])
def test_ranks_hold_what_they_load(directory, size, mode):
    config = Config.from_file(directory / "config.json")
    how = quantized(config.quantization) if config.quantization else bfloat16
    tensors = parameters(config, how)
    for part in parts(config, size, mode):
        model = load_model(
            directory,
            dtype=mx.bfloat16,
            group=Place(part.rank, size),
            mode=mode,
            layers=[config.num_hidden_layers // size] * size if mode == "pipeline" else None,
            pack=False,
        )
        loaded = {part.whole_path(p): a for p, a in tree_flatten(model.parameters())}
        mine = own(tensors, part)
        assert {p: t.shape for p, t in mine.items()} == {p: a.shape for p, a in loaded.items()}
        assert nbytes(mine) == sum(array.nbytes for array in loaded.values())


REPLICATED = {  # beside norms
    "tensor": r"norm\.weight|_norm_\w+\.weight|mlp\.gate\.|shared_expert_gate\.|^mtp\.fc\.",
    "expert": r"norm\.weight|_norm_\w+\.weight|mlp\.gate\.|^mtp\.fc\.",
    "pipeline": r"embed_tokens\.|^lm_head\.|^model\.norm\.|^mtp\.",
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_hold_the_whole_and_what_all_have(mode, size):
    tensors = parameters(FULL, quantized({"group_size": 64, "bits": 4}))
    common = {p: t for p, t in tensors.items() if re.search(REPLICATED[mode], p)}
    held = sum(nbytes(own(tensors, part)) for part in parts(FULL, size, mode))
    assert common and held == nbytes(tensors) + (size - 1) * nbytes(common)


def test_the_80b_model_at_4_bits():
    tensors = parameters(FULL, quantized({"group_size": 64, "bits": 4}))
    exact = [math.prod(t.shape) for t in tensors.values() if t.dtype == "F32"]
    # On disk norms, A_log and dt_bias are bfloat16.
    assert nbytes(tensors) == shapes.size_of("80b", shapes.FULL) + 2 * sum(exact)
    divided = divide(FULL, tensors, 2, "tensor", 1024)
    cache = memory.cache_bytes(FULL, 1024, mtp=True, itemsize=2) // 2
    assert divided.held == [nbytes(own(tensors, part)) + cache for part in parts(FULL, 2, "tensor")]


def test_quantizations_differ_by_their_bits():
    path = "model.layers.0.linear_attn.in_proj_qkvz"
    weights = 12288 * 2048
    for bits in (4, 6, 8):
        tensors = parameters(FULL, quantized({"group_size": 64, "bits": bits}))
        size = nbytes({p: t for p, t in tensors.items() if p.startswith(path)})
        assert size == weights * (bits / 8 + 4 / 64)
        gate = nbytes(
            {p: t for p, t in tensors.items() if p.startswith("model.layers.0.mlp.gate.")}
        )
        assert gate == 512 * 2048 * (1 + 4 / 64)


def test_layers_that_are_not_alike():
    """One of them dense, as wide as the others' shared expert, and quantized otherwise."""
    raw = BASE.to_dict() | {"mlp_only_layers": [1], "intermediate_size": 128}
    raw |= {"shared_expert_intermediate_size": 128, "moe_intermediate_size": 64}
    config = Config.from_dict(raw)
    path = "model.layers.2.linear_attn.out_proj"
    how = {"group_size": 32, "bits": 4, path: {"group_size": 32, "bits": 8}}
    tensors = parameters(config, quantized(how))
    for mode in ("tensor", "expert"):
        for part in parts(config, 2, mode):
            for name, tensor in own(tensors, part).items():
                assert own({name: tensors[name]}, part) == {name: tensor}  # as if it were alone


def test_layers_of_a_pipeline():
    tensors = parameters(FULL, bfloat16, head=False)
    divided = divide(FULL, tensors, 5, "pipeline", 256)
    assert sum(divided.layers) == 48 and set(divided.layers) == {9, 10}
    most = divided.layers.index(10)
    assert divided.held[most] > divided.held[divided.layers.index(9)]


def test_the_smallest_mac():
    assert smallest_mac(0) == 24
    assert smallest_mac(int(96 * 2**30 * 0.75)) == 96
    assert smallest_mac(int(96 * 2**30 * 0.75) + 1) == 128
    assert smallest_mac(10**12) is None


# --- time ----------------------------------------------------------------------------------------
def test_seconds_by_hand():
    """Of `base` in bfloat16, four layers, no head."""
    tensors = parameters(BASE, bfloat16, head=False)
    whole = divide(BASE, tensors, 1, "tensor", 100, RATES)
    assert whole.seconds == pytest.approx([whole.read / 100e9, 0, 0])

    two = divide(BASE, tensors, 2, "tensor", 100, RATES)
    sent = 9 * 64 * 2 + 48 * 2 + 4  # sums of N bytes send as many in two; the chosen token
    assert two.sent == [sent] * 2 and two.messages == 9 * 2 + 1 + 2
    assert two.seconds == pytest.approx([two.read / 100e9, sent / 2e9, two.messages * 10e-6])
    assert whole.read / 2 < two.read < whole.read * 0.6

    piped = divide(BASE, tensors, 4, "pipeline", 100, RATES)
    assert piped.read == whole.read
    hidden = 64 * 2
    assert piped.seconds[1] == pytest.approx((3 * hidden + 1.5 * hidden + 6) / 2e9)
    assert piped.messages == 3 + 6 + 6


def test_experts_wait_for_the_busiest():
    config = Config.from_dict(BASE.to_dict() | {"num_experts": 8, "num_experts_per_tok": 4})
    # Of 70 ways to choose 4 of 8, 36 have 2 of either half; one more stands for the others.
    assert busiest(config, 2) == pytest.approx((3 * 36 + 4 * 34) / 70, rel=0.01)
    tensors = parameters(config, bfloat16, head=False)
    read = {mode: divide(config, tensors, 2, mode, 100).read for mode in ("tensor", "expert")}
    expert, shared = 4 * 3 * 64 * 32 * 2, 4 * (3 * 64 * 32) * 2  # bytes, of all four layers
    more = expert * (busiest(config, 2) - 4 / 2) + shared / 2
    assert read["expert"] - read["tensor"] == pytest.approx(more)


def test_a_model_without_experts_divides():
    config = Config.from_file(GOLDENS / "dense" / "config.json")
    config = Config.from_dict(config.to_dict() | {"num_experts": 0, "num_experts_per_tok": 0})
    tensors = parameters(config, bfloat16, head=False)
    assert divide(config, tensors, 2, "expert", 9) == divide(config, tensors, 2, "tensor", 9)


# --- the command ---------------------------------------------------------------------------------
def test_the_command(call, tmp_path):
    file = tmp_path / "plan.json"
    status, out, err = call(main, "--shard-plan", "--json", file)
    assert (status, err) == (0, "")
    assert "computed, nothing of it was measured" in out
    assert "--shape 80b, 48 layers and the MTP head; 32768 tokens" in out
    assert "bytes read / 800 GB/s + bytes sent / 5 GB/s + messages * 50 µs" in out
    assert "not divided" not in out and max(map(len, out.splitlines())) <= 100
    content = json.loads(file.read_text())
    assert content["computed"] == "nothing of it was measured"
    rows = {(d["quantization"], d["mode"], d["machines"]): d for d in content["divisions"]}
    assert len(rows) == 4 * 3 * 4
    row = rows["4 bits", "tensor", 4]
    tensors = parameters(FULL, quantized({"group_size": 64, "bits": 4}))
    divided = divide(FULL, tensors, 4, "tensor", 32768)
    assert (row["held"], row["sent"]) == (divided.held, divided.sent)
    assert row["smallest_mac_gb"] == smallest_mac(max(row["held"])) == 24
    lines = [line.split("  ") for line in out.splitlines() if line.startswith("4 bits, tensor")]
    memory, time, mac = ([cell for cell in cells if cell.strip()] for cells in lines)
    assert float(memory[3]) == pytest.approx(max(row["held"]) / 1e9, abs=0.06)
    assert float(time[3]) == pytest.approx(1e3 * sum(row["seconds"]), abs=0.006)
    assert mac[1].strip() == "64 GB" and mac[3].strip() == "24 GB"
    assert rows["8 bits", "pipeline", 4]["layers"] == [12] * 4


def test_options_of_the_estimate(call):
    options = ("--link", 10, "--latency", 5, "--memory-bandwidth", 400, "--machines", "2")
    _, out, _ = call(main, "--shard-plan", "--shape", "small", "--contexts", 512, *options)
    assert "--shape small, 8 layers and the MTP head; 512 tokens" in out
    assert "bytes read / 400 GB/s + bytes sent / 10 GB/s + messages * 5 µs" in out
    config = Config.from_dict(shapes.config("small", 8))
    tensors = parameters(config, bfloat16)
    rates = {"link": 10.0, "latency": 5.0, "memory_bandwidth": 400.0}
    seconds = divide(config, tensors, 2, "tensor", 512, rates).seconds
    times = re.findall(r"bfloat16, tensor +(\S+)", out)
    assert times[1] == f"{1e3 * sum(seconds):.2f}"


def test_the_fullest_machine_counts(call, tmp_path):
    file = tmp_path / "plan.json"
    status, out, _ = call(main, "--shard-plan", "--machines", 5, "--json", file)
    row = next(d for d in json.loads(file.read_text())["divisions"] if d["mode"] == "pipeline")
    assert status == 0 and row["quantization"] == "bfloat16"
    assert re.findall(r"bfloat16, pipeline +(\S+)", out)[0] == f"{max(row['held']) / 1e9:.1f}"
    assert row["smallest_mac_gb"] == smallest_mac(max(row["held"]))


def test_what_does_not_divide_is_said(call):
    status, out, _ = call(main, "--shard-plan", "--model", BUNDLED, "--machines", "3,4,8")
    assert status == 0
    notes = out.partition("not divided (-):\n")[2].splitlines()
    assert notes[0] == (
        "3 machines, tensor and expert: 4096 tokens of the vocabulary cannot be divided among "
        "3 ranks"
    )
    assert re.match(
        "4 machines, tensor: .*down_proj .* would cut through its quantization", notes[1]
    )
    assert [note.partition(":")[0] for note in notes[2:]] == [
        "8 machines, pipeline",
        "8 machines, tensor and expert",
    ]
    assert re.search(r"\n4 bits, tensor +- +- +-\n", out)
    assert re.search(r"\nbfloat16, tensor +- +0\.0\d+ +-\n", out)  # groups are what does not divide


def divisions(call, file, model):
    assert call(main, "--shard-plan", "--model", model, "--json", file)[0] == 0
    content = json.loads(file.read_text())
    return content["model"], content["divisions"]


def test_a_config_alone(call, tmp_path):
    """What the files' headers say beside what the config says."""
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copyfile(BUNDLED / "config.json", directory / "config.json")
    name, by_config = divisions(call, tmp_path / "a.json", directory)
    assert name == f"{directory}, 4 layers and the MTP head"
    name, by_headers = divisions(call, tmp_path / "b.json", BUNDLED)
    assert by_config == by_headers
    assert by_config[0]["quantization"] == "its own"
    assert by_config[0]["held"] != next(
        d["held"] for d in by_config if d["quantization"] == "bfloat16"
    )


def test_headers_say_whether_there_is_a_head(call, tmp_path):
    name, found = divisions(call, tmp_path / "a.json", GOLDENS / "base_fused")
    assert name.endswith("base_fused, 4 layers")
    assert {d["quantization"] for d in found} == {"bfloat16", "8 bits", "6 bits", "4 bits"}


def test_of_a_repository_the_config_alone_is_fetched(hub, call, tmp_path):
    hub.add("owner/model", GOLDENS / "base")
    name, _ = divisions(call, tmp_path / "a.json", "owner/model")
    assert name == "owner/model, 4 layers and the MTP head"
    assert not any("safetensors" in request.path for request in hub.requests)


def test_a_context_beyond_the_model(call):
    _, out, _ = call(main, "--shard-plan", "--model", BUNDLED)
    assert f"; {DEMO.max_position_embeddings} tokens of context" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--link", 5], "--link is not supported: it is for --shard-plan alone"),
        (["--latency", 50], "--latency is not supported"),
        (["--memory-bandwidth", 800], "--memory-bandwidth is not supported"),
        (["--machines", "1,2,4,8"], "--machines is not supported"),
        (["--shard-plan", "--tokens", 8], "--tokens is not supported: --shard-plan measures"),
        (["--shard-plan", "--layers", 4], "--layers is not supported"),
        (["--shard-plan", "--plots", "figures"], "--plots is not supported"),
        (["--shard-plan", "--expert-parallel"], "--shard-plan shows all ways"),
        (["--shard-plan", "--link", "0"], "must be a number, more than 0, got '0'"),
        (["--shard-plan", "--latency", "inf"], "more than 0, got 'inf'"),
        (["--shard-plan", "--machines", "2,0"], "at least 1, got '0'"),
        (["--shard-plan", "--machines", 257], "--machines must be at most 256, got 257"),
        (["--shard-plan", "--model", "./nowhere"], "./nowhere does not exist"),
        (["--shard-plan", "--json", "/nowhere/plan.json"], "no directory /nowhere"),
    ],
)
def test_errors_are_one_line(call, monkeypatch, args, message):
    monkeypatch.setattr(shard_report, "divide", None)  # nothing is computed before
    status, out, err = call(main, *args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("quantization", [{"bits": 7}, {"group_size": 0}, {"group_size": "many"}])
def test_a_quantization_that_is_none(quantization):
    with pytest.raises(ValueError):
        parameters(BASE, quantized({"group_size": 64, "bits": 4} | quantization))


def test_nothing_is_evaluated(monkeypatch):
    def evaluated(*_):
        raise AssertionError("evaluated")

    monkeypatch.setattr(mx, "eval", evaluated)
    before = mx.get_active_memory()
    tensors = parameters(FULL, bfloat16)
    shard_plan.divide(FULL, tensors, 8, "expert", 32768)
    assert mx.get_active_memory() - before < 1e6
