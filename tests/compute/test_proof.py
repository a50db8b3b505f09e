"""A kernel is used only after it has proved itself: with stand-ins for kernels, on the CPU."""

import json
import logging
from pathlib import Path

import mlx.core as mx
import pytest
from helpers_metal import by_host, new_process

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.compute import proof
from mlx_qwen3next.compute.proof import Finding, Operation
from mlx_qwen3next.metal_kernels import kernel

X = mx.arange(1, 9, dtype=mx.float32) / 8


class Forms:
    """An operation that doubles, and how often each of its forms was called outside of proofs."""

    def __init__(self, kernel=lambda x: x * 2, kind=lambda shape, dtype: "kind"):
        self._kernel = kernel
        self.kernel_calls = self.composition_calls = 0
        self.operation = Operation(
            "double", self.kernel, self.composition, lambda x: (x.shape, x.dtype), kind
        )

    def kernel(self, x):
        self.kernel_calls += 1
        return self._kernel(x)

    def composition(self, x):
        self.composition_calls += 1
        return x + x

    def form_of(self, x=X):
        """Which form gives the result of another call."""
        before = self.kernel_calls, self.composition_calls
        result = self.operation(x)
        after = self.kernel_calls, self.composition_calls
        assert mx.array_equal(result, x + x).item() or after[1] == before[1]
        return {(1, 0): "kernel", (0, 1): "composition"}[
            (after[0] - before[0], after[1] - before[1])
        ]


@pytest.fixture
def file(machine, monkeypatch):
    """The findings' file on a machine where kernels take half the time."""
    monkeypatch.setattr(proof, "_time", lambda form, *_: {"kernel": 1e-6}.get(form.__name__, 2e-6))
    return machine


def test_a_good_kernel_is_used_after_one_proof(file):
    forms = Forms()
    forms.operation(X)
    assert forms.form_of() == "kernel"
    proved = forms.composition_calls
    forms.operation(X)
    assert forms.composition_calls == proved > 0
    (key,) = proof.findings()
    expected = Finding(True, "1.0 µs, MLX's own operations 2.0 µs", 1e-6, 2e-6)
    assert (key, proof.findings()[key]) == ("double kind", expected)


def test_the_file_spares_the_next_process_the_proof(file):
    Forms().operation(X)
    content = json.loads(file.read_text())
    assert content["findings"]["double kind"]["used"] is True
    assert [p.name for p in file.parent.iterdir()] == ["kernels.json"]
    new_process()
    forms = Forms()
    assert forms.form_of() == "kernel"
    assert forms.composition_calls == 0


@pytest.mark.parametrize(
    "kernel, reason",
    [
        (lambda x: x * 2.01, "result 0 is wrong: error 5.0e-03, bound 1.0e-04"),
        (lambda x: x * float("nan"), "result 0 is wrong: error nan"),
        (lambda x: (x * 2)[:-1], "result 0 is wrong: error inf"),
        (lambda x: [x * 2, x * 2], "it is wrong: 2 results, not 1"),
    ],
    ids=["numbers", "nan", "shape", "count"],
)
def test_a_wrong_kernel_is_not_used(file, caplog, kernel, reason):
    forms = Forms(kernel)
    assert mx.array_equal(forms.operation(X), X + X).item()
    assert forms.form_of() == "composition"
    assert caplog.messages == [f"kernel double kind is not used: {m}" for m in reasons()]
    assert reason in caplog.text
    assert proof.findings()["double kind"].seconds is None
    new_process()
    assert Forms(kernel).form_of() == "composition"
    assert len(caplog.messages) == 1  # it is said once


def reasons():
    return [finding.reason for finding in proof.findings().values()]


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nline 2"), ValueError("no")])
def test_a_kernel_that_does_not_run_is_not_used(file, caplog, error):
    def kernel(x):
        raise error

    forms = Forms(kernel)
    assert mx.array_equal(forms.operation(X), X + X).item()
    first = str(error).splitlines()[0]
    assert caplog.messages == [f"kernel double kind is not used: it does not run: {first}"]
    assert forms.form_of() == "composition"


