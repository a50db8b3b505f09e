"""Kernels are proved before the first answer, not within it; on a CPU, functions are built."""

import io
import json
import re
import tempfile
from itertools import islice
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers_generate import predictable_at_4_bits, process
from helpers_metal import by_host, executed, new_process
from mlx_lm.utils import dequantize_model

from mlx_qwen3next import generate_step, load_model
from mlx_qwen3next.compute import proof
from mlx_qwen3next.compute.proof import Finding
from mlx_qwen3next.decoding import preparation
from mlx_qwen3next.decoding.preparation import NAMED, prepare, summary
from mlx_qwen3next.metal_kernels import kernel
from mlx_qwen3next.model.packed.packing import pack

SLOW = Finding(False, "2.0 µs, MLX's own operations 1.0 µs", 2e-6, 1e-6)
TEXT = [*range(300, 440)]
SURE = TEXT[:8] * 4
CHUNK = 64


@pytest.fixture(scope="module")
def model():
    return pack(predictable_at_4_bits())


def said(model, chunk=CHUNK, **options):
    """The lines of a preparation."""
    lines = []
    prepare(model, chunk=chunk, say=lines.append, **options)
    return lines


def answer(model, prompt=TEXT[:10], tokens=6, mtp=3, lookup=None):
    options = {"max_tokens": tokens, "mtp": mtp, "lookup": lookup, "prefill_step_size": CHUNK}
    steps = generate_step(prompt, model, **options)
    return [step.token for step in steps]


@pytest.mark.parametrize(
    "mtp, lookup", [("auto", None), ("off", None), (1, None), (8, None), ("off", 15)]
)
def test_an_answer_leaves_nothing_to_prove(model, proved, mtp, lookup):
    """Whatever the length of the prompt; whether drafts are right, and wherever the answer ends."""
    (line,) = said(model, mtp=mtp, lookup=lookup)
    before = len(proved)
    assert re.match(rf"kernels: {before} proved in [\d.]+ s, {before} not used \(", line)
    for length, tokens in ((1, 5), (2, 12), (3, 1), (8, 12), (17, 2), (70, 12)):
        answer(model, TEXT[:length], tokens, mtp, lookup)
    for tokens in (1, 2, 3, 5, 8):  # stopped, often between drafts that are right
        steps = generate_step(SURE, model, mtp=mtp, lookup=lookup)
        assert len([*islice(steps, tokens)]) == tokens
        steps.close()
    assert len(proved) == before


def test_rounds_are_proved_only_as_far_as_there_will_be_any(model, proved):
    kinds = {}
    for mtp in ("off", 1, 8):
        proof.forget()
        said(model, mtp=mtp)
        kinds[mtp] = {key for key in proof.findings() if " round" in key}
    assert kinds["off"] == set()
    assert [any(f"rows={rows} " in key for key in kinds[1]) for rows in ("2", "3-4")] == [
        True,
        False,
    ]
    assert any("rows=9-16 " in key for key in kinds[8])
    proof.forget()
    headless = load_model(dtype=mx.float32)
    headless.mtp = None
    said(headless, mtp="off")
    assert proof.findings() and not any(" round" in key for key in proof.findings())
    said(headless)  # rounds of copies
    assert any("rows=9-16 " in key and " round" in key for key in proof.findings())


def test_a_head_of_other_weights_is_proved_too(proved):
    model = load_model(dtype=mx.float32, pack=False)
    dequantize_model(model.mtp)
    pack(model)
    said(model, mtp=2)
    before = len(proved)
    answer(model, mtp=2)
    assert len(proved) == before
    assert any("bits=16" in key for key in proof.findings())


@pytest.mark.parametrize("chunk, last", [(100, "65-128"), (128, "65-128"), (10**6, "4097-8192")])
def test_chunks(model, proved, chunk, last):
    """No longer ones than the prompt's are computed, and none beyond 2048 tokens."""
    said(model, chunk=chunk, mtp="off")
    rows = [key.split()[2] for key in proof.findings() if key.startswith("rms_norm")]
    ends = [int(re.split("=|-", of)[-1]) for of in rows]
    assert f"rows={last}" == rows[0] and sorted(ends) == [2**i for i in range(len(ends))]


def test_another_process_has_nothing_to_prove(model, proved):
    said(model)
    before = len(proved)
    new_process()
    assert said(model) == []
    assert len(proved) == before


def test_where_all_is_known_nothing_is_computed(model, proved):
    said(model)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    said(model)
    assert mx.get_peak_memory() - before < 2 * CHUNK * model.args.hidden_size  # half a state


def test_it_goes_on_after_ctrl_c(model, machine, monkeypatch):
    """All that was found before is kept."""
    found = []

    def prove(operation, *_):
        if len(found) == 4:
            raise KeyboardInterrupt
        found.append(operation.name)
        return SLOW

    monkeypatch.setattr(proof, "_prove", prove)
    with pytest.raises(KeyboardInterrupt):
        said(model)
    assert len(json.loads(machine.read_text())["findings"]) == 4
    new_process()
    found.clear()
    with pytest.raises(KeyboardInterrupt):
        said(model)
    assert len(json.loads(machine.read_text())["findings"]) == 8


