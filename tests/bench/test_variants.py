"""The times of a step with other settings of queueing, without the GPU that they are for."""

import json
from types import SimpleNamespace

import pytest

from mlx_qwen3next.bench import command, shapes
from mlx_qwen3next.bench.__main__ import main
from mlx_qwen3next.bench.tables import variants
from mlx_qwen3next.decoding import queueing
from mlx_qwen3next.decoding.queueing import COMMAND_BUFFERS


@pytest.fixture
def written(monkeypatch):
    """What was written, in place of a model in the shapes of the 80B model."""
    written = []
    monkeypatch.setattr(shapes, "write", lambda *model: written.append(model))
    monkeypatch.setattr(shapes, "layers_that_fit", lambda *_: 48)
    return written


def test_each_pair_of_limits_is_measured_on_the_same_model(written):
    asked = []

    def run(directory, buffers):
        asked.append((directory, buffers))
        if buffers.get("MLX_MAX_OPS_PER_BUFFER") == "400":
            raise ValueError("out of memory")
        n = len(asked)
        return {
            str(layers): {"step": n * layers / 1e4, "prompt": n, "peak": layers * 10**9}
            for layers in variants.LAYERS
        }

    about, *rows, failed = variants.variants_table(run).splitlines()
    assert "48 layers" in about and "2,048 tokens" in about
    (model,) = written
    assert model[1:] == ("80b", 4)
    assert [directory for directory, _ in asked] == [model[0]] * len(variants.BUFFERS)
    assert [buffers for _, buffers in asked] == list(variants.BUFFERS)
    assert variants.BUFFERS[:2] == (COMMAND_BUFFERS, {})
    cells = {name: figures for name, *figures in (row.rsplit(maxsplit=3) for row in rows[1:])}
    assert len(cells) == len(variants.LAYERS) * len(variants.BUFFERS)
    assert cells["  1024, 1000 (set here); 8"] == ["0.80", "1.00", "8.00"]
    assert cells["  MLX's own; 48"] == ["9.60", "2.00", "48.00"]
    assert cells["  no limit, 200; 4"] == ["1.20", "3.00", "4.00"]
    assert cells["  no limit, 400; 16"] == ["-"] * 3
    assert failed == "  no limit, 400: out of memory"
    assert not model[0].exists()


@pytest.mark.parametrize("buffers", [{}, {"MLX_MAX_OPS_PER_BUFFER": "200"}])
def test_the_process_has_these_limits_and_no_others(tmp_path, monkeypatch, buffers):
    """Also where the bench itself has some, from the user or from its start."""
    for name in COMMAND_BUFFERS:
        monkeypatch.setenv(name, "7")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho noise\n"
        'echo "[\\"$MLX_MAX_OPS_PER_BUFFER\\", \\"${MLX_MAX_MB_PER_BUFFER-unset}\\", \\"$3\\"]"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(variants.sys, "executable", str(python))
    said = variants.in_another_process(tmp_path, buffers)
    assert said == [buffers.get("MLX_MAX_OPS_PER_BUFFER", ""), "unset", str(tmp_path)]
    python.write_text("#!/bin/sh\necho one >&2\necho the last line >&2\nexit 3\n")
    with pytest.raises(ValueError, match=r"^the last line$"):
        variants.in_another_process(tmp_path, buffers)
    python.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(ValueError, match="exit status 3"):
        variants.in_another_process(tmp_path, buffers)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The directory of a tiny model of four layers."""
    tiny = {"vocab_size": 512, "hidden_size": 128, "num_experts": 8, "head_dim": 32}
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.SHAPES["small"] | tiny)
    shapes.write(tmp_path, "small", 4)
    return tmp_path


def test_the_layers_at_a_time_take_turns_on_a_model_of_48_layers(model, monkeypatch):
    seen = []
    generate_step = variants.generate_step

    def spy(tokens, model, **options):
        seen.append((queueing.LAYERS_ON_GPU, len(model.layers), len(tokens), options))
        return generate_step(tokens, model, **options)

    monkeypatch.setattr(variants, "generate_step", spy)
    before = queueing.LAYERS_ON_GPU
    times = variants.times(model, (4, 48), prompt=5, steps=3, repeats=1)
    options = {"max_tokens": 3, "mtp": "off"}
    assert seen == [(n, 48, 5, options) for n in (4, 48)] * 2
    assert before == queueing.LAYERS_ON_GPU
    assert list(times) == ["4", "48"]
    for measured in times.values():
        assert set(measured) == {"step", "prompt", "peak"} and min(measured.values()) > 0


def test_times_are_medians_without_the_first(model, monkeypatch, capsys):
    steps = iter([9, 90, 1, 10, 5, 50, 3, 30])
    monkeypatch.setattr(variants, "_sample", lambda *_: {"step": next(steps)})
    assert variants.times(model, (4, 8)) == {"4": {"step": 3}, "8": {"step": 30}}
    monkeypatch.setattr(variants, "times", lambda directory: {"4": {"step": str(directory)}})
    monkeypatch.setattr("sys.argv", ["-c", "/a/model"])
    variants.main()
    assert json.loads(capsys.readouterr().out) == {"4": {"step": "/a/model"}}


@pytest.mark.parametrize("is_metal", [False, True])
def test_the_command_prints_it_on_an_apple_gpu_alone(call, monkeypatch, is_metal):
    monkeypatch.setattr(command, "metal_kernels", SimpleNamespace(available=lambda: is_metal))
    monkeypatch.setattr(command, "host_table", lambda: "of the host")
    monkeypatch.setattr(command, "variants_table", lambda: "of variants")
    expected = "of the host\nof variants\n" if is_metal else "of the host\n"
    assert call(main, "--host") == (0, expected, "")
