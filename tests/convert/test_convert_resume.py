"""A conversion that is stopped goes on and gives the same bytes; memory stays small throughout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import configs
import forked
import pytest
from checkpoints import GOLDENS

from mlx_qwen3next.convert import convert
from mlx_qwen3next.convert.progress import PROGRESS_FILE, Progress

OPTIONS = {"quantize": True, "q_group_size": 32}


def contents(directory):
    """Every file's bytes, by its path below the directory."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The contents of an undisturbed conversion of `base`."""
    directory = tmp_path_factory.mktemp("undisturbed")
    convert(str(GOLDENS / "base"), str(directory / "out"), **OPTIONS)
    return contents(directory / "out")


def test_killed_at_random_moments(tmp_path, whole):
    """Six times, outright, so that nothing can be tidied up."""
    script, target = Path(__file__).parents[1] / "helpers" / "killed.py", tmp_path / "out"
    command = [script, GOLDENS / "base", target, 6, 0.5, 1]
    result = forked.run([sys.executable, *map(str, command)])
    result.check_returncode()
    outcome = json.loads(result.stdout)
    assert outcome["status"] == 0 and len(outcome["done"]) == 6
    assert any(outcome["done"])  # some were in the middle of it
    assert contents(target) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def count_calls(monkeypatch, name, fail_at=None):
    """Lets `os.<name>` fail at one call by a KeyboardInterrupt; counts the calls."""
    original, calls = getattr(os, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 == fail_at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, counted)
    return calls


@pytest.mark.parametrize(
    "name, step", [("pwrite", 17), ("replace", 1), ("rename", 1), ("fsync", 1)]
)
def test_interrupted_at_any_call(tmp_path, whole, monkeypatch, name, step):
    with monkeypatch.context() as patch:
        calls = count_calls(patch, name)
        convert(str(GOLDENS / "base"), str(tmp_path / "counted/out"), **OPTIONS)
    assert contents(tmp_path / "counted/out") == whole and calls
    for at in range(0, len(calls), step):
        target = tmp_path / str(at) / "out"
        with monkeypatch.context() as patch:
            count_calls(patch, name, fail_at=at)
            with pytest.raises(KeyboardInterrupt):
                convert(str(GOLDENS / "base"), str(target), **OPTIONS)
        assert not target.exists()
        convert(str(GOLDENS / "base"), str(target), **OPTIONS)
        assert contents(target) == whole
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_calls(patch, "pwrite", fail_at=60)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted with \d\d% done; the same comm"):
            convert(str(GOLDENS / "base"), str(tmp_path / "out"), **OPTIONS)


def test_what_is_done_is_not_done_again(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        first = count_calls(patch, "pwrite", fail_at=100)
        with pytest.raises(KeyboardInterrupt):
            convert(str(GOLDENS / "base"), str(tmp_path / "out"), **OPTIONS)
    with monkeypatch.context() as patch:
        second = count_calls(patch, "pwrite")
        convert(str(GOLDENS / "base"), str(tmp_path / "out"), **OPTIONS)
    with monkeypatch.context() as patch:
        all_of_it = count_calls(patch, "pwrite")
        convert(str(GOLDENS / "base"), str(tmp_path / "again"), **OPTIONS)
    assert len(second) < len(all_of_it) - 60
    assert len(first) + len(second) < len(all_of_it) + 30  # at most a batch twice


def test_files_lost_in_between_are_made_again(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        count_calls(patch, "pwrite", fail_at=100)
        with pytest.raises(KeyboardInterrupt):
            convert(str(GOLDENS / "base"), str(tmp_path / "out"), **OPTIONS)
    (tmp_path / "out.partial/mtp.safetensors").unlink()
    convert(str(GOLDENS / "base"), str(tmp_path / "out"), **OPTIONS)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("changed", ["source", "bits"])
def test_another_conversion_is_not_mixed_in(tmp_path, base, monkeypatch, changed):
    with monkeypatch.context() as patch:
        count_calls(patch, "pwrite", fail_at=100)
        with pytest.raises(KeyboardInterrupt):
            convert(str(base), str(tmp_path / "out"), **OPTIONS)
    partial = contents(tmp_path / "out.partial")
    options = OPTIONS | ({"q_bits": 8} if changed == "bits" else {})
    if changed == "source":
        os.utime(base / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(str(base), str(tmp_path / "out"), **options)
    assert contents(tmp_path / "out.partial") == partial
    shutil.rmtree(tmp_path / "out.partial")
    convert(str(base), str(tmp_path / "out"), **options)


def test_one_at_a_time(tmp_path):
    with (
        Progress(tmp_path / "work", {"what": 1}) as first,
        pytest.raises(ValueError, match="in use by another conversion"),
    ):
        Progress(tmp_path / "work", {"what": 1})
    first.record(3)
    with Progress(tmp_path / "work", {"what": 1}) as second:
        assert second.done == 3
    assert [path.name for path in (tmp_path / "work").iterdir()] == [PROGRESS_FILE]


# Prints by how much memory grew over the conversion, in bytes, and the source's size.
MEMORY = """
import resource, sys
from pathlib import Path
from mlx_qwen3next.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 1 if sys.platform == "darwin" else 1024
before = peak()
convert(sys.argv[1], sys.argv[2], quantize=True)
print((peak() - before) * unit)
"""


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, layout):
    """Twice as much; the experts of one layer alone are 335 MB in one tensor."""
    experts = {"num_experts": 160, "moe_intermediate_size": 512, "hidden_size": 1024}
    layers = {"num_hidden_layers": 1, "full_attention_interval": 4, "vocab_size": 20_000}
    source = checkpoints.write_zeros(tmp_path / layout, configs.INSTRUCT | experts | layers, layout)
    assert (source / "model.safetensors").stat().st_size > 0.6e9
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(result.stdout) < 300e6