@by_host
def test_kernels_as_they_are(model, machine, monkeypatch):
    """Executed, as if they took half the time: each is right and used."""
    monkeypatch.setattr(proof, "_time", lambda form, *_: 2.0 - (form.__name__ == "kernel"))
    proof.set_kernels("off")
    expected = answer(model, TEXT[:4], mtp=1)
    with executed() as launches:
        proof.set_kernels("auto")
        (line,) = said(model, chunk=4, mtp=1)
        findings = proof.findings()
        launched = launches.total()
        assert answer(model, TEXT[:4], mtp=1) == expected
    assert launches.total() > launched
    assert re.fullmatch(rf"kernels: {len(findings)} proved in [\d.]+ s", line)
    assert all(of.used for of in findings.values())
    assert findings == proof._load(proof._machine())


@by_host
def test_a_wrong_kernel_is_reported_and_not_used(model, machine, monkeypatch, caplog):
    text = kernel.text

    def spoilt(family):
        return text(family).replace("total / H", "total / (H + 1)")

    monkeypatch.setattr(kernel, "text", spoilt)
    monkeypatch.setattr(proof, "_time", lambda form, *_: 2.0 - (form.__name__ == "kernel"))
    kernel.compiled.cache_clear()
    proof.set_kernels("off")
    expected = answer(model, TEXT[:3], mtp="off")
    try:
        with executed():
            proof.set_kernels("auto")
            (line,) = said(model, chunk=2, mtp="off")
            assert answer(model, TEXT[:3], mtp="off") == expected
    finally:
        kernel.compiled.cache_clear()
    wrong = [key for key, of in proof.findings().items() if not of.used]
    assert {key.split()[0] for key in wrong} == {"rms_norm", "add_rms_norm"}
    assert f"{len(wrong)} not used (rms_norm float32 rows=2 H=64: result 0 is wrong: error" in line
    assert line.endswith(f"; and {len(wrong) - NAMED} more)") and "\n" not in line
    assert caplog.messages == []


def test_the_line_names_the_wrong_before_the_slow():
    found = {"a 1": SLOW, "b 2": Finding(True, "", 1e-6, 2e-6), "c 3": Finding.fault("it is wrong")}
    assert summary(found, 3.14) == (
        "kernels: 3 proved in 3.1 s, 2 not used "
        "(c 3: it is wrong; a 1: 2.0 µs, MLX's own operations 1.0 µs)"
    )
    assert summary({"b 2": found["b 2"]}, 3.14) == "kernels: 1 proved in 3.1 s"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_on_a_terminal(model, proved, monkeypatch, is_terminal):
    terminal, bar = io.StringIO(), preparation.tqdm
    terminal.isatty = lambda: is_terminal

    def at_once(*args, delay, **options):
        return bar(*args, file=terminal, mininterval=0, **options)

    monkeypatch.setattr(preparation, "tqdm", at_once)
    said(model, mtp="off")
    *_, last_state, _ = terminal.getvalue().split("\r") if is_terminal else ["", ""]
    assert ("proving kernels" in terminal.getvalue()) == is_terminal
    assert last_state.strip() == ""  # it is cleared


@pytest.mark.parametrize("mode", ["on", "off"])
def test_in_other_modes_nothing_is_proved(model, proved, mode):
    proof.set_kernels(mode)
    assert said(model) == [] and proved == []


@pytest.mark.parametrize(
    "options, message",
    [({"mtp": 9}, "mtp must be 'auto', 'off' or 1 to 8, got 9"), ({"chunk": 0}, "chunk must be")],
)
def test_bad_input(model, proved, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(model, **options)
    assert proved == []


def test_several_processes_prove_at_first_use(proved):
    model = SimpleNamespace(drafts=False, dflash=None, group=SimpleNamespace(size=2))
    assert said(model) == [] and proved == []


@by_host
def test_without_a_gpu_functions_are_built_once(model, tmp_path, monkeypatch):
    assert said(model) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert said(model) == ["building MLX's CPU kernels for this machine, once"]


@by_host
def test_the_place_where_mlx_keeps_what_it_has_built(tmp_path, monkeypatch):
    """One function is built, in a process whose temporary files are elsewhere."""
    code = (
        "import mlx.core as mx\n"
        "from types import SimpleNamespace\n"
        "from mlx_qwen3next.decoding import preparation\n"
        "function = mx.compile(lambda x: mx.exp(x) + x)\n"
        "preparation.rehearsal = lambda *_: [lambda: function(mx.ones(2))]\n"
        "of = {'mtp': None, 'drafts': False, 'dflash': None, 'streamed': None}\n"
        "model = SimpleNamespace(**of, group=SimpleNamespace(size=1))\n"
        "for _ in range(2):\n"
        "    preparation.prepare(model, say=print)\n"
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with process("-c", code, cold=True) as child:
        out, err = child.communicate()
    assert (err, out) == (b"", b"building MLX's CPU kernels for this machine, once\n")
    assert [file.suffix for file in tmp_path.rglob("*.so")] == [".so"]
