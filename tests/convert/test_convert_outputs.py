"""Files in the way stay untouched, a full disk loses nothing, and no thread is left."""

import errno
import fcntl
import os
import re
import shutil
from types import SimpleNamespace

import checkpoints
import mlx.core as mx
import pytest
from checkpoints import GOLDENS
from helpers_convert import state

from mlx_qwen3next.convert import convert
from mlx_qwen3next.convert.progress import Progress


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def whole(base, tmp_path_factory):
    """The state that an undisturbed conversion of `base` leaves `out` in."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(str(base), str(out))
    return state(out)


# --- in the way ----------------------------------------------------------------------------------
def folder_with_a_file(out):
    out.mkdir()
    (out / "thesis.tex").write_text("irreplaceable")


def model_of_mlx_lms(out):
    checkpoints.convert(out)


def broken_model(out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"x")


def conversion_of_another_source(out):
    convert(str(GOLDENS / "eps"), str(out))


def conversion_of_another_kind(out):
    convert(str(out.with_name("base")), str(out), dtype="float32")


def conversion_with_a_file_missing(out):
    convert(str(out.with_name("base")), str(out))
    (out / "norms.safetensors").unlink()


@pytest.mark.parametrize(
    "make",
    [
        folder_with_a_file,
        model_of_mlx_lms,
        broken_model,
        conversion_of_another_source,
        conversion_of_another_kind,
        conversion_with_a_file_missing,
    ],
)
def test_folder_that_exists(refusal, base, out, make):
    make(out)
    assert refusal(base) == f"{out} exists already; move it away or choose another --mlx-path"


def test_empty_folder_is_used(base, out, whole):
    out.mkdir()
    convert(str(base), str(out))
    assert state(out) == whole


def test_file_that_exists(refusal, base, out):
    out.write_text("irreplaceable")
    said = f"--mlx-path {out} is no usable folder: [Errno 20] Not a directory: '{out}'"
    assert refusal(base) == said
    inside = out / "inside"
    assert refusal(base, mlx_path=str(inside)).startswith(f"--mlx-path {inside} is no usable")


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", "x" * 300], ids=repr)
def test_paths_that_cannot_be(refusal, base, path):
    assert refusal(base, mlx_path=path).startswith(f"--mlx-path {path} is no usable folder: ")


def partial_folder(partial):
    partial.mkdir()
    (partial / "thesis.tex").write_text("irreplaceable")


@pytest.mark.parametrize(
    "progress", ["", "{", "[]", "{}", '{"task": [1], "done": 0}', '{"task": {}, "done": null}']
)
def test_partial_folder_of_somebody_elses(refusal, base, tmp_path, progress):
    partial = tmp_path / "out.partial"
    partial_folder(partial)
    (partial / "progress.json").write_text(progress)
    said = f"{partial} exists, but is no conversion that could go on. Move it away or choose"
    assert refusal(base).startswith(said)
    (partial / "progress.json").unlink()
    assert refusal(base).startswith(said)


def test_partial_that_is_a_file(refusal, base, tmp_path):
    partial = tmp_path / "out.partial"
    partial.write_text("irreplaceable")
    assert refusal(base) == f"{partial} cannot be written: File exists"


def test_parent_that_cannot_be_written(refusal, base, tmp_path, monkeypatch):
    def mkdir(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    said = f"{tmp_path / 'out.partial'} cannot be written: Permission denied"
    assert refusal(base) == said


def test_two_at_once(refusal, base, tmp_path, disk):
    disk.full_after("pwrite", 3)
    refusal(base, begun=True)
    disk.empty()
    with pytest.raises(ValueError) as caught:
        Progress(tmp_path / "out.partial", {})
    assert "holds another conversion" in str(caught.value)  # the lock is free again
    lock = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert refusal(base) == f"{tmp_path / 'out.partial'} is in use by another conversion"
    os.close(lock)


# --- source and target ---------------------------------------------------------------------------
def test_source_and_target_in_each_other(refusal, base, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(base)
    inner = shutil.copytree(base, tmp_path / "outer" / "inner")
    streamed = shutil.copytree(base, tmp_path / "out.partial" / "source")
    for source, target, resolved in [
        (base, base, base),
        (base, base / "x" / "y", base / "x" / "y"),
        (base, link, base),
        (link, base / "x", base / "x"),
        (inner, tmp_path / "outer", tmp_path / "outer"),
        (streamed, tmp_path / "out", tmp_path / "out"),
    ]:
        said = f"{resolved} and the source must not contain each other; choose another --mlx-path"
        assert refusal(source, mlx_path=str(target)) == said


@pytest.mark.parametrize("exists", [True, False])
def test_link_to_the_target_is_followed(base, tmp_path, exists):
    place, link = tmp_path / "volume" / "place", tmp_path / "link"
    place.parent.mkdir()
    if exists:
        place.mkdir()
    link.symlink_to(place)
    convert(str(base), str(link))
    assert link.is_symlink() and (place / "model.safetensors").is_file()
    assert os.listdir(place.parent) == ["place"]


def test_relative_target(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in ("../other", "."):
        convert(str(base), target)
    assert sorted(os.listdir(tmp_path)) == ["base", "here", "other"]
    for folder in ("here", "other"):
        assert (tmp_path / folder / "model.safetensors").is_file()


# --- disk ----------------------------------------------------------------------------------------
@pytest.fixture
def disk(monkeypatch):
    """Has a function of os fail as on a full disk, after so many calls."""

    def full_after(name, calls):
        real, left = getattr(os, name), iter(range(calls))

        def function(*args, **kwargs):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, function)

    return SimpleNamespace(full_after=full_after, empty=monkeypatch.undo)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("pwrite", 0), ("pwrite", 40), ("fsync", 2), ("replace", 1), ("replace", 3), ("rename", 0)],
)
def test_full_disk(refusal, base, out, whole, disk, name, calls):
    disk.full_after(name, calls)
    message = refusal(base, begun=True)
    partial = re.escape(str(out.with_name("out.partial")))
    assert re.fullmatch(
        rf"{partial}: No space left on device, with \d+% done; the same command goes on from "
        rf"there, deleting {partial} gives it up",
        message,
    )
    disk.empty()
    convert(str(base), str(out))
    assert state(out) == whole
    assert sorted(os.listdir(out.parent)) == ["base", "out"]


def test_full_disk_from_the_start(refusal, base, out, whole, disk):
    disk.full_after("fsync", 0)
    said = f"{out}.partial cannot be written: No space left on device"
    assert refusal(base) == said  # and no file is new
    disk.empty()
    convert(str(base), str(out))
    assert state(out) == whole


def test_too_little_disk(refusal, base, out, whole, monkeypatch):
    needed = sum(len(data) for name, data in whole.items() if name.endswith(".safetensors"))
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    assert refusal(base) == (
        f"the conversion needs 1.1 MB more on disk, but {out.parent} has 1.1 MB free"
    )
    far = out / "a" / "b"
    assert f"but {out.parent} has " in refusal(base, mlx_path=str(far))
    free.free = needed
    convert(str(base), str(out))
    assert state(out) == whole


# --- another task --------------------------------------------------------------------------------
def test_partial_of_another_conversion(refusal, base, out, whole, disk):
    disk.full_after("pwrite", 40)
    refusal(base, begun=True)
    disk.empty()
    partial = out.with_name("out.partial")
    for arguments, what in [
        ({"dtype": "float32"}, "pieces, recipe"),
        ({"quantize": True}, "quantization, recipe"),
        ({"mtp": "drop"}, "pieces, recipe"),
    ]:
        message = refusal(base, **arguments)
        assert message.startswith(f"{partial} holds another conversion, with different {what}. ")
        assert "its own command, delete the folder to give it up, or choose another" in message
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert f"{partial} holds another conversion, with different contents. " in refusal(base)
    other = "contents, pieces, recipe, source. "
    assert f"{partial} holds another conversion, with different {other}" in refusal(GOLDENS / "eps")


def test_partial_of_another_conversion_can_still_be_finished(refusal, base, out, whole, disk):
    disk.full_after("pwrite", 40)
    refusal(base, begun=True)
    disk.empty()
    refusal(base, dtype="float32")
    convert(str(base), str(out))
    assert state(out) == whole


def test_done_is_done(base, out, disk, capsys):
    convert(str(base), str(out))
    before = state(out)
    for name in ("pwrite", "replace", "rename", "mkdir"):
        disk.full_after(name, 0)
    capsys.readouterr()
    convert(str(base), str(out))
    said = f"{out} is there already, made from the same source in the same way\n"
    assert capsys.readouterr().err == said
    assert state(out) == before


def test_a_further_conversion_starts_no_threads(base, tmp_path, monkeypatch):
    """A stream's thread stays until the process ends."""
    convert(str(base), str(tmp_path / "first" / "out"))
    for name in ("new_stream", "new_thread_local_stream"):
        monkeypatch.setattr(mx, name, None)
    convert(str(base), str(tmp_path / "second" / "out"))
    assert state(tmp_path / "second") == state(tmp_path / "first")
