"""Experts on disk: the results of the model in memory, bit for bit, and no weight out of date."""

import random
import shutil
import threading
import time

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import bundled, greedy, tokens_of
from helpers_metal import executed
from helpers_streamed import streamed

from mlx_qwen3next import generate_step, load_model
from mlx_qwen3next.model.cache import Round, Undo, settle
from mlx_qwen3next.model.streamed import layer_slots, slots
from mlx_qwen3next.model.streamed.layer_slots import least_many
from mlx_qwen3next.model.streamed.slots import Slots
from mlx_qwen3next.prompt_cache.store import PromptCache
from mlx_qwen3next.storage.reading import Reader, Reading

TOKENS = np.random.default_rng(0).integers(0, 80, (2, 120))


def shared_at_8_bits(path, module):
    return {"group_size": 32, "bits": 8} if "shared_expert." in path else True


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The golden `base` in MLX's layout: unquantized and at 3 and 4 bits, by bits; "3" with
    scales in float32; "apart" at 4 bits, with a shared expert of 8."""
    folder = tmp_path_factory.mktemp("quantized")
    found = {}
    for bits in (3, 4, 16, "apart"):
        found[bits] = folder / str(bits)
        found[bits].mkdir()
        options = {} if bits == 16 else {"group_size": 32, "bits": 4 if bits == "apart" else bits}
        if bits == "apart":
            options["quant_predicate"] = shared_at_8_bits
        checkpoints.convert(found[bits], **options)
    found["3"] = shutil.copytree(found[3], folder / "float32")
    file = found["3"] / "model.safetensors"
    tensors = {
        name: array if array.dtype == mx.uint32 else array.astype(mx.float32)
        for name, array in mx.load(str(file)).items()
    }
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    return found


def results(model):
    """The logits of two sequences' prompt and steps; of rounds of one, kept or not; of a chunk."""
    cache, found = model.make_cache(), []

    def forward(first, last, rows=1):
        found.append(model(mx.array(TOKENS[:rows, first:last]), cache))

    forward(0, 40, 2)
    for i in range(40, 43):
        forward(i, i + 1, 2)
    mx.eval(found)
    cache = model.make_cache()
    forward(0, 30)
    for n, keep in ((3, 2), (6, 6), (4, 0)):
        with Round(cache, n) as last:
            forward(30, 30 + n)
            mx.eval(found)
            last.commit(keep)
    with Undo(cache) as undo:
        forward(50, 51)
    undo()
    for i in range(40, 46):
        forward(i, i + 1)
    forward(46, 80)
    settle(cache)
    return [np.array(logits.astype(mx.float32)) for logits in found]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


