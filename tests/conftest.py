"""Fixtures that several test files use."""

import shutil

import checkpoints
import pytest
from helpers_convert import refusal  # noqa: F401
from hub import hub  # noqa: F401


@pytest.fixture
def base(tmp_path):
    """A copy of the golden `base`, without its expected results, for a test to spoil."""
    directory = tmp_path / "base"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoints.GOLDENS / "base" / name, directory / name)
    return directory


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
