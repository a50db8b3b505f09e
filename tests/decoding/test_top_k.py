"""Drawing from the k most probable tokens: mlx-lm's tokens, without a sort of the vocabulary."""

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_qwen3next.bench.graph import count
from mlx_qwen3next.decoding import random_numbers
from mlx_qwen3next.decoding.sampling import Chooser, Sampling, SeededSampler
from mlx_qwen3next.decoding.top_k import MOST, TopKSampler, _rounded, largest

QWEN = {"temp": 0.7, "top_p": 0.8, "top_k": 20}
VOCABULARY = 151936  # Qwen's
OPTIONS = [
    QWEN,
    {"temp": 1.5, "top_k": 7},
    {"temp": 1.0, "top_k": 30, "top_p": 0.95, "min_p": 0.05},
    {"temp": 0.3, "top_k": 30, "min_p": 0.2},
    {"temp": 40.0, "top_k": 36},
    {"temp": 1.0, "top_k": 1, "top_p": 0.01},
]
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def log_probabilities(seed, vocab, dtype=mx.float32, ties=False, minus_infinity=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1 + seed % 4, vocab)
    if ties:
        logits = np.round(logits)
    if minus_infinity:
        logits[rng.permutation(vocab)[3:]] = -np.inf
    logits = mx.array(logits[None], dtype)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def drawn(sampler, logprobs, seed):
    mx.random.seed(seed)
    return sampler(logprobs).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_mlx_lms(options, dtype):
    ours, theirs = Sampling(**options).sampler(), make_sampler(**options)
    assert isinstance(ours, TopKSampler)
    for seed in range(80):
        # 37 and 203 are no multiples of a block.
        row = log_probabilities(
            seed, [37, 128, 203][seed % 3], dtype, ties=seed % 4 == 1, minus_infinity=seed % 4 == 2
        )
        assert drawn(ours, row, seed) == drawn(theirs, row, seed), seed


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_tokens_of_the_whole_vocabulary_are_mlx_lms(dtype):
    ours, theirs = Sampling(**QWEN).sampler(), make_sampler(**QWEN)
    for seed in range(12):
        row = log_probabilities(seed, VOCABULARY, dtype, ties=seed % 3 == 1)
        assert drawn(ours, row, seed) == drawn(theirs, row, seed), seed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "vocab, k", [(5, 3), (37, 36), (64, 20), (203, 20), (5000, 1), (9000, 999)]
)
def test_largest(vocab, k, dtype):
    rows = mx.concatenate(
        [log_probabilities(seed, vocab, dtype, ties=seed > 0) for seed in range(3)]
    )
    values, tokens = largest(rows, k)
    expected = np.argsort(-np.array(rows.astype(mx.float32)), axis=-1, kind="stable")[:, :k]
    assert np.array(tokens).tolist() == expected.tolist()
    assert mx.array_equal(values, mx.take_along_axis(rows, tokens, axis=-1))


@pytest.mark.parametrize("uniform, token", [(0.0, 2), (1 - 2**-24, 7)])
def test_the_ends_of_the_line_are_tokens_that_are_kept(uniform, token):
    probabilities = mx.array([[0.02, 0.02, 0.3, 0.02, 0.02, 0.2, 0.02, 0.32, 0.04, 0.04]])
    sampler = TopKSampler(1.0, 0.7, 0.0, 9)
    assert sampler.draw(mx.log(probabilities), mx.array([[uniform]])).tolist() == [token]


@pytest.mark.parametrize("k", [20, 258, 260, 1000])
def test_the_end_of_the_line_is_kept_where_lengths_are_rounded(k):
    """Of many tokens each is so short that the point may come to lie on the line's end."""
    probabilities = mx.array([[0.95, *[0.05 / 1100] * 1100]])
    sampler = TopKSampler(1.0, 0.5, 0.0, k)
    assert sampler.draw(mx.log(probabilities), mx.array([[1 - 2**-24]])).tolist() == [0]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_probabilities_are_exponentials_of_the_rounded_logarithms(dtype):
    numbers = mx.arange(2**16).astype(mx.uint16).view(dtype)[None]
    numbers = numbers[:, mx.array(np.flatnonzero(np.array(numbers.astype(mx.float32)) <= 0.01))]
    logprobs, probabilities = _rounded(numbers, mx.zeros((1, 1), dtype))
    assert mx.array_equal(logprobs, numbers)
    exact = np.exp(np.array(numbers.astype(mx.float32)).astype(np.float64))
    # Beside a total of 1, also from a whole vocabulary of numbers that are as small.
    assert (np.abs(np.array(probabilities) - exact) <= 4e-6 * exact + 1e-12).all()