def test_a_slower_kernel_is_not_used(file, caplog, monkeypatch):
    times = {"kernel": iter([3e-6, 9e-6, 3e-6, 1e-6, 3e-6])}
    monkeypatch.setattr(
        proof,
        "_time",
        lambda form, *_: next(times[form.__name__]) if form.__name__ in times else 2e-6,
    )
    forms = Forms()
    forms.operation(X)
    assert forms.form_of() == "composition"
    assert "3.0 µs, MLX's own operations 2.0 µs" in caplog.text  # medians


def test_the_bound_is_twice_the_compositions_own_error(file):
    """In bfloat16 the composition is not exact either."""
    x = (mx.arange(1, 65, dtype=mx.float32) / 64).astype(mx.bfloat16)

    def composition(x):
        return x * 1.001  # in bfloat16 that is x

    def finding(factor):
        new_process()
        file.unlink(missing_ok=True)
        operation = Operation(
            "scale", lambda x: x.astype(mx.float32) * factor, composition, lambda x: (), lambda: ""
        )
        operation(x)
        return next(iter(proof.findings().values()))

    assert finding(1.0025).used  # 1.5e-3 off, where the composition is 1e-3 off
    assert not finding(1.004).used


def test_what_proves_nothing_is_not_remembered(file, caplog):
    """An infinity says nothing of the kernel, nor does a compiled function's tracer."""
    forms = Forms()
    infinite = mx.array([1.0, float("inf"), 2, 3, 4, 5, 6, 7])
    assert mx.array_equal(forms.operation(infinite), infinite + infinite).item()
    assert mx.array_equal(mx.compile(forms.operation)(X), X + X).item()
    assert proof.findings() == {} and caplog.messages == []
    forms.operation(X)
    assert forms.form_of() == "kernel"


def test_what_the_proof_is_made_of(file):
    """An operation may name what is exact, and what to prove it on."""
    operation = Operation(
        *("sum", lambda x, y: x * 1.01 + y, lambda x, y: x + y, lambda *_: (), lambda: "kind"),
        proof=lambda x, y: (x, mx.zeros_like(y)),
    )
    operation(X, X * 1000)  # which would hide the mistake
    assert not proof.findings()["sum kind"].used
    new_process()
    file.unlink()
    operation = Operation(
        *("twice", lambda x: x * 2, lambda x: x * 2.01, lambda x: (), lambda: "kind"),
        exact=lambda x: x * 2,
    )
    operation(X)
    assert proof.findings()["twice kind"].used


def test_another_process_findings_are_kept(file):
    forms = Forms(kind=lambda shape, dtype: f"{shape[0]}")
    forms.operation(X)
    others = json.loads(file.read_text())
    finding = {"used": True, "reason": "", "seconds": None, "plain_seconds": None}
    others["findings"]["of another process"] = finding
    file.write_text(json.dumps(others))
    forms.operation(X[:4])
    known = json.loads(file.read_text())["findings"]
    assert known.keys() == {"double 8", "double 4", "of another process"}


def test_proofs_are_counted(file):
    before = proof.proofs()
    forms = Forms()
    forms.operation(X), forms.operation(X)
    assert proof.proofs() == before + 1


def test_collected_findings_are_not_logged(file, caplog):
    forms = Forms(lambda x: x * 3, lambda shape, dtype: f"{shape[0]}")
    forms.operation(X)
    assert len(caplog.messages) == 1
    with pytest.raises(KeyboardInterrupt), proof.collected() as found:
        forms.operation(X), forms.operation(X[:4])
        raise KeyboardInterrupt
    assert [(key, of.used) for key, of in found.items()] == [("double 4", False)]
    assert len(caplog.messages) == 1
    forms.operation(X[:2])
    assert len(caplog.messages) == 2


def test_what_is_forgotten_is_proved_and_saved_anew(file, monkeypatch):
    forms = Forms()
    forms.operation(X)
    monkeypatch.setattr(proof, "_time", lambda form, *_: 3e-6)
    proof.forget()
    assert proof.findings() == {}
    forms.operation(X)
    assert proof.findings()["double kind"].seconds == 3e-6
    assert json.loads(file.read_text())["findings"]["double kind"]["seconds"] == 3e-6


def test_kinds_are_proved_apart(file):
    forms = Forms(lambda x: x * 2 if x.size == 8 else x, lambda shape, dtype: f"{shape[0]}")
    forms.operation(X), forms.operation(X[:4])
    assert (forms.form_of(X), forms.form_of(X[:4])) == ("kernel", "composition")
    assert set(proof.findings()) == {"double 8", "double 4"}


