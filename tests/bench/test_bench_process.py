"""The bench command with real workers, on a golden model."""

import json
import os
import signal
import subprocess
import sys

import forked
import helpers_group as group
import pytest
from checkpoints import GOLDENS

from mlx_qwen3next.bench.comparison import sides
from mlx_qwen3next.bench.comparison.sides import Side, Worker, WorkerError

SPECULATED = 24  # tokens, where the command has 128
SHORTER = """
import sys
from mlx_qwen3next.bench.comparison import measure, sides
from mlx_qwen3next.bench.__main__ import main
measure.SPECULATED = measure.WARM_UP = {}
measure.MARKS = [256]
less = "worker.MOST_COPIED = 1 << 24; worker.TIMED = 2; worker.main"
sides._START = sides._START.replace("worker.main", less)
sys.exit(main())
"""


@pytest.fixture
def worker(forks):
    """A worker of this package on the golden model."""
    worker = Worker(Side("ours", "float32"), GOLDENS / "base", {})
    yield worker
    worker.close()


def test_a_worker_prepares_before_it_is_asked():
    """Proofs are no part of a figure."""
    code = (
        "from mlx_qwen3next.bench.comparison import worker\n"
        "worker.prepare = lambda model: print('prepared', model.packed)\n"
        "worker.main(0.0)\n"
    )
    command = [sys.executable, "-c", code, "ours", str(GOLDENS / "base"), "float32", "{}"]
    done = forked.run(command, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "prepared True\n")
    assert json.loads(done.stdout)["result"]["load"] > 0


def test_a_whole_run(tmp_path):
    file = tmp_path / "figures.json"
    done = forked.run(
        [
            *(sys.executable, "-c", SHORTER.format(SPECULATED), "--model", str(GOLDENS / "base")),
            *("--dtype", "float32", "--repeats", "1", "--contexts", "8,16", "--tokens", "4"),
            *("--growth", "512", "--json", str(file)),
        ]
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(file.read_text())
    labels = ["here, float32", "mlx-lm, float32"]
    assert list(figures["medians"]["decode"]) == labels
    check = figures["samples"]["checks"][labels[1]]
    assert 0 < check["error"] < check["bound"]
    assert [row[0] for row in check["tokens"]] == [8, 16]
    for label in labels:
        (loaded,) = figures["samples"]["loads"][label]
        assert loaded["import"] > 0.1 and loaded["load"] > 0 and "float32" in loaded["dtypes"]
        for n in ("8", "16"):
            (sample,) = figures["samples"]["speed"][label][n]
            assert len(sample["tokens"]) == 4 and sample["first"] > 0 and sample["further"] > 0
            assert sample["peak"] > 10**5 and sample["resident"] > 10**7
            if label == labels[0]:
                seconds, tokens = sample["chunk"]
                assert 0 < seconds < sample["first"] and tokens == int(n) - 1
                assert sample["formula"] > 10**4 and 0 < sample["over"] < sample["peak"]
            assert figures["medians"]["decode"][label][n] == 1 / sample["further"]
        assert figures["samples"]["steps"][label]["queued"] > 50
    assert figures["samples"]["bandwidth"] > 1e8
    modes = figures["samples"]["speculation"]["samples"]
    assert list(modes) == ["off", "1", "2", "3", "4", "auto"]
    assert {tuple(sample["tokens"]) for (sample,) in modes.values()} == {
        tuple(modes["off"][0]["tokens"])
    }
    assert len(modes["off"][0]["tokens"]) == SPECULATED
    assert figures["samples"]["speculation"]["auto"]
    assert list(figures["samples"]["turns"]) == [
        labels[0],
        f"{labels[0]}, without a cache",
        labels[1],
    ]
    rows = figures["samples"]["growth"]
    assert [row["tokens"] for row in rows] == [256, 512]
    assert all(abs(row["cache"] / row["formula"] - 1) < 0.3 for row in rows)
    assert rows[1]["seconds"] > rows[0]["seconds"] > 0
    assert len(done.stdout.splitlines()) < 70


def test_a_worker_that_dies_or_refuses(worker):
    with pytest.raises(WorkerError, match="here, float32: ValueError: the prompt is empty"):
        worker.ask("generate", prompt=[], tokens=1)
    assert worker.ask("queued") > 50  # it goes on
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"here, float32: its process ended unexpectedly \(signal 9\)"
    ):
        worker.ask("queued")
    with pytest.raises(WorkerError, match="ended unexpectedly"):
        worker.ask("queued")


def test_a_model_that_cannot_be_loaded(forks, tmp_path):
    with pytest.raises(WorkerError, match=r"^mlx-lm, float32: FileNotFoundError: .*config.json"):
        Worker(Side("stock", "float32"), tmp_path, {})


def test_stray_prints_are_no_replies(forks, monkeypatch, capfd):
    prints = "worker.Ours.queued = lambda self: (print('stray', flush=True), 40)[1]; worker.main"
    monkeypatch.setattr(sides, "_START", sides._START.replace("worker.main", prints))
    worker = Worker(Side("ours", "float32"), GOLDENS / "base", {})
    try:
        assert worker.ask("queued") == 40
    finally:
        worker.close()
    assert "stray" in capfd.readouterr().err


# Tells when it has a worker, and waits for it.
TELLING = """
import sys
from mlx_qwen3next.bench.comparison.sides import Worker
from mlx_qwen3next.bench.__main__ import main
reply = Worker._reply
Worker._reply = lambda self: print("waiting", flush=True) or reply(self)
sys.exit(main())
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_stopped_bench_leaves_nothing(tmp_path, number, status):
    bench = forked.Popen(
        [sys.executable, "-c", TELLING, "--shape", "small", "--without-mlx-lm"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert bench.stdout.readline() == "waiting\n"
    assert workers_in(tmp_path) and list(tmp_path.glob("bench-*/model-*.safetensors"))
    bench.send_signal(number)
    out, err = bench.communicate(timeout=forked.TIMEOUT)
    assert (bench.returncode, out) == (status, "")
    assert err.count("\n") == 1 and "Traceback" not in err
    left = {path.name for path in tmp_path.iterdir()} - {"mlx"}  # what MLX compiles, for all
    assert not left and not workers_in(tmp_path)


def workers_in(folder):
    """The worker processes whose model is below a folder."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if f" ours {folder}" in line]


def test_two_processes_that_run_one_model(tmp_path):
    """Only rank 0 reports; the other rank follows the worker of rank 0."""
    file = tmp_path / "figures.json"
    command = [
        *("-c", SHORTER.format(4), "--model", GOLDENS / "permutation", "--repeats", "1"),
        *("--contexts", "8", "--tokens", "2", "--pipeline", "1,1", "--json", file),
    ]
    (status, out, err), other = group.run(tmp_path, 2, command)
    assert status == 0, err
    assert other[:2] == (0, "")
    assert "2 processes ran one model" in out and "mlx-lm," not in out
    figures = json.loads(file.read_text())
    assert figures["samples"]["loads"]["here, float32"][0]["ranks"] == 2
    assert len(figures["samples"]["speed"]) == 1