def test_tokens_exist_without_probabilities():
    """What a broken model gives must not lead out of the vocabulary."""
    rows = mx.full((2, 203), float("nan"))
    assert np.array(TopKSampler(1.0, 0.9, 0.0, 20)(rows)).max() < 203


@pytest.mark.parametrize("key", [0, 1, 2**31 - 2])
@pytest.mark.parametrize("position", [0, 1, 7, 2**18])
def test_numbers_are_mlxs(key, position):
    random_numbers.seed(key, position)
    assert mx.random.uniform().item() == random_numbers.uniform(key, position)


@pytest.mark.parametrize(
    "options", [QWEN, QWEN | {"presence_penalty": 2.0}, {"temp": 0.7}], ids=str
)
def test_rows_of_a_round_are_drawn_as_alone(options):
    sampling, prompt = Sampling(**options), mx.array([3, 4], mx.uint32)
    drafts = [mx.array([token], mx.uint32) for token in (5, 6, 7)]

    def chooser():
        return Chooser(sampling.sampler(), sampling.logits_processors(), prompt, 11, 40)

    for seed in range(20):
        logits = mx.concatenate([log_probabilities(4 * seed + i, 50) for i in range(4)])
        together, logprobs = chooser().choose_all(logits, drafts)
        for i in range(4):
            token, alone = chooser().choose(logits[i : i + 1], drafts[:i])
            assert token.item() == together[i].item()
            assert mx.array_equal(alone[0], logprobs[i])
            if not sampling.presence_penalty:
                batched = SeededSampler(sampling.sampler(), 11, 40 + i)
                assert batched(alone).item() == token.item()


def sorts(build):
    """The sizes of what is sorted while the graph is built."""
    sizes = []

    def noting(sort):
        def noted(x, *args, **options):
            sizes.append(x.shape[-1])
            return sort(x, *args, **options)

        return noted

    names = ("sort", "argsort", "partition", "argpartition", "topk")
    patches = [patch.object(mx, name, noting(getattr(mx, name))) for name in names]
    for each in patches:
        each.start()
    built = build()
    for each in patches:
        each.stop()
    return sizes, built


@pytest.mark.parametrize(
    "dtype, launches", [(mx.float32, 11), (mx.bfloat16, 12), (mx.float16, 12)], ids=str
)
def test_a_round_sorts_no_vocabulary_and_queues_few_launches(dtype, launches):
    logits = mx.zeros((4, VOCABULARY), dtype)
    mx.eval(logits)
    chooser = Chooser(Sampling(**QWEN).sampler(), [], mx.array([1], mx.uint32), 0)
    drafts = [mx.array([1], mx.uint32)] * 3
    sizes, (tokens, _) = sorts(lambda: chooser.choose_all(logits, drafts))
    counted = count([tokens])
    assert counted.total() == launches, counted
    assert sizes == [VOCABULARY / 64, 21 * 64]
    assert {name for name in counted if "Sort" in name or "Partition" in name} == {
        "Sort",
        "ArgPartition",
    }
    assert counted["Sort"] == counted["ArgPartition"] == counted["LogSumExp"] == 1


@pytest.mark.parametrize(
    "options, times", [({"top_p": 0.8}, 1), ({"min_p": 0.1}, 0), ({}, 0)], ids=str
)
def test_without_top_k_the_vocabulary_is_sorted_for_top_p_alone(options, times):
    chooser = Chooser(Sampling(temp=0.7, **options).sampler(), [], mx.array([1], mx.uint32), 0)
    counted = count([chooser.choose(mx.zeros((1, 5000)))[0]])
    found = sum(n for name, n in counted.items() if name.endswith(("Sort", "Partition")))
    assert found == times


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": MOST + 1},
        {"top_k": 20, "xtc_probability": 0.5},
        {"top_k": 20, "min_p": 0.1, "min_tokens_to_keep": 2},
        {"top_p": 0.9},
    ],
    ids=str,
)
def test_other_options_are_left_to_mlx_lm(options):
    assert not isinstance(Sampling(temp=0.7, **options).sampler(), TopKSampler)