FORMS = {  # bits, sizes; experts are transposed where that is faster, or read as they are
    "transposed": (4, (3,)),
    "as stored": ("3", (3, 7)),
    "unquantized": (16, (4,)),
    "shared apart": ("apart", (3,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_model_in_memory(form, quantized):
    bits, sizes = FORMS[form]
    expected = results(load_model(quantized[bits]))
    for size in sizes:
        model = streamed(size, quantized[bits])
        assert_same(results(model), expected)
        assert model.streamed.counts().misses > 0
        stored = model.streamed.slots[0].stored
        assert (stored.as_is == set(stored.tensors)) == (form == "as stored")


@pytest.fixture(scope="module")
def demo():
    """The demo model with 5 of 16 experts a layer in memory."""
    return streamed(5)


PROMPT = list(range(200, 230))


@pytest.mark.parametrize("options", [{"mtp": "off"}, {"mtp": 3, "temp": 0.9}], ids=str)
def test_tokens_are_those_of_the_model_in_memory(demo, options):
    found = []
    for model in (bundled()[0], demo):
        mx.random.seed(3)
        steps = [*generate_step(PROMPT, model, max_tokens=12, **options)]
        found.append([(step.token, step.from_draft) for step in steps])
    assert found[0] == found[1]


def test_a_text_goes_on_from_the_prompt_cache_after_an_interruption(demo):
    """Ctrl-C comes while experts are read."""
    cache, tokens = PromptCache(max_bytes=2**30), []
    expected = greedy(bundled()[0], PROMPT, 16)
    read, left = Reader.reading, [55]

    def interrupted(reader, pieces):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return read(reader, pieces)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reader, "reading", interrupted)
        for step in generate_step(PROMPT, demo, max_tokens=16, prompt_cache=cache, mtp="off"):
            tokens.append(step.token)
    assert 0 < len(tokens) < 16 and left[0] <= 0
    rest = generate_step(
        [*PROMPT, *tokens], demo, max_tokens=16 - len(tokens), prompt_cache=cache, mtp="off"
    )
    assert tokens + tokens_of(rest) == expected


# --- the slots -----------------------------------------------------------------------------------
def mixture(model):
    return model.layers[0].mlp


def inputs(rows, model, seed=0):
    mx.random.seed(seed)
    H = model.args.hidden_size
    dtype = model.model.embed_tokens(mx.array([0])).dtype
    x, residual = (mx.random.normal((1, rows, H)).astype(dtype) for _ in range(2))
    mx.eval(x, residual)
    return x, residual


def check_lazy(model):
    """Results stay right that are left lazy while others take their experts' places."""
    reference = mixture(bundled()[0])
    cases = [inputs(1, model, seed) for seed in range(12)]
    lazy = [mixture(model)(*case) for case in cases]
    for y, case in zip(lazy, cases, strict=True):
        assert mx.array_equal(y, reference(*case))


def check_failed_read(model):
    """After a read that failed the experts are read again."""
    reference, case = mixture(bundled()[0]), inputs(1, model, 20)
    mixture(model).slots.vacate()

    def failing(reader, run):
        raise OSError(f"{run[0].file} cannot be read: no luck")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", failing)
        with pytest.raises(OSError, match=r"model\.safetensors cannot be read: no luck"):
            mixture(model)(*case)
    assert mx.array_equal(mixture(model)(*case), reference(*case))


def check_many(model):
    """Many rows, and then one, for which the experts are there that most rows wanted."""
    reference = mixture(bundled()[0])
    for rows in (40, 1):
        case = inputs(rows, model, 30)
        assert mx.array_equal(mixture(model)(*case), reference(*case))


def early(monkeypatch):
    monkeypatch.setattr(Slots, "read_by", lambda slots, result: None)


def wrong_slot(monkeypatch):
    finish = Slots.finish

    def rolled(slots, transfer):
        transfer.experts = np.roll(transfer.experts, 1)
        finish(slots, transfer)

    monkeypatch.setattr(Slots, "finish", rolled)


def stale(monkeypatch):
    start = Slots.start

    def started(slots, stored, experts, numbers):
        transfer = start(slots, stored, experts, numbers)
        slots.owner[numbers], slots.table[experts] = experts, numbers
        return transfer

    monkeypatch.setattr(Slots, "start", started)


CHECKS = [check_lazy, check_failed_read, check_many]
DEFECTS = {early: check_lazy, wrong_slot: check_lazy, stale: check_failed_read}


@pytest.mark.parametrize("check", CHECKS)
def test_slots_are_right_with_reads_late_and_out_of_order(check, demo, monkeypatch):
    read, numbers = Reader.read, random.Random(0)

    def late(reader, run):
        time.sleep(numbers.random() / 1000)
        return read(reader, run)

    def shuffled(reader, pieces, reading=Reader.reading):
        found = reading(reader, pieces)
        numbers.shuffle(found._runs)
        return found

    monkeypatch.setattr(Reader, "read", late)
    monkeypatch.setattr(Reader, "reading", shuffled)
    check(demo)


def test_reads_that_were_interrupted_write_nothing_later(quantized, monkeypatch):
    model, reference = (load(quantized["3"]) for load in (lambda d: streamed(3, d), load_model))
    held, case = mixture(model).slots, inputs(1, model)
    experts = np.sort(np.array(mx.argsort(-mixture(model).gate(case[0])[0, 0, :8]))[3:6])
    read, released, last = Reader.read, threading.Event(), []

    def late(reader, run):
        if not last:
            last.append(run)
            released.wait()
        return read(reader, run)

    def interrupted(reading):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "read", late)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reading, "wait", interrupted)
        held._hold(experts)
    first = held._coming[-1].reading
    threading.Timer(0.1, released.set).start()
    for _ in range(2):
        assert mx.array_equal(mixture(model)(*case), mixture(reference)(*case))
        released.wait()
        first.end()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect, monkeypatch):
    model = streamed(5)
    defect(monkeypatch)
    with pytest.raises(AssertionError):
        DEFECTS[defect](model)


