"""Converting a DFlash drafter to MLX's quantized form."""

import json
import os

import mlx.core as mx
import pytest
from checkpoints import GOLDENS, parameters, relative_error

from mlx_qwen3next import load_model
from mlx_qwen3next.convert import convert

DRAFTER = GOLDENS / "dflash"


def loaded(directory):
    return load_model(GOLDENS / "base", dtype=mx.float32, draft_model=directory).dflash


@pytest.mark.parametrize("source", ["directory", "repository"])
def test_a_drafter_in_four_bits(hub, tmp_path, source, capsys):
    hub.add("maker/drafter", DRAFTER)
    path = str(DRAFTER) if source == "directory" else "maker/drafter"
    convert(path, str(tmp_path / "out"), quantize=True, q_group_size=32)
    assert "for --draft-model" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.glob("out*/*")) == [
        *("config.json", "model.safetensors")
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    result, original = loaded(tmp_path / "out"), parameters(loaded(DRAFTER))
    for path, module in result.named_modules():
        if hasattr(module, "bits"):
            parts = module.weight, module.scales, module.biases
            error = relative_error(mx.dequantize(*parts, 32, 4), original[f"{path}.weight"])
            assert module.bits == 4 and error < 0.15
    assert result.layers[2].mlp.down_proj.bits == 4
    assert mx.array_equal(result.norm.weight, original["norm.weight"])


def test_an_unquantized_copy_is_the_same(tmp_path):
    convert(str(DRAFTER), str(tmp_path / "out"))
    result, original = parameters(loaded(tmp_path / "out")), parameters(loaded(DRAFTER))
    assert result.keys() == original.keys()
    assert all(mx.array_equal(result[name], x) for name, x in original.items())
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored["fc.weight"].dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stream": True}, "--stream is not for a DFlash drafter"),
        ({"dry_run": True}, "--dry-run is not for a DFlash drafter"),
        ({"mtp_bits": 4}, "--mtp-bits is not for a DFlash drafter"),
    ],
)
def test_what_does_not_apply_is_refused(refusal, arguments, said):
    assert said in refusal(DRAFTER, **arguments)


def test_a_folder_that_exists_stays(tmp_path):
    convert(str(DRAFTER), str(tmp_path / "out"), quantize=True, q_group_size=32)
    with pytest.raises(ValueError, match="exists already"):
        convert(str(DRAFTER), str(tmp_path / "out"))
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(ValueError, match=r"other\.partial exists already"):
        convert(str(DRAFTER), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is quantized already"):
        convert(str(tmp_path / "out"), str(tmp_path / "again"), quantize=True)


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, name, interrupted)
        convert(str(DRAFTER), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
