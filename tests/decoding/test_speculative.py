"""Speculation changes no token, accepts what it should, and pays or stops."""

import functools
import itertools
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import (
    GOLDENS,
    bundled,
    forward_cache,
    golden,
    golden_tokens,
    greedy,
    narrow,
    tokens_of,
)
from helpers_speculative import Cycle, Script, decoding
from mlx_lm import batch_generate
from mlx_lm.sample_utils import make_sampler
from speculation import rounds, simulated, simulated_rounds

from mlx_qwen3next import generate_step, load_model
from mlx_qwen3next.compute import proof
from mlx_qwen3next.decoding import speculative
from mlx_qwen3next.decoding.draft_depth import MAX_DEPTH, FixedDepth, MeasuredDepth
from mlx_qwen3next.decoding.drafters.mtp import new_shares
from mlx_qwen3next.decoding.drafters.speculation import Speculation
from mlx_qwen3next.decoding.speculative import Acceptance
from mlx_qwen3next.model.cache import tokens_held

DEPTHS = range(1, MAX_DEPTH + 1)
SOME = (1, 3, MAX_DEPTH)  # for models whose heads are hardly ever right
CASES = [*itertools.product(["permutation"], DEPTHS)]
CASES += itertools.product(["base", "eps", "dense"], SOME)
TOKENS = 24  # at most, which are many rounds at any depth
NOISE = 1e-4  # relative, between two right ways to compute the same in float32


@functools.cache
def at_depth(case, depth):
    """A golden's greedy tokens, drafted to a depth."""
    prompt, expected = golden_tokens(case)
    n = min(len(expected), TOKENS)
    return list(generate_step(prompt, golden(case)[0], max_tokens=n, mtp=depth))


# --- the same tokens ----------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "depth"), CASES)
def test_greedy_tokens_are_the_goldens(case, depth):
    _, expected = golden_tokens(case)
    steps = at_depth(case, depth)
    assert tokens_of(steps) == expected[:TOKENS]
    assert any(step.drafted == depth for step in steps)


def test_drafts_are_accepted_and_refused():
    """The head of `permutation` is often right, but not always: both are put to the test here."""
    accepted = [step.from_draft for step in at_depth("permutation", 4) if step.drafted]
    assert 0.3 < sum(accepted) / len(accepted) < 0.95


def test_tokens_of_the_demo_model():
    model, tokenizer = bundled()
    texts = "<|endoftext|>import os\n", "def merge(left, right):\n", "class Queue"
    for text, depth in zip(texts, (1, 3, 8), strict=True):
        prompt = tokenizer.encode(text)
        plain = greedy(model, prompt, 16, mtp="off")
        assert greedy(model, prompt, 16, mtp=depth) == plain, depth


@pytest.mark.parametrize("depths", [(0, 2), (3, 0, 0, 1), (0, 0, 8, 8)], ids=str)
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_plain_steps_and_rounds_in_turns(case, depths):
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    cache, head = forward_cache(model, prompt[:-1]), model.mtp.make_cache()
    drafter = Speculation.of(model).drafter(head)
    steps = decoding(model, prompt, cache, Cycle(*depths), drafter).tokens(24)
    assert tokens_of(steps) == expected[:24]
    assert tokens_held(cache) == len(prompt) + 24


