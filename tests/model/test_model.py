"""The hybrid stack and the MTP head equal transformers' results and the float64 oracle."""

import functools
from pathlib import Path

import float64
import mlx.core as mx
import numpy as np
import pytest
from float64 import relative_error
from mlx_lm.utils import quantize_model

from mlx_qwen3next import load_model
from mlx_qwen3next.model.cache import GatedDeltaCache

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ["base", "eps", "dense", "permutation"]
LENGTHS = [1, 2, 3, 63, 64, 65, 100, 130]
BOUND = 1e-4  # float32's noise here is 2e-5 at most, the smallest structural mistake 1e-2

cases = pytest.mark.parametrize("case", CASES)


@functools.cache
def golden(case):
    """(model, expected tensors)."""
    expected = float64.read_safetensors(GOLDENS / case / "expected.safetensors")
    return load_model(GOLDENS / case), {name: mx.array(x) for name, x in expected.items()}


@functools.cache
def oracle(case):
    return float64.Model(GOLDENS / case)


def assert_close(name, result, expected, bound=BOUND):
    error = relative_error(result, expected)
    assert error <= bound, f"{name}: relative L2 error {error:.1e}"


@cases
@pytest.mark.parametrize("L", LENGTHS)
def test_every_layer_in_turn(case, L):
    model, expected = golden(case)
    x = model.model.embed_tokens(expected["tokens"][None, :L])
    assert_close("embedding", x[0], expected["hidden.0"][:L])
    for i, layer in enumerate(model.layers):
        x = layer(x, None if layer.is_linear or L == 1 else "causal")
        kind = "linear" if layer.is_linear else "full"
        assert_close(f"layer {i} ({kind} attention)", x[0], expected[f"hidden.{i + 1}"][:L])
    hidden = model.model.norm(x)
    assert_close("final norm", hidden[0], expected["hidden.final"][:L])
    assert_close("logits", model.logits(hidden)[0], expected["logits"][:L])
    assert_close("whole model", model(expected["tokens"][None, :L])[0], expected["logits"][:L])


@cases
def test_each_layer_alone_from_the_oracle_s_input(case):
    """No error is inherited: each layer gets what float64 computed before it."""
    model, expected = golden(case)
    states = oracle(case).layers(np.array(expected["tokens"]))
    for i, layer in enumerate(model.layers):
        x = mx.array(states[i][None].astype(np.float32))
        result = layer(x, None if layer.is_linear else "causal")
        assert_close(f"layer {i}", result[0], states[i + 1])
        # The residual stream is large: what the layer adds is judged by itself, too.
        assert_close(f"update of layer {i}", (result - x)[0], states[i + 1] - states[i])


@cases
def test_greedy_tokens(case):
    model, expected = golden(case)
    cache = model.make_cache()
    greedy = []
    tokens = expected["tokens"][None, :10]
    for _ in range(expected["greedy"].size):
        token = model(tokens, cache)[:, -1].argmax(axis=-1)
        greedy.append(token.item())
        tokens = token[None]
    assert greedy == expected["greedy"].tolist()


@cases
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("prefill", [1, 3, 64, 100])
def test_prefill_and_steps_equal_the_full_forward(case, prefill, steps):
    model, expected = golden(case)
    tokens, cache = expected["tokens"][None], model.make_cache()
    parts = [model(tokens[:, :prefill], cache)]
    for start in range(prefill, prefill + 6 * steps, steps):
        parts.append(model(tokens[:, start : start + steps], cache))
    end = prefill + 6 * steps
    assert_close("logits", mx.concatenate(parts, axis=1)[0], expected["logits"][:end])


