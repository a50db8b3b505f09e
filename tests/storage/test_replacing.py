"""A file is replaced as a whole or not at all, and nothing is left beside it."""

import errno
import os

import pytest

from mlx_qwen3next.storage.replacing import replacing, write_text


@pytest.fixture(params=[None, "before"], ids=["new", "replaced"])
def file(tmp_path, request):
    """A file that is not there yet, or holds a text."""
    path = tmp_path / "file.json"
    if request.param is not None:
        path.write_text(request.param)
    return path


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("ending", [".partial", ".1f.part"])
def test_a_file_is_there_at_the_end_of_the_block(file, ending):
    before = contents(file.parent)
    with replacing(file, ending) as beside:
        assert beside == file.parent / f"file.json{ending}"
        beside.write_text("half")
        assert contents(file.parent) == before | {beside.name: "half"}
        beside.write_text("whole")
    assert contents(file.parent) == {"file.json": "whole"}


def test_a_text(file):
    write_text(file, "µ\n")
    assert file.read_bytes() == "µ\n".encode()
    assert os.listdir(file.parent) == ["file.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_in_the_block_changes_nothing(file, error):
    before = contents(file.parent)
    with pytest.raises(error), replacing(file) as beside:
        beside.write_text("half")
        raise error
    assert contents(file.parent) == before


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_error_at_the_end_changes_nothing(file, monkeypatch, name, error):
    before = contents(file.parent)

    def failing(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(type(error)) as caught:
            write_text(file, "after")
    assert caught.value is error
    assert contents(file.parent) == before


def test_the_data_is_on_disk_before_the_file_has_its_name(file, monkeypatch):
    calls = []

    def noted(name):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: calls.append(name) or call(*args))

    noted("fsync")
    noted("replace")
    write_text(file, "after")
    assert calls == ["fsync", "replace"]


def test_a_leftover_of_a_killed_process_is_overwritten(file):
    file.with_name("file.json.partial").write_text("a longer text, of which half is left")
    write_text(file, "after")
    assert contents(file.parent) == {"file.json": "after"}


def test_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_text(tmp_path / "file" / "x", "after")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "x", "after")


def test_a_block_that_writes_nothing(file):
    before = contents(file.parent)
    with pytest.raises(FileNotFoundError), replacing(file):
        pass
    assert contents(file.parent) == before
