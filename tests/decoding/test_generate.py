"""generate_step: its tokens, its cache, and what it refuses."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import (
    GOLDENS,
    PROMPT,
    arrays,
    bundled,
    forward_cache,
    golden,
    golden_tokens,
    greedy,
    same,
    tokens_of,
)
from mlx_lm.models.cache import ArraysCache, KVCache

from mlx_qwen3next import generate_step, load_model, stream_generate
from mlx_qwen3next.model.cache import GatedDeltaCache, tokens_held
from mlx_qwen3next.model.quantized_kv import QuantizedAttentionCache
from mlx_qwen3next.model.qwen3_next import Model

CASES = ["base", "eps", "dense", "permutation"]
NOISE = 1e-4  # relative, between two right ways to compute the same in float32


# --- greedy tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2048, 7, 3, 1])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_goldens(case, step):
    prompt, expected = golden_tokens(case)
    n = len(expected) if step == 2048 else 12
    assert greedy(golden(case)[0], prompt, n, prefill_step_size=step) == expected[:n]


@pytest.mark.parametrize("mtp", ["auto", "off"])  # depths: test_speculative
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_do_not_depend_on_mtp(case, mtp):
    prompt, expected = golden_tokens(case)
    assert greedy(golden(case)[0], prompt, 16, mtp=mtp) == expected[:16]


@pytest.mark.parametrize("mtp", ["auto", "off"])
def test_model_without_a_head_generates(mtp):
    prompt, expected = golden_tokens("base")
    assert greedy(load_model(GOLDENS / "base_fused"), prompt, 24, mtp=mtp) == expected[:24]


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        mx.array,
        lambda p: np.array(p, np.uint8),
        lambda p: mx.array(p, mx.int64),
    ],
    ids=["list", "tuple", "numpy", "mlx", "numpy-uint8", "mlx-int64"],
)
def test_prompt_may_be_any_sequence_of_integers(make):
    prompt, expected = golden_tokens("base")
    assert greedy(golden("base")[0], make(prompt), 3) == expected[:3]


@pytest.mark.parametrize("case", CASES)
def test_tokens_carry_their_log_probabilities(case):
    model, expected = golden(case)
    steps = list(generate_step(expected["tokens"][:PROMPT], model, max_tokens=2))
    for i, step in enumerate(steps):
        tokens = [*expected["tokens"][:PROMPT].tolist(), *tokens_of(steps[:i])]
        logits = model(mx.array([tokens]))[0, -1]
        assert same([step.logprobs], [logits - mx.logsumexp(logits)], NOISE)
        assert type(step.token) is int
        assert type(step.from_draft) is bool


def test_progress_is_reported():
    prompt, _ = golden_tokens("base")
    seen = []
    greedy(
        golden("base")[0],
        prompt,
        1,
        prefill_step_size=4,
        prompt_progress_callback=lambda *progress: seen.append(progress),
    )
    assert seen == [(0, 10), (4, 10), (8, 10), (9, 10), (10, 10)]


# --- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_prompt_cache_continues(case):
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    cache = forward_cache(model, prompt[:4])
    assert greedy(model, prompt[4:], 24, prompt_cache=cache) == expected[:24]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("end", ["closed", "dropped", "exhausted"])
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_cache_holds_the_prompt_and_every_token_yielded(case, end, n):
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    cache = model.make_cache()
    steps = generate_step(
        prompt, model, max_tokens=n if end == "exhausted" else 20, prompt_cache=cache
    )
    if end == "exhausted":
        tokens = tokens_of(steps)
    else:
        tokens = [next(steps).token for _ in range(n)]
        if end == "closed":
            steps.close()
    del steps
    assert tokens == expected[:n]
    assert tokens_held(cache) == len(prompt) + n
    reference = forward_cache(model, prompt + tokens)
    for entry, other in zip(cache, reference, strict=True):
        if isinstance(entry, GatedDeltaCache):
            assert same(arrays([entry]), arrays([other]), NOISE)
    # So the next token, given by the caller, is a prompt that goes on.
    assert greedy(model, [expected[n]], 10, prompt_cache=cache) == expected[n + 1 : n + 11]


def test_cache_of_mlx_lms_own_model_is_taken_over():
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = forward_cache(model, prompt[:4])
    stock = [
        ArraysCache.from_state(c.state) if isinstance(c, GatedDeltaCache) else c for c in cache
    ]
    assert greedy(model, prompt[4:], 24, prompt_cache=stock) == expected[:24]
    assert tokens_held(stock) == len(prompt) + 24


def test_kv_bits_quantize_the_attention_layers():
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = model.make_cache()
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12, "prompt_cache": cache}
    steps = generate_step(prompt, model, max_tokens=20, **options)
    exact = generate_step(prompt, model, max_tokens=20)
    attention = [i for i, c in enumerate(cache) if isinstance(c, KVCache)]
    errors = []
    for i, (step, reference) in enumerate(zip(steps, exact, strict=True)):
        assert step.token == expected[i]
        p, q = mx.exp(step.logprobs), mx.exp(reference.logprobs)
        errors.append(mx.linalg.norm(p - q).item() / mx.linalg.norm(q).item())
    assert [type(cache[i]) for i in attention] == [QuantizedAttentionCache] * len(attention)
    assert {cache[i].bits for i in attention} == {8}
    assert errors[0] < NOISE < max(errors) < 0.05
    # A quantized cache continues as well.
    assert tokens_held(cache) == len(prompt) + 20
    assert greedy(model, [expected[20]], 3, prompt_cache=cache) == expected[21:24]


# --- how many tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_context():
    """`base` with a context of 16 tokens."""
    model = load_model(GOLDENS / "base")
    model.args = dataclasses.replace(model.args, max_position_embeddings=16)
    return model


@pytest.mark.parametrize("held", [0, 4])
@pytest.mark.parametrize(
    ("max_tokens", "generated"), [(1, 1), (5, 5), (6, 6), (7, 6), (-1, 6), (10**12, 6)]
)
def test_max_tokens(short_context, max_tokens, generated, held):
    prompt, expected = golden_tokens("base")
    cache = forward_cache(short_context, prompt[:held]) if held else None
    tokens = greedy(short_context, prompt[held:], max_tokens, prompt_cache=cache)
    assert tokens == expected[:generated]


def test_full_context_leaves_room_for_one_token(short_context):
    tokens = golden("base")[1]["tokens"]
    assert len(greedy(short_context, tokens[:16], -1)) == 1


def test_prompt_longer_than_the_context_is_refused(short_context):
    tokens = golden("base")[1]["tokens"].tolist()
    with pytest.raises(ValueError, match=r"17 tokens.*max_position_embeddings is 16"):
        generate_step(tokens[:17], short_context)
    cache = forward_cache(short_context, tokens[:10])
    with pytest.raises(ValueError, match=r"17 tokens.*max_position_embeddings is 16"):
        generate_step(tokens[10:17], short_context, prompt_cache=cache)
    assert tokens_held(cache) == 10


# --- bad arguments ------------------------------------------------------------------------------

BAD_PROMPTS = {
    "empty": ([], "empty"),
    "empty-array": (mx.zeros((0,), mx.int32), "empty"),
    "negative": ([3, -1], "outside 0…95"),
    "too-large": ([3, 96], "outside 0…95"),
    "larger-than-int32": ([3, 2**40], "outside 0…95"),
    "float": ([1.0, 2.0], "integers"),
    "float-array": (mx.array([1.0, 2.0]), "integers"),
    "bfloat16-array": (mx.array([1.0], mx.bfloat16), "token ids"),
    "bool": ([True, False], "integers"),
    "text": ("hello", "token ids"),
    "words": (["hello"], "integers"),
    "none": (None, "token ids"),
    "scalar": (mx.array(3), "shape"),
    "batch": ([[1, 2], [3, 4]], r"shape \[2, 2\]"),
    "ragged": ([[1, 2], [3]], "one sequence"),
}

BAD_OPTIONS = [
    *[("max_tokens", value) for value in (0, -2, 1.5, "4", True, None)],
    *[("prefill_step_size", value) for value in (0, -1, 1.5, "x", True)],
    *[("mtp", value) for value in (0, 9, -1, "on", "3", None, True, 1.0, ["auto"])],
    *[("temp", value) for value in (-0.1, float("nan"), float("inf"), "1", None)],
    *[("top_p", value) for value in (-0.1, 1.1, "x")],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("top_k", value) for value in (-1, 1.0, "3", True, 96)],
    *[("min_tokens_to_keep", value) for value in (0, 1.0, 96)],
    *[("xtc_probability", value) for value in (-0.1, 1.1)],
    *[("xtc_threshold", value) for value in (-0.1, 0.6)],
    ("xtc_special_tokens", (96,)),
    *[("logit_bias", bias) for bias in ({96: 1.0}, {-1: 1.0}, {"3": 1.0}, {3: "x"}, [3])],
    *[("logit_bias", {3: value}) for value in (float("nan"), float("inf"))],
    *[("repetition_penalty", value) for value in (-1, float("nan"), "x")],
    *[("presence_penalty", value) for value in (float("inf"), "x")],
    *[("frequency_penalty", value) for value in (float("nan"), "x")],
    *[(f"{penalty}_context_size", -1) for penalty in ("repetition", "presence", "frequency")],
    *[("temperature", 1.0), ("max_kv_size", 5)],
]


def assert_refused(match, call, cache):
    """The call, not the first token, raises a ValueError, and leaves the cache as it was."""
    before = arrays(cache)
    with pytest.raises(ValueError, match=match):
        call(cache)
    after = arrays(cache)
    assert len(before) == len(after)
    assert all(x is y or x == y for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("prompt", BAD_PROMPTS)
def test_bad_prompt(prompt):
    model, _ = golden("base")
    prompt, match = BAD_PROMPTS[prompt]
    cache = forward_cache(model, [1, 2, 3])
    assert_refused(match, lambda cache: generate_step(prompt, model, prompt_cache=cache), cache)


@pytest.mark.parametrize(
    ("name", "value"), BAD_OPTIONS, ids=[f"{name}={value!r}" for name, value in BAD_OPTIONS]
)
def test_bad_option(name, value):
    model, _ = golden("base")
    cache = forward_cache(model, [1, 2, 3])

    def call(cache):
        generate_step([1, 2], model, prompt_cache=cache, **{name: value})

    assert_refused(name, call, cache)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kv_bits", {"kv_bits": 7}),
        ("kv_bits", {"kv_bits": "4"}),
        ("kv_group_size", {"kv_bits": 4, "kv_group_size": 48}),
        ("kv_group_size.*head_dim", {"kv_bits": 4, "kv_group_size": 64}),  # head_dim is 32
        ("quantized_kv_start", {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": -1}),
    ],
)
def test_bad_kv_quantization(name, options):
    model, _ = golden("base")
    cache = forward_cache(model, [1, 2, 3])

    def call(cache):
        generate_step([1, 2], model, prompt_cache=cache, **options)

    assert_refused(name, call, cache)


def test_depth_on_a_model_without_a_head_is_refused():
    model = load_model(GOLDENS / "base_fused")
    with pytest.raises(ValueError, match="mtp is 2, but this model has no MTP head"):
        generate_step([1, 2], model, mtp=2)


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 64},
        {"linear_value_head_dim": 8},
        {"linear_key_head_dim": 8},
        {"linear_conv_kernel_dim": 3},
        {"layer_types": ("full_attention", *["linear_attention"] * 3)},
        {"num_hidden_layers": 5, "layer_types": ("linear_attention",) * 5},
    ],
    ids=lambda change: "-".join(change),
)
def test_prompt_cache_of_another_model_is_refused(change):
    model, _ = golden("base")
    other = Model(dataclasses.replace(model.args, **change))
    cache = forward_cache(other, [1, 2, 3])
    assert_refused(
        "prompt_cache", lambda cache: generate_step([1], model, prompt_cache=cache), cache
    )
    assert greedy(other, [1], 1, prompt_cache=cache)


@pytest.mark.parametrize(
    "cache",
    [[], [None] * 4, 5, (1, 2, 3, 4), "cache"],
    ids=["empty", "none", "int", "tuple", "str"],
)
def test_prompt_cache_that_is_none_is_refused(cache):
    model, tokenizer = golden("base")[0], bundled()[1]
    with pytest.raises(ValueError, match="prompt_cache"):
        generate_step([1], model, prompt_cache=cache)
    with pytest.raises(ValueError, match="prompt_cache"):
        stream_generate(model, tokenizer, [1], prompt_cache=cache)


@pytest.mark.parametrize("layers", [slice(0, 4), slice(0, 1), slice(3, 4)], ids=str)
def test_prompt_cache_of_a_batch_is_refused(layers):
    model, _ = golden("base")
    cache, batch = forward_cache(model, [1, 2, 3]), model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3], [4, 5, 6]]), batch))
    cache[layers] = batch[layers]
    with pytest.raises(ValueError, match="prompt_cache"):
        generate_step([1], model, prompt_cache=cache)
