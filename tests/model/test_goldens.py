"""The golden fixtures (transformers, float32) and the float64 oracle agree with each other.

Two implementations that share no code, so a disagreement with either one elsewhere is not theirs.
The bound is float32's own noise on these models; the smallest structural mistake is 1e-2.
"""

import functools
from pathlib import Path

import float64
import numpy as np
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ["base", "eps", "dense", "permutation"]
NOISE = 2e-5


@functools.cache
def fixture(case):
    """(oracle model, expected tensors, the oracle's layer states over `tokens`)."""
    model = float64.Model(GOLDENS / case)
    expected = float64.read_safetensors(GOLDENS / case / "expected.safetensors")
    return model, expected, model.layers(expected["tokens"])


@functools.cache
def final_hidden(case):
    model, _, states = fixture(case)
    return model.final_norm(states[-1])


def assert_close(name, result, expected):
    error = float64.relative_error(result, expected)
    assert error <= NOISE, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_every_layer(case):
    _, expected, states = fixture(case)
    for i, state in enumerate(states):
        assert_close(f"hidden.{i}", state, expected[f"hidden.{i}"])
    assert f"hidden.{len(states)}" not in expected


@pytest.mark.parametrize("case", CASES)
def test_final_hidden_and_logits(case):
    model, expected, _ = fixture(case)
    hidden = final_hidden(case)
    assert_close("hidden.final", hidden, expected["hidden.final"])
    assert_close("logits", model.logits(hidden), expected["logits"])


@pytest.mark.parametrize("case", CASES)
def test_greedy(case):
    model, expected, _ = fixture(case)
    prompt, greedy = expected["tokens"][:10], expected["greedy"]
    states = model.layers(np.concatenate([prompt, greedy]))
    logits = model.logits(model.final_norm(states[-1]))
    assert np.array_equal(logits[len(prompt) - 1 : -1].argmax(-1), greedy)


@pytest.mark.parametrize("case", CASES)
def test_mtp(case):
    model, expected, _ = fixture(case)
    m = model.mtp(final_hidden(case)[:-1], expected["tokens"][1:])
    assert_close("mtp_hidden", m, expected["mtp_hidden"])
    assert_close("mtp_logits", model.logits(m), expected["mtp_logits"])


@pytest.mark.parametrize("case", CASES)
def test_mtp_drafts(case):
    model, expected, _ = fixture(case)
    hidden, tokens = final_hidden(case), expected["tokens"]
    for i, n in enumerate(expected["draft_points"]):
        first = expected["draft_first_tokens"][i]
        assert model.logits(hidden[n - 1]).argmax() == first
        drafts, logits = model.drafts(hidden[:n], [*tokens[1:n], first], depth=5)
        assert np.array_equal(drafts, expected["drafts"][i])
        assert_close(f"draft_logits after {n}", logits, expected["draft_logits"][i])


def test_base_fused_holds_the_weights_of_base():
    base = float64.read_safetensors(GOLDENS / "base" / "model.safetensors")
    fused = float64.read_safetensors(GOLDENS / "base_fused" / "model.safetensors")
    expected = {name: w for name, w in base.items() if not name.startswith("mtp.")}
    for name, tensor in fused.items():
        prefix, found, leaf = name.partition(".experts.")
        if not found:
            assert np.array_equal(tensor, expected.pop(name)), name
            continue
        for e, matrix in enumerate(tensor):
            parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
            separate = [expected.pop(f"{prefix}.experts.{e}.{part}.weight") for part in parts]
            assert np.array_equal(matrix, np.concatenate(separate)), name
    assert not expected