SAMPLING = [
    {"temp": 1.0},
    {"temp": 0.7, "top_p": 0.8},
    {"temp": 1.5, "top_k": 20},
    {"temp": 0.8, "min_p": 0.05},
    {"temp": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temp": 0.7, "repetition_penalty": 1.3, "logit_bias": {3: 1.0}},
    {"temp": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temp": 1.0, "repetition_penalty": 1.3, "repetition_context_size": 3},
]


@pytest.mark.parametrize(
    ("case", "options"),
    [*itertools.product(["permutation"], SAMPLING), ("base", SAMPLING[0]), ("base", SAMPLING[-1])],
    ids=str,
)
def test_a_seed_gives_the_same_samples_with_and_without_speculation(case, options):
    model, (prompt, _) = golden(case)[0], golden_tokens(case)

    def sample(mtp):
        mx.random.seed(7)
        steps = list(generate_step(prompt, model, max_tokens=14, mtp=mtp, **options))
        return tokens_of(steps), mx.random.uniform().item(), steps

    plain = sample("off")
    for depth in (1, 4):
        drafted = sample(depth)
        assert plain[:2] == drafted[:2], depth
        assert any(step.drafted for step in drafted[2])
        for a, b in zip(plain[2], drafted[2], strict=True):
            assert np.abs(np.exp(a.logprobs) - np.exp(b.logprobs)).max() < NOISE, depth


def test_a_sampler_of_ones_own_is_matched():
    model, (prompt, _) = golden("permutation")[0], golden_tokens("permutation")

    def sample(mtp):
        mx.random.seed(3)
        steps = generate_step(prompt, model, max_tokens=30, mtp=mtp, sampler=make_sampler(0.6))
        return [(step.token, step.from_draft) for step in steps]

    plain, drafted = sample("off"), sample(3)
    assert [t for t, _ in plain] == [t for t, _ in drafted]
    assert any(from_draft for _, from_draft in drafted)


@pytest.mark.parametrize("n", range(1, 8))
def test_what_is_drawn_after_stopping_does_not_depend_on_drafts(n):
    model, (prompt, _) = golden("permutation")[0], golden_tokens("permutation")

    def drawn(mtp):
        mx.random.seed(3)
        steps = generate_step(prompt, model, mtp=mtp, temp=0.6)
        tokens = [next(steps).token for _ in range(n)]
        steps.close()
        return tokens, mx.random.uniform().item()

    assert drawn("off") == drawn(3)


def test_processors_of_ones_own_see_every_prefix():
    """Each choice is made with exactly the tokens before it, drafts included."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    options = {"logits_processors": [processor], "max_tokens": 24}
    steps = list(generate_step(prompt, model, mtp=3, **options))
    assert tokens_of(steps) == expected[:24]
    text = prompt + expected
    assert {len(s) for s in seen if s == text[: len(s)]} >= set(range(10, 34))
    assert any(s != text[: len(s)] for s in seen)  # drafts that were refused
    # Some follow the text from call to call, so "auto" lets them see nothing but the text.
    seen.clear()
    steps = list(generate_step(prompt, model, mtp="auto", **options))
    assert not any(step.drafted for step in steps)
    assert seen == [text[:n] for n in range(10, 10 + len(seen))]


def test_a_random_processor_draws_alike():
    model, (prompt, _) = golden("permutation")[0], golden_tokens("permutation")

    def noise(tokens, logits):
        return logits + mx.random.normal(logits.shape)

    def sample(mtp):
        mx.random.seed(5)
        return greedy(model, prompt, 20, mtp=mtp, logits_processors=[noise])

    assert sample("off") == sample(3)


# --- what is accepted ---------------------------------------------------------------------------
@functools.cache
def simulation(case):
    if case == "narrow":
        model, tokenizer = narrow()
        prompt, n = tokenizer.encode("<|endoftext|>import os\nimport sys\n\n\ndef main("), 24
    else:
        model, (prompt, expected) = golden(case)[0], golden_tokens(case)
        n = min(len(expected), TOKENS)
    return model, prompt, n, *simulated(model, prompt, len(prompt) + n + 16)


@pytest.mark.parametrize(
    ("case", "depth"),
    [
        *itertools.product(["permutation"], DEPTHS),
        *itertools.product(["base"], SOME),
        *itertools.product(["narrow"], [1, 3, 8]),
    ],
)
def test_accept_counts_are_those_of_a_simulation(case, depth):
    model, prompt, n, tokens, drafts = simulation(case)
    if case == "narrow":
        steps = generate_step(prompt, model, max_tokens=n, mtp=depth)
    else:
        steps = at_depth(case, depth)
    assert rounds(steps) == simulated_rounds(tokens, drafts, len(prompt), n, depth)


def test_acceptance_is_counted():
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache, script = forward_cache(model, prompt[:-1]), Script(expected, [3, 0, 2, 1, 3])
    counted = Acceptance()
    for step in decoding(model, prompt, cache, FixedDepth(3), script).tokens(14):
        counted.add(step)
    assert counted.rounds == 5
    assert counted.mean_length == 14 / 5
    # Five rounds, of which 4, 3 and 2 got to depth 1, 2 and 3.
    assert counted.by_depth == (4 / 5, 3 / 4, 2 / 3)


# --- the depth ---------------------------------------------------------------------------------
def test_auto_drafts_where_rounds_take_no_longer_than_steps(monkeypatch):
    """By a clock that ticks once a look."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(speculative, "time", clock)
    monkeypatch.setattr(Speculation.of(model), "measured", MeasuredDepth())
    steps = [*generate_step(prompt, model, max_tokens=24)]
    steps += generate_step(prompt, model, max_tokens=24)
    assert tokens_of(steps) == expected[:24] * 2
    assert max(step.drafted for step in steps) >= 3
    assert not Speculation.of(model).measured.idle("mtp")


def test_auto_prepares_nothing_where_nothing_pays(monkeypatch):
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    now = itertools.count()

    class Slow(MeasuredDepth):
        def record(self, source, depth, seconds):
            super().record(source, depth, None if seconds is None else 1 + 9 * depth)

    monkeypatch.setattr(Speculation.of(model), "measured", Slow())
    monkeypatch.setattr(Speculation.of(model), "_head", new_shares())
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=now.__next__))
    steps = list(generate_step(prompt, model, max_tokens=24))
    assert 0 < sum(step.drafted > 0 for step in steps) <= 9
    assert Speculation.of(model).measured.idle("mtp")
    monkeypatch.setattr(Speculation, "drafter", None)  # is not called any more
    assert greedy(model, prompt, 12) == expected[:12]


