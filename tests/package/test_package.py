"""What ``import mlx_qwen3next`` gives, and when it imports the rest."""

import tomllib
from pathlib import Path

import pytest
from helpers_generate import process

import mlx_qwen3next


def output(code):
    """What a fresh Python prints."""
    with process("-c", code, cold=True) as child:
        out, err = (stream.decode() for stream in child.communicate())
    assert (child.returncode, err) == (0, "")
    return out.split()


MODULES = "import mlx_qwen3next.generate, mlx_qwen3next.checkpoint.loading"
FUNCTIONS = "from mlx_qwen3next import generate, generate_step, load, load_model, stream_generate"


@pytest.mark.parametrize("first", [FUNCTIONS, MODULES], ids=["functions", "modules"])
def test_modules_do_not_take_the_functions_places(first):
    said = output(
        f"{first}\n{MODULES}\n{FUNCTIONS}\n"
        "for function in (generate, generate_step, load, load_model, stream_generate):\n"
        "    assert getattr(mlx_qwen3next, function.__name__) is function\n"
        "    print(function.__name__)\n"
    )
    assert said == ["generate", "generate_step", "load", "load_model", "stream_generate"]


def test_functions_are_listed_and_others_are_missing():
    assert set(mlx_qwen3next.__all__) <= set(dir(mlx_qwen3next))
    with pytest.raises(AttributeError, match="'mlx_qwen3next' has no attribute 'generates'"):
        _ = mlx_qwen3next.generates


def test_on_a_mac_commands_ask_for_larger_buffers_before_mlx_is_imported(monkeypatch):
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    said = output(
        "import os, platform, sys\n"
        "platform.system = lambda: 'Darwin'\n"
        "import mlx_qwen3next\n"
        "assert 'MLX_MAX_MB_PER_BUFFER' not in os.environ\n"
        "from mlx_qwen3next.decoding.queueing import set_command_buffers\n"
        "set_command_buffers()\n"
        "print(os.environ['MLX_MAX_MB_PER_BUFFER'], os.environ['MLX_MAX_OPS_PER_BUFFER'])\n"
        "print('mlx' in sys.modules)\n"
    )
    assert said == ["1024", "7", "False"]


def test_every_file_is_in_the_wheel():
    root = Path(mlx_qwen3next.__file__).parents[1]
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    moved = {name: root / folder for name, folder in setup["package-dir"].items()}
    folders = {n: moved.get(n, root.joinpath(*n.split("."))) for n in setup["packages"]}
    assert len(folders) == len(setup["packages"])
    there = {
        file
        for room in (root / "mlx_qwen3next", *moved.values())
        for file in room.rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }
    patterns = {name: [*setup["package-data"].get(name, ()), "*.py"] for name in folders}
    taken = {f for name in folders for p in patterns[name] for f in folders[name].glob(p)}
    assert there == {file for file in taken if file.is_file()}
    assert all([*folders[name].glob(p)] for name in folders for p in patterns[name])
