"""Fixtures that several test files use."""

import gc
import os
import platform
import shutil
import signal
import subprocess

import checkpoints
import forked
import jit
import mlx.core as mx
import pytest
from helpers_convert import refusal  # noqa: F401
from helpers_metal import new_process
from hub import hub  # noqa: F401

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.compute import proof
from mlx_qwen3next.compute.proof import Finding
from mlx_qwen3next.model.packed import tracing
from mlx_qwen3next.server.engine import memory

# Where metal_host cannot run, there are its own tests to leave out, and without a Mac's GPU those
# of the kernels as well.
collect_ignore: list[str] = []
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    collect_ignore += [
        *("metal_kernels/test_metal_host.py", "metal_kernels/test_metal_host_checks.py"),
        *("metal_kernels/test_kernel_defects.py", "metal_kernels/test_kernel_bytes.py"),
    ]
    if not mx.metal.is_available():
        families = ("attention", "delta", "experts", "model")
        collect_ignore += [f"metal_kernels/test_kernels_{family}.py" for family in families]


# The slowest come first, so that none of them is left for a single worker at the end.
SLOWEST = (
    "test_openai_turns.py",  # so that no worker takes over half of it and asks all again
    "test_sharding.py",
    "test_server_ranks.py",
    "test_bench_process.py",
    "test_distribution.py",
)


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, "workerinput", None)
    if worker is None:  # before there are workers, which inherit the environment
        # NumPy's threads would wait in a loop on the core that they share.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        jit.precompile()
        # One function for the CPU: where there is none, a command says that it has them built.
        mx.eval(mx.compile(lambda x: mx.exp(x) + x)(mx.ones(2)))
    elif platform.system() == "Linux":
        stay_on_one_core(int(worker["workerid"].removeprefix("gw")))


def stay_on_one_core(number):
    """Lets MLX's thread begin when the test's thread waits for it, instead of at each operation:
    half of the CPU time of a tiny model goes into the switching.

    The threads that are there already, of which MLX's may be one, would not inherit it.
    """
    cores = sorted(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {cores[number % len(cores)]})
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOWEST)


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # arrays are freed without it


@pytest.fixture(autouse=True)
def kernels_off(tmp_path_factory, monkeypatch):
    """Where there is a GPU: the composition runs unless a test says otherwise, so that kernels are
    compared with something else, and what is found here is not what the user's machine goes by."""
    findings = tmp_path_factory.getbasetemp() / "kernels.json"
    monkeypatch.setattr(proof, "_file", lambda: findings)
    proof.set_kernels("off" if metal_kernels.available() else "auto")


@pytest.fixture(autouse=True)
def disk_without_waiting(monkeypatch):
    """No test pulls the plug: what is written need not have reached the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def memory_that_stays(monkeypatch):
    """A server's freed memory stays the process's: to return it takes 2 ms a request."""
    monkeypatch.setattr(memory, "return_free_memory", lambda: None)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU, about which nothing is known; the file of its findings."""
    file = tmp_path / "cache" / "kernels.json"
    monkeypatch.setattr(proof, "_file", lambda: file)
    monkeypatch.setattr(metal_kernels, "available", lambda: True)
    monkeypatch.setattr(tracing, "_functions", {})
    new_process()
    yield file
    new_process()


@pytest.fixture
def proved(machine, monkeypatch):
    """The operations proved on that machine, where each kernel is found to be too slow."""
    names = []

    def prove(operation, *_):
        names.append(operation.name)
        return Finding(False, "9.0 µs, MLX's own operations 1.0 µs", 9e-6, 1e-6)

    monkeypatch.setattr(proof, "_prove", prove)
    return names


@pytest.fixture
def base(tmp_path):
    """A copy of the golden `base`, without its expected results, for a test to spoil."""
    directory = tmp_path / "base"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoints.GOLDENS / "base" / name, directory / name)
    return directory


@pytest.fixture
def forks(monkeypatch):
    """While active, Python processes that the test's own process starts are forked."""
    if platform.system() == "Linux":
        forked.server()  # which is started
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)


@pytest.fixture
def call(capsys):
    """Calls a command's main() with arguments; returns its exit status, stdout and stderr."""

    def call(main, *args):
        capsys.readouterr()
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call