@pytest.mark.parametrize("depths", [(0,), (2,)])
def test_what_held_a_kernels_proof_is_not_timed(monkeypatch, depths):
    """It takes far longer than the step or round it is part of."""
    (model, _), (prompt, _) = golden("base"), golden_tokens("base")
    proofs = itertools.chain([0, 0, 0, 1, 1, 1], itertools.repeat(2))
    monkeypatch.setattr(proof, "proofs", proofs.__next__)
    timed = []

    class Timed(Cycle):
        def record(self, source, depth, seconds):
            timed.append(seconds is not None)

    monkeypatch.setattr(Speculation.of(model), "measured", Timed(*depths))
    list(generate_step(prompt, model, max_tokens=40))
    assert timed[:8] == [False, True, True, False, True, True, False, True]


# --- batches, memory ----------------------------------------------------------------------------
def test_a_batch_decodes_plainly_to_the_same_tokens():
    model, tokenizer = bundled()
    prompts = [tokenizer.encode(text) for text in ("import os\nimport", "class Queue:\n", "x = [")]
    single = [tokenizer.decode(greedy(model, prompt, 12, mtp=2)) for prompt in prompts]
    batch = batch_generate(model, tokenizer, prompts, max_tokens=12)
    assert batch.texts == single


@pytest.mark.parametrize("mtp", ["off", 2])
def test_memory_does_not_grow_with_the_number_of_rounds(mtp):
    """Beyond keys and values: 120 more tokens leave no graph behind."""
    prompt = golden_tokens("permutation")[0] * 20
    model = load_model(GOLDENS / "permutation", dtype=mx.float32)
    cache = model.make_cache() + model.mtp.make_cache()
    used, arrays_held = [], []
    steps = generate_step(prompt, model, max_tokens=160, mtp=mtp, prompt_cache=cache)
    for n, step in enumerate(steps, start=1):
        del step
        if n in (30, 150):
            held = sum(c.nbytes for c in cache)
            used.append(mx.get_active_memory() - held)
            arrays_held.append(held)
    assert arrays_held[1] > arrays_held[0]
    assert used[1] - used[0] < 40_000