def test_the_experts_wanted_last_stay(demo):
    held = mixture(demo).slots
    for experts in ([0, 1, 2, 3, 4], [0, 1, 2], [3], [5], [1, 6]):
        held._hold(np.array(experts))
    assert set(held.owner) >= {1, 3, 5, 6} and held.owner.min() >= 0
    assert (held.table[held.owner] == np.arange(5)).all()


def test_a_prompt_leaves_the_experts_that_most_rows_want(demo):
    held, case = mixture(demo).slots, inputs(60, demo, 40)
    misses = held.misses
    mx.eval(mixture(demo)(*case))
    logits = mixture(demo).gate(case[0])[0, :, :16]
    chosen = np.argsort(-np.array(logits), axis=-1, kind="stable")[:, :4]
    counts = np.bincount(chosen.ravel(), minlength=16)
    least_held = min(counts[held.owner])
    assert all(count <= least_held for e, count in enumerate(counts) if e not in held.owner)
    assert held.misses - misses <= (counts > 0).sum()  # each is read once


def test_experts_that_pass_by_are_not_another_layer_s(monkeypatch):
    monkeypatch.setattr(slots, "PASSING", 1 / 4)
    model, reference = streamed(4), bundled()[0]
    for seed, rows in enumerate((40, 3, 5, 40, 4, 6, 8)):
        case = inputs(rows, model, seed)
        for layer, of in zip(model.layers, reference.layers, strict=True):
            assert mx.array_equal(layer.mlp(*case), of.mlp(*case))


def test_groups_of_a_prompt_are_multiplied_as_the_whole_would_be(monkeypatch):
    """MLX has two ways on Metal, by the number of rows an expert of the stack."""
    calls = []

    def products(rows, gate_up, down, indices, is_sorted, compute=layer_slots.products):
        calls.append((len(rows), len(gate_up.weight), is_sorted))
        return compute(rows, gate_up, down, indices, is_sorted)

    monkeypatch.setattr(layer_slots, "products", products)
    model = streamed(5, dtype=mx.bfloat16)
    for rows, is_many in ((13, False), (14, True)):  # four experts and the shared one a row
        assert is_many == (5 * rows >= least_many(17))
        mx.eval(mixture(model)(*inputs(rows, model)))
        assert {is_sorted and n >= least_many(stack) for n, stack, is_sorted in calls} == {is_many}
        calls.clear()


@pytest.mark.metal
@pytest.mark.parametrize("bits", [4, "apart"])
def test_kernels_run_on_slots(bits, quantized):
    """Rows that want more experts than there are slots run in parts."""
    model = load_model(quantized[bits], dtype=mx.float16)
    assert (model.layers[0].mlp.shared is None) == (bits == 4)
    held = streamed(3, quantized[bits], mx.float16)
    name = "expert_down" if bits == 4 else "expert_down_shared"
    for rows in (1, 5):
        case = inputs(rows, model, rows)
        with executed() as launches:
            expected = mixture(model)(*case)
            assert launches[name] == 1
            y = mixture(held)(*case)
            assert mixture(held).slots._readers and mx.array_equal(y, expected)
            assert launches[name] > (1 if rows == 1 else 2)


def test_a_rehearsal_reads_nothing_and_leaves_nothing_to_compute(quantized):
    model = streamed(3, quantized["3"])
    with model.streamed.rehearsal(model) as short:
        before = model.streamed.counts()
        assert [layer.is_linear for layer in short.layers] == [True, False]
        for rows in (1, 40):
            short(mx.array(TOKENS[:1, :rows]), short.make_cache())
        assert model.streamed.counts() == before
        assert not any(of._readers for of in model.streamed.slots)
    case = inputs(40, model)
    reference = mixture(load_model(quantized["3"]))
    assert mx.array_equal(mixture(model)(*case), reference(*case))
