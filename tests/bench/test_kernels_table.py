"""``bench --kernels``: the proofs of a model's kernels as a table."""

import json
import re
from functools import partial

import mlx.core as mx
import pytest
from helpers_metal import by_host, executed, new_process

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.bench.command import main
from mlx_qwen3next.bench.tables import kernels
from mlx_qwen3next.bench.tables.kernels import NONE
from mlx_qwen3next.checkpoint import loading
from mlx_qwen3next.compute import proof
from mlx_qwen3next.compute.proof import Finding
from mlx_qwen3next.metal_kernels import Kernel

SHAPE = ("--shape", "small")


@pytest.fixture
def found(machine, monkeypatch):
    """The finding of each proof, by operation; another is that its kernel is fast."""
    results = {}

    def prove(operation, *_):
        fast = Finding(True, "1.0 µs, MLX's own operations 2.0 µs", 1e-6, 2e-6)
        return results.get(operation.name, fast)

    monkeypatch.setattr(proof, "_prove", prove)
    monkeypatch.setattr(Kernel, "launch", blank)
    return results


def blank(kernel, *, output_shapes, output_dtypes, **_):
    """A launch whose results nobody looks at."""
    return [mx.zeros(*of) for of in zip(output_shapes, output_dtypes, strict=True)]


def test_the_table(call, found, machine):
    found["rms_norm"] = Finding.fault("result 0 is wrong: error 2.0e-03, bound 1.0e-04")
    found["attention_gate"] = Finding(False, "", 25e-6, 12.5e-6)
    status, out, err = call(main, "--kernels", *SHAPE)
    assert (status, err) == (0, "")
    _, chip, model, *lines, last = out.splitlines()
    assert "cores" in chip
    assert "--shape small, 4 layers" in model
    assert model.endswith(f"kernels {metal_kernels.source_hash()}")
    table = [line.split() for line in lines]
    ends = {row[0]: row[-4:] for row in table if row[-1] in ("yes", "slower", "wrong")}
    assert ends["add_rms_norm"][-3:] == ["1.0", "2.0", "yes"]
    assert ends["attention_gate"] == ["25.0", "12.5", "no,", "slower"]
    assert ends["rms_norm"] == [NONE, NONE, "no,", "wrong"]
    names = [row[0] for row in table[1:] if row[-1] in ("yes", "slower", "wrong")]
    assert names == sorted(names) and len(names) == len(proof.findings())
    faults = [line for line in lines if line.endswith("bound 1.0e-04")]
    assert len(lines) == 1 + len(names) + len(faults)
    assert len(faults) == names.count("rms_norm") > 10
    assert faults[0].startswith("rms_norm float32 rows=4097-8192 H=512: result 0 is wrong")
    used = sum(of.used for of in proof.findings().values())
    assert last.startswith(f"{used} of {len(names)} kinds of call use a kernel; proved in ")
    assert proof._load(proof._machine()) == proof.findings()


def test_proofs_are_made_anew(call, found, machine):
    call(main, "--kernels", *SHAPE)
    before = json.loads(machine.read_text())["findings"]
    new_process()
    found["attention_gate"] = Finding(False, "", 25e-6, 12.5e-6)
    out = call(main, "--kernels", *SHAPE)[1]
    after = json.loads(machine.read_text())["findings"]
    assert after.keys() == before.keys() and after != before
    assert out.count("no, slower") == sum(not of["used"] for of in after.values()) > 5


def test_the_model_and_the_dtype(call, found, monkeypatch):
    monkeypatch.setattr(loading, "default_dtype", lambda: mx.bfloat16)
    assert call(main, "--kernels", *SHAPE)[0] == 0
    assert all("bfloat16" in key for key in proof.findings() if key.startswith("rms_norm"))
    assert "bundled demo model" in call(main, "--kernels", "--dtype", "float32")[1]
    assert all("float32" in key for key in proof.findings() if key.startswith("rms_norm"))
    assert any(" round replay" in key for key in proof.findings())


@by_host
def test_executed_kernels(call, machine, monkeypatch):
    """As if they took half the time."""
    few = partial(kernels.prove, chunk=16)
    monkeypatch.setattr(kernels, "MAX_DEPTH", 2)
    monkeypatch.setattr(kernels, "prove", few)
    monkeypatch.setattr(proof, "_time", lambda form, *_: 2.0 - (form.__name__ == "kernel"))
    with executed() as launches:
        status, out, err = call(main, "--kernels")
    assert (status, err) == (0, "")
    count = len(proof.findings())
    assert len(re.findall(r" 1000000\.0 +2000000\.0 +yes\n", out)) == count < launches.total()
    assert f"\n{count} of {count} kinds of call use a kernel" in out


@by_host
def test_without_a_gpu_it_says_so(call):
    status, out, err = call(main, "--kernels")
    assert (status, out) == (2, "")
    assert err == "error: --kernels: no kernel can run, because MLX has no Metal GPU here\n"


def test_on_a_mac_that_is_told_to_use_its_cpu(call, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert "because MLX is told to use no GPU" in call(main, "--kernels")[2]


def test_it_is_for_one_process(call, monkeypatch):
    monkeypatch.setattr(kernels, "rank", lambda: 0)
    assert call(main, "--kernels")[::2] == (
        2,
        "error: --kernels is for one process, without mlx.launch\n",
    )


@pytest.mark.parametrize("more", [["--host"], ["--shape", "small", "--layers", "3"]])
def test_options_that_do_not_fit(call, found, more):
    status, out, err = call(main, "--kernels", *more)
    assert (status, out, err.count("\n")) == (2, "", 1)
