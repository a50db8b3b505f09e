"""Speculation keeps the distribution: chi-square tests of joint token frequencies.

A Markov chain on four tokens stands for the trunk, another one for the drafter. What follows each
token (with a penalty: each pair of tokens) must have the frequencies that an independent
calculation gives. That samples come out the same without speculation is tested on real models.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen3next.decoding.draft_depth import FixedDepth, Offer
from mlx_qwen3next.decoding.drafters import Drafter
from mlx_qwen3next.decoding.drafters.lookup import LookupDrafter
from mlx_qwen3next.decoding.sampling import Chooser, Sampling
from mlx_qwen3next.decoding.speculative import Decoding

V = 4
PIECE = 250  # tokens decoded at a time: with a penalty, each choice reads all that came before
BOUND = 3.0  # standard deviations; what is right stays below 2.2
TRUNK, DRAFTER = (
    np.random.default_rng(seed).normal(0, 0.8, (V, V)).astype(np.float32) for seed in (1, 2)
)
DRAFTER = (TRUNK + 0.7 * DRAFTER).astype(np.float32)
OPTIONS = [  # and the samples that show an error of 2 %
    ({"temp": 1.5}, 5500),
    ({"temp": 0.7, "top_k": 3}, 7500),
    ({"temp": 0.7, "top_p": 0.8}, 8000),
    ({"temp": 1.5, "repetition_penalty": 1.5, "repetition_context_size": 2}, 8000),
]


class Chain:
    """A "model" whose logits depend on the last token alone, and needs no cache."""

    def __init__(self, table):
        self.table = mx.array(table)

    def model(self, tokens, cache, between):
        return tokens

    def logits(self, hidden):
        return self.table[hidden]


class ChainDrafter(Drafter, Chain):
    source = "chain"

    def offer(self, ahead=False):
        return Offer(self.source, [0.5] * 3, (1, 2, 3))

    def propose(self, token, depth, choose):
        drafts = []
        for _ in range(depth):
            drafts.append(choose(self.logits(drafts[-1] if drafts else token), drafts))
        return drafts


def context(options):
    return 2 if "repetition_penalty" in options else 1


def sample(options, n, chooser=Chooser, drafter=None):
    mx.random.seed(len(str(options)))  # not the same numbers for all options
    sampling, tokens = Sampling(**options), [0]
    while len(tokens) <= n:
        last = mx.array(tokens[-2:], mx.uint32)
        choices = chooser(sampling.sampler(), sampling.logits_processors(), last)
        drafter = drafter or ChainDrafter(DRAFTER)
        drafter.follow(tokens)
        depth = FixedDepth(3, lookup=3)
        steps = Decoding(Chain(TRUNK), [], last[-1:], choices, depth, [drafter])
        tokens += [step.token for step in steps.tokens(PIECE)]
    return tokens


def law(before, last, temp, top_k=0, top_p=1.0, repetition_penalty=1.0, **_):
    """What follows two tokens, in numpy."""
    logits = TRUNK[last].astype(np.float64)
    for token in {before, last}:
        logits[token] *= repetition_penalty ** (1 if logits[token] < 0 else -1)
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)
    kept = order[: top_k or V]
    if top_p < 1:  # the fewest likely tokens that have the mass
        kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    q = np.zeros(V)
    q[kept] = p[kept] ** (1 / temp)
    return q / q.sum()


def excess(tokens, options, moved=0.0):
    """The chi-square statistic above its mean, in standard deviations; infinite if something came
    that cannot. ``moved`` of the law's mass goes from its likeliest to its next token."""
    counts = np.zeros((V, V, V))
    np.add.at(counts, (tokens[:-2], tokens[1:-1], tokens[2:]), 1)
    if context(options) == 1:
        counts = counts.sum(axis=0, keepdims=True)
    chi2, freedom = 0.0, 0
    for before, last in np.ndindex(counts.shape[:2]):
        n, p = counts[before, last], law(before, last, **options)
        first, second = np.argsort(-p)[:2]
        p[first], p[second] = p[first] - moved, p[second] + moved
        if n[p == 0].any():
            return np.inf
        expected = n.sum() * p[p > 0]
        if n.sum() and expected.min() >= 5:
            chi2 += ((n[p > 0] - expected) ** 2 / expected).sum()
            freedom += (p > 0).sum() - 1
    assert freedom >= V
    return (chi2 - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(("options", "n"), OPTIONS, ids=str)
def test_frequencies(options, n):
    tokens = sample(options, n)
    assert excess(tokens, options) < BOUND
    assert excess(tokens, options, moved=0.02) > BOUND


@pytest.mark.parametrize("temp", [0.7, 1.5])
def test_frequencies_with_copies(temp):
    copying = LookupDrafter()
    tokens = sample({"temp": temp}, 4500, drafter=copying)
    assert copying.offer().shares  # four tokens leave no pair that is new
    assert excess(tokens, {"temp": temp}) < BOUND
    assert excess(tokens, {"temp": temp}, moved=0.03) > BOUND


class Typical(Chooser):
    """A wrong rule: a draft that is likely enough is taken as it is."""

    def choose_all(self, logits, drafts):
        tokens, logprobs = super().choose_all(logits, drafts)
        taken = [
            mx.where(logprobs[i, draft] > np.log(0.2), draft, tokens[i : i + 1])
            for i, draft in enumerate(drafts)
        ]
        return mx.concatenate([*taken, tokens[len(drafts) :]]), logprobs


class Frozen(Chooser):
    """A wrong rule: all positions share their random numbers."""

    def extend(self, token):
        pass


@pytest.mark.parametrize("wrong", [Typical, Frozen])
def test_wrong_rules_are_caught(wrong):
    options = {"temp": 1.5}
    assert excess(sample(options, 3000, wrong), options) > 2 * BOUND
