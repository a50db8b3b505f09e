"""The sampling options: which tokens are drawn, and how bias and penalties change the logits."""

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import golden, golden_tokens, greedy, same

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.sampling import Sampling

NOISE = 1e-4  # relative, between two right ways to compute the same in float32


def test_a_seed_fixes_the_samples():
    model, (prompt, _) = golden("base")[0], golden_tokens("base")

    def sample(seed):
        mx.random.seed(seed)
        return greedy(model, prompt, 20, temp=1.0)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_k_of_one_is_greedy():
    prompt, expected = golden_tokens("base")
    assert greedy(golden("base")[0], prompt, 24, temp=1.0, top_k=1) == expected


def test_a_sampler_of_ones_own_is_used():
    prompt, _ = golden_tokens("base")
    tokens = greedy(golden("base")[0], prompt, 3, sampler=lambda x: mx.full((x.shape[0],), 7))
    assert tokens == [7, 7, 7]


PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.75}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 0.3, "min_tokens_to_keep": 4}, [0, 1, 2, 3]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.12}, [2, 3, 4]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.12, "xtc_special_tokens": (0,)}, [0, 2, 3, 4]),
        ({"xtc_probability": 0.0, "xtc_threshold": 0.12}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
@pytest.mark.parametrize("temp", [1.0, 0.5])
def test_sampler_draws_from_the_kept_tokens(options, kept, temp):
    mx.random.seed(0)
    n = 4000
    logprobs = mx.broadcast_to(mx.log(mx.array(PROBABILITIES)).astype(mx.float32), (n, 5))
    drawn = np.bincount(np.array(Sampling(temp=temp, **options).sampler()(logprobs)), minlength=5)
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] ** (1 / temp)
    expected /= expected.sum()
    assert np.flatnonzero(drawn).tolist() == kept
    assert np.abs(drawn / n - expected).max() < 0.04  # five standard deviations


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {7: 1.5, 3: -2.0}},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.5, "repetition_context_size": 3},
        {"presence_penalty": 0.5},
        {"presence_penalty": 0.5, "presence_context_size": 3},
        {"frequency_penalty": 0.5},
        {"frequency_penalty": 0.5, "frequency_context_size": 3},
    ],
    ids="-".join,
)
def test_bias_and_penalties_change_the_logits(options):
    model, _ = golden("base")
    prompt = [5, 9, 5, 11, 5, 9, 9, 13]
    logits = np.array(model(mx.array([prompt]))[0, -1])
    for token, bias in options.get("logit_bias", {}).items():
        logits[token] += bias
    for penalty in ("repetition", "presence", "frequency"):
        size = options.get(f"{penalty}_context_size", 20)
        value = options.get(f"{penalty}_penalty")
        if value is None:
            continue
        for token in set(prompt[-size:]):
            if penalty == "repetition":
                logits[token] *= value if logits[token] < 0 else 1 / value
            else:
                count = prompt[-size:].count(token) if penalty == "frequency" else 1
                logits[token] -= value * count
    expected = mx.array(logits) - mx.logsumexp(mx.array(logits))
    step = next(generate_step(prompt, model, max_tokens=1, **options))
    assert same([step.logprobs], [expected], NOISE)
    assert step.token == logits.argmax()


def test_penalties_see_generated_tokens():
    model, _ = golden("permutation")
    tokens = greedy(model, [3], 12, logit_bias={7: 1e4}, presence_penalty=1e5)
    assert tokens[0] == 7
    assert len(set(tokens)) == 12
