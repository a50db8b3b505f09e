"""YaRN: frequencies, models and limits against transformers, below and beyond the original length.

The settings are those of `tests/goldens/yarn`: `base` under other configs.
"""

import functools
import json

import checkpoints
import configs
import float64
import mlx.core as mx
import numpy as np
import pytest
from float64 import relative_error
from helpers_metal import executed

from mlx_qwen3next import load_model
from mlx_qwen3next.compute.rope import inverse_frequencies, wavelengths
from mlx_qwen3next.model.config import Config

YARN = checkpoints.GOLDENS / "yarn"
CHANGES = json.loads((YARN / "settings.json").read_text())
RECOMMENDED = {"rope_type": "yarn", "factor": 4.0}  # for the published checkpoints
BOUND = 1e-4  # float32's noise here is 1e-5 at most, the smallest structural mistake 1e-2

every_setting = pytest.mark.parametrize("name", CHANGES)


def raw_config(name):
    return checkpoints.config("base") | CHANGES[name]


@functools.cache
def golden(name):
    """What transformers computes: the tokens and the setting's own results."""
    results = float64.read_safetensors(YARN / "expected.safetensors")
    own = {key.removeprefix(f"{name}."): x for key, x in results.items() if key.startswith(name)}
    return checkpoints.expected("base")["tokens"], own


def assert_close(result, expected, bound=BOUND):
    error = relative_error(result, expected)
    assert error <= bound, f"relative L2 error {error:.1e}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> the model of a setting; the dialects take turns."""

    @functools.cache
    def load(name):
        raw = raw_config(name)
        raw = checkpoints.transformers5(raw) if name in ("plain", "mscale") else raw
        folder = tmp_path_factory.mktemp("yarn") / name
        weights = checkpoints.tensors("base")
        return load_model(checkpoints.write(folder, raw, {"model.safetensors": weights}))

    return load


@pytest.mark.parametrize("name", [*CHANGES, "80B"])
def test_frequencies_and_factor_are_transformers(name):
    _, expected = golden(name)
    if name == "80B":
        config = Config.from_dict(configs.INSTRUCT).with_rope_scaling(RECOMMENDED)
    else:
        config = Config.from_dict(raw_config(name))
    frequencies = np.array(inverse_frequencies(config.rope))
    np.testing.assert_allclose(frequencies, expected["inverse_frequencies"], rtol=5e-7)
    np.testing.assert_allclose(1 / np.array(wavelengths(config.rope)), frequencies, rtol=2e-7)
    assert abs(config.rope.attention_factor - expected["attention_factor"]) < 1e-6


@every_setting
def test_the_oracle_agrees(name):
    tokens, expected = golden(name)
    model = float64.Model(checkpoints.GOLDENS / "base")
    model.config |= CHANGES[name]
    hidden = model.final_norm(model.layers(tokens)[-1])
    assert_close(model.logits(hidden), expected["logits"], 2e-5)


@every_setting
def test_model_and_head(models, name):
    """In chunks, of which the second lies on both sides of the original length."""
    tokens, expected = golden(name)
    model, tokens = models(name), mx.array(tokens)[None]
    cache = model.make_cache()
    hidden = [model.model(tokens[:, part], cache) for part in (slice(0, 30), slice(30, None))]
    hidden = mx.concatenate(hidden, axis=1)
    assert_close(model.logits(hidden)[0], expected["logits"])
    m = model.mtp(hidden[:, :-1], tokens[:, 1:])
    assert_close(model.logits(m)[0], expected["mtp_logits"])


@pytest.mark.metal
@every_setting
def test_kernels(models, name):
    """After 126 positions without a kernel, the rest as steps with all of them."""
    tokens, expected = golden(name)
    model, tokens = models(name), mx.array(tokens)[None]
    cache = model.make_cache()
    mx.eval(model(tokens[:, :126], cache))
    with executed() as launches:
        steps = [model(tokens[:, part], cache) for part in (slice(126, 127), slice(127, 130))]
        mx.eval(steps)
    assert launches["attention_heads"] == 2
    assert_close(mx.concatenate(steps, axis=1)[0], expected["logits"][126:])