@cases
def test_ragged_batch_equals_its_prompts_alone(case):
    model, expected = golden(case)
    tokens = expected["tokens"]
    lengths = [1, 17, 40, 39]
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    batch = mx.stack([mx.pad(tokens[:n], (p, 0)) for n, p in zip(lengths, padding, strict=True)])
    cache = model.make_cache(left_padding=padding)
    prompt = model(batch, cache)
    following = mx.stack([tokens[n : n + 5] for n in lengths])
    steps = [model(following[:, :1], cache), model(following[:, 1:5], cache)]
    for i, n in enumerate(lengths):
        assert_close(f"prompt of {n}", prompt[i, padding[i] :], expected["logits"][:n])
        after = mx.concatenate([step[i] for step in steps])
        assert_close(f"steps after {n}", after, expected["logits"][n : n + 5])


def test_right_padded_prefill_as_in_batched_serving():
    """mlx-lm's batches pad on the right while they prefill: prepare(), forward, finalize()."""
    model, expected = golden("base")
    tokens, lengths = expected["tokens"], [3, 20, 11]
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    batch = mx.stack([mx.pad(tokens[:n], (0, p)) for n, p in zip(lengths, padding, strict=True)])
    cache = model.make_cache(left_padding=[0, 0, 0])
    for c in cache:
        c.prepare(lengths=lengths, right_padding=padding)
    for start, end in ((0, 9), (9, longest)):  # a prompt may end in any chunk
        model(batch[:, start:end], cache)
        mx.eval([c.state for c in cache])
    for c in cache:
        c.finalize()
    following = mx.stack([tokens[n : n + 1] for n in lengths])
    logits = model(following, cache)
    for i, n in enumerate(lengths):
        assert_close(f"step after {n}", logits[i, 0], expected["logits"][n])


@cases
def test_mtp_head(case):
    model, expected = golden(case)
    tokens = expected["tokens"][None]
    hidden = expected["hidden.final"][None, :-1]
    m = model.mtp(hidden, tokens[:, 1:])
    assert_close("mtp_hidden", m[0], expected["mtp_hidden"])
    assert_close("mtp_logits", model.logits(m)[0], expected["mtp_logits"])


@cases
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_mtp_head_with_its_cache_equals_the_full_forward(case, chunk):
    model, expected = golden(case)
    tokens, hidden = expected["tokens"][None], expected["hidden.final"][None]
    cache = model.mtp.make_cache()
    parts = [
        model.mtp(hidden[:, i : i + chunk], tokens[:, i + 1 : i + 1 + chunk], cache)
        for i in range(0, 64, chunk)
    ]
    m = mx.concatenate(parts, axis=1)
    assert_close("mtp_hidden", m[0], expected["mtp_hidden"][: m.shape[1]])


@cases
def test_recursive_drafts(case):
    model, expected = golden(case)
    tokens = expected["tokens"]
    for i, n in enumerate(expected["draft_points"].tolist()):
        cache = model.mtp.make_cache()
        first = expected["draft_first_tokens"][i : i + 1].astype(mx.int32)
        hidden, cache_tokens = model.model(tokens[None, :n]), mx.concatenate([tokens[1:n], first])
        m = model.mtp(hidden, cache_tokens[None], cache)[:, -1:]
        drafts = []
        for depth in range(expected["drafts"].shape[1]):
            logits = model.logits(m)[0, 0]
            assert_close(f"draft {depth} after {n}", logits, expected["draft_logits"][i, depth])
            drafts.append(logits.argmax().item())
            m = model.mtp(m, mx.array([[drafts[-1]]]), cache)
        assert drafts == expected["drafts"][i].tolist()


def test_states_stay_float32_in_a_bfloat16_model():
    model = load_model(GOLDENS / "base", dtype=mx.bfloat16)
    quantize_model(model, {}, group_size=32, bits=8)  # MLX's CPU gather_mm takes float32 only
    cache = model.make_cache()
    logits = model(golden("base")[1]["tokens"][None], cache)
    assert logits.dtype == mx.bfloat16
    linear = [c for c in cache if isinstance(c, GatedDeltaCache)]
    assert {c.state[0][1].dtype for c in linear} == {mx.float32}