def test_what_the_kernel_does_not_take(file):
    forms = Forms(kind=lambda shape, dtype: None)
    for mode in ("auto", "on"):
        proof.set_kernels(mode)
        assert forms.form_of() == "composition"
    assert proof.findings() == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"machine": 1, "findings": {}}',
        '{"machine": "HERE", "findings": []}',
        '{"machine": "HERE", "findings": {"double kind": 3}}',
        '{"machine": "HERE", "findings": {"double kind": {"used": true}}}',
        # Before the times were kept, a finding had these two alone.
        '{"machine": "HERE", "findings": {"double kind": {"used": false, "reason": ""}}}',
        '{"machine": "HERE", "findings": {"double kind": {"used": "no", TIMES}}}',
        '{"machine": "another chip", "findings": {"double kind": {"used": false, TIMES}}}',
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored(file, content):
    file.parent.mkdir()
    times = '"reason": "", "seconds": 2e-6, "plain_seconds": 1e-6'
    file.write_text(content.replace("HERE", proof._machine()).replace("TIMES", times))
    forms = Forms()
    forms.operation(X)
    assert forms.form_of() == "kernel"
    assert json.loads(file.read_text())["machine"] == proof._machine()


def test_a_file_that_cannot_be_written_is_no_harm(file):
    file.parent.write_text("a file where the directory should be")
    forms = Forms()
    forms.operation(X)
    assert forms.form_of() == "kernel"


@pytest.mark.parametrize("changed", ["chip", "mlx", "kernels"])
def test_another_machine_is_asked_anew(file, monkeypatch, changed):
    Forms().operation(X)
    if changed == "chip":
        monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "another"})
    elif changed == "mlx":
        monkeypatch.setattr(proof, "version", lambda package: "99")
    else:
        monkeypatch.setattr(metal_kernels, "source_hash", lambda: "another text")
    new_process()
    assert proof.findings() == {}


def test_modes(file):
    forms = Forms(lambda x: x * 3)  # wrong, but "on" does not ask
    proof.set_kernels("on")
    assert forms.form_of() == "kernel"
    proof.set_kernels("off")
    assert forms.form_of() == "composition"
    proof.set_kernels("auto")
    forms.operation(X)
    assert forms.form_of() == "composition"


@by_host
def test_without_a_gpu_the_composition_runs():
    forms = Forms()
    assert forms.form_of() == "composition"
    assert proof.findings() == {}
    with pytest.raises(ValueError, match="no Metal GPU in use here; choose 'auto' or 'off'"):
        proof.set_kernels("on")


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="one of auto, on, off, got 'fast'"):
        proof.set_kernels("fast")


def test_proofs_take_arguments_of_every_form(file, caplog):
    """Arrays in tuples and NamedTuples are widened for the exact result, others stay."""
    caplog.set_level(logging.WARNING)
    seen = []

    def composition(pair, experts, *, mask, count):
        seen.append((pair[0].dtype, experts.scales.dtype, experts.weight.dtype, mask, count))
        return pair[0] + pair[1] * experts.scales

    operation = Operation("both", composition, composition, lambda *_, **__: (), lambda: "kind")
    half = X.astype(mx.float16)
    experts = metal_kernels.Experts(mx.array([1], mx.uint32), half, None)
    operation((half, half), experts, mask=None, count=3)
    assert seen[1] == (mx.float32, mx.float32, mx.uint32, None, 3)
    assert caplog.messages == []


def test_source_hash_follows_every_file(monkeypatch, tmp_path):
    """The hash covers the text and the launches."""
    folder = Path(metal_kernels.__file__).parent
    names = {f.name for f in folder.iterdir() if f.is_file()}
    assert len(names) == 13
    monkeypatch.setattr(kernel.resources, "files", lambda package: tmp_path)
    hashes = set()
    for changed in [None, *names]:
        for name in names:
            (tmp_path / name).write_bytes((folder / name).read_bytes() + b" " * (name == changed))
        kernel.source_hash.cache_clear()
        hashes.add(kernel.source_hash())
    kernel.source_hash.cache_clear()
    assert len(hashes) == 1 + len(names)
