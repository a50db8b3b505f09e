"""A fingerprint changes with the model, and with nothing else."""

import shutil

import mlx.core as mx
import pytest

from mlx_qwen3next.checkpoint.fingerprint import fingerprint


def test_the_fingerprint_of_a_model(base, tmp_path):
    first = fingerprint(base)
    assert first.isalnum() and len(first) == 32
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert fingerprint(moved) == first
    assert (
        len({first, fingerprint(base, "a"), fingerprint(base, "a", "b"), fingerprint(base, "ab")})
        == 4
    )
    config = (moved / "config.json").read_text()
    (moved / "config.json").write_text(config.replace('"rms_norm_eps": 1', '"rms_norm_eps": 2'))
    assert fingerprint(moved) != first


def test_a_fine_tune_has_another_fingerprint(base):
    first, weights = fingerprint(base), mx.load(str(base / "model.safetensors"))
    name = "model.layers.1.mlp.gate.weight"
    weights[name][0, 0] += 0.01
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    assert fingerprint(base) != first


def test_how_the_files_are_cut_does_not_matter(base):
    first, weights = fingerprint(base), mx.load(str(base / "model.safetensors"))
    names = sorted(weights)
    (base / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2])):
        mx.save_safetensors(str(base / f"model-{i}.safetensors"), {n: weights[n] for n in part})
    assert fingerprint(base) == first


def test_a_fingerprint_needs_a_config(tmp_path):
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(3)})
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        fingerprint(tmp_path)
