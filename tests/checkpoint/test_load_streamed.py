"""Loading with experts on disk: how many are held, and what is refused."""

import gc

import checkpoints
import mlx.core as mx
import pytest
from checkpoints import GOLDENS
from helpers_generate import BUNDLED
from helpers_streamed import gigabytes, streamed

from mlx_qwen3next import generate_step, load, load_model
from mlx_qwen3next.bench import shapes
from mlx_qwen3next.checkpoint import streaming
from mlx_qwen3next.checkpoint.streaming import Plan, check_options
from mlx_qwen3next.compute import cpu_matmul, cpu_streams
from mlx_qwen3next.group import Group
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.reading import Reading

REFUSED = {
    "few": (BUNDLED, {"experts_in_memory": 1e-4}, r"a token wants 4 of 16 .* which take 0\.0011"),
    "unpacked": (BUNDLED, {"experts_in_memory": 1, "pack": False}, "does not go with pack=False"),
    "adapter": (BUNDLED, {"experts_in_memory": 1, "adapter_path": "x"}, "go with an adapter"),
    "negative": (BUNDLED, {"experts_in_memory": -1.0}, "must be 'auto', 'all' or a number of GB"),
    "word": (BUNDLED, {"experts_in_memory": "some"}, "must be 'auto', 'all' or a number of GB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_is_refused(case):
    directory, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load(directory, **options)


def test_the_hub_s_layout_is_refused():
    with pytest.raises(ValueError, match=r"base is in the hub layout.*convert it first"):
        load_model(GOLDENS / "base", experts_in_memory=2e-4)


def test_several_machines_are_refused():
    group = Group.__new__(Group)
    vars(group).update(size=2, rank=0)
    with pytest.raises(ValueError, match="does not go with several machines"):
        check_options(1.0, pack=True, group=group, adapter=None)
    assert check_options("auto", pack=True, group=group, adapter=None) == "all"


def test_experts_scaled_by_bytes_are_refused(tmp_path):
    checkpoints.convert(tmp_path, group_size=32, bits=4, mode="mxfp4")
    with pytest.raises(ValueError, match="experts in the quantization mxfp4"):
        load_model(tmp_path, experts_in_memory=1e-5)


def test_auto_holds_all_or_as_many_as_fit(monkeypatch):
    assert load_model(experts_in_memory="auto").streamed is None
    assert load_model(experts_in_memory=1.0).streamed is None  # all fit
    model = streamed(9)
    others = sum(array.nbytes for array in checkpoints.parameters(model).values())
    others += sum(of.nbytes for of in model.streamed.slots)  # the shared experts
    others += capacity.cache_bytes(model.args, 8192, mtp=True, itemsize=4)
    wanted = gigabytes(BUNDLED, 9) * 1e9
    monkeypatch.setattr(capacity, "spare", lambda: int(others + 1000 + wanted))
    monkeypatch.setattr(streaming, "RESERVE", 1000)
    monkeypatch.setattr(capacity, "_capacity", lambda: (64e9, 64e9))
    model = load_model(experts_in_memory="auto")
    plan = model.streamed.plan
    assert plan.size == 9 and plan.memory <= wanted
    assert plan.rate > 0 and f"experts on disk: {plan.size} of 16" in str(plan)
    held = sum(of.nbytes * of.size for of in model.streamed.slots)
    held += sum(s.nbytes * s.size for s in model.streamed.slots[0]._passing)
    assert held == pytest.approx(plan.memory, rel=0.01)
    monkeypatch.setattr(capacity, "spare", lambda: 1000)
    with pytest.raises(ValueError, match="0 GB for experts are too little"):
        load_model(experts_in_memory="auto")


def test_memory_stays_within_the_plan(tmp_path, monkeypatch):
    """Loading holds one layer's parts twice at a time, not all of them: that takes 56 MB of 47."""
    monkeypatch.setattr(cpu_matmul, "_measure", lambda bits: 2.0)
    shapes.write(tmp_path, "small", 8)
    gc.collect()  # other tests' models
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load_model(tmp_path, context=64, experts_in_memory=0.02)
    loaded, total = mx.get_peak_memory() - before, model.streamed.plan.total
    beside = cpu_matmul.PRODUCTS * cpu_streams.cores()
    assert 0.85 * (total - beside) < loaded < total - beside
    mx.reset_peak_memory()
    assert len(list(generate_step(range(60), model, max_tokens=4))) == 4
    assert mx.get_peak_memory() - before < total


def mixed(path, module):
    """Other bits for a part of each stack of matrices that have one input."""
    wide = "in_proj_ba", "v_proj", "shared_expert.up_proj", "shared_expert_gate"
    return {"group_size": 32, "bits": 6 if path.endswith(wide) else 4}


def test_the_sizes_count_what_packing_widens(tmp_path, monkeypatch):
    checkpoints.convert(tmp_path, group_size=32, bits=4, quant_predicate=mixed)
    counted = []
    monkeypatch.setattr(capacity, "check", lambda weights, *_: counted.append(weights))
    model = load_model(tmp_path, dtype=mx.bfloat16)
    held = sum(array.nbytes for array in checkpoints.parameters(model).values())
    assert counted == [held]
    load_model(tmp_path, dtype=mx.bfloat16, pack=False)
    assert counted[1] < 0.98 * held
    monkeypatch.setattr(Reading, "most_memory", lambda *_: 0)
    gb = gigabytes(tmp_path, 4, mx.bfloat16)
    model = load_model(tmp_path, dtype=mx.bfloat16, context=256, experts_in_memory=gb)
    held = sum(array.nbytes for array in checkpoints.parameters(model).values())
    held += model.streamed.plan.memory
    assert counted[2] == held
    cache = capacity.cache_bytes(model.args, 256, mtp=False, itemsize=2)
    states = capacity.cache_bytes(model.args, 0, mtp=False, itemsize=2)
    assert model.streamed.plan.total == held + cache + 2 * states


def test_memory_for_experts_is_accounted(monkeypatch):
    monkeypatch.setattr(capacity, "_capacity", lambda: (1e6, 1e6))
    with pytest.raises(ValueError, match=r"the model needs 0\.0 GB"):
        load_model(experts_in_memory=gigabytes(BUNDLED, 5))


def test_the_expected_speed_is_that_of_the_formula():
    """The 80B model at 4 bits, 244 of 512 experts a layer, 5 GB/s: 1 / (38.4 ms + 29 ms)."""
    plan = Plan(244, 512, 48, 10, 1769472, 0, 0, 0, 5e9)
    assert plan.bytes_a_token == pytest.approx(0.849e9 * (1 - 0.815), rel=0.01)
    assert plan.tokens_a_second == pytest.approx(1 / (0.0384 + 0.849 * 0.185 / 5), rel=0.01)


def test_a_model_in_half_precision_is_read_as_stored(tmp_path):
    checkpoints.convert(tmp_path, group_size=32, bits=3)
    gb = gigabytes(tmp_path, 4, mx.bfloat16)
    model = load_model(tmp_path, dtype=mx.bfloat16, experts_in_memory=gb)
    stored = model.streamed.slots[0].stored
    assert stored.as_is == set(stored.tensors)
