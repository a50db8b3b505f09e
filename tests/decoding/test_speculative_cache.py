"""Rounds leave the caches that plain decoding leaves, whatever comes between."""

import copy
import functools
import itertools
import random

import mlx.core as mx
import pytest
from float64 import relative_error
from helpers_caches import assert_head
from helpers_generate import (
    forward_cache,
    golden,
    golden_tokens,
    greedy,
    tokens_of,
)
from helpers_speculative import Cycle, Script, decoding
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, save_prompt_cache

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.drafters import mtp as mtp_drafter
from mlx_qwen3next.decoding.drafters.speculation import Speculation
from mlx_qwen3next.decoding.speculative import Decoding
from mlx_qwen3next.model.cache import GatedDeltaCache, tokens_held


@functools.cache
def stepped(case, n):
    """The trunk's cache after n tokens of the greedy text, one by one."""
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    if n < len(prompt):
        return forward_cache(model, prompt[:n])
    cache = copy.deepcopy(stepped(case, n - 1))
    mx.eval(model.model(mx.array([[(prompt + expected)[n - 1]]]), cache))
    return cache


def assert_plain(cache, case, n, bound=1e-6):
    """The cache is that of plain steps over the first n tokens."""
    for entry, other in zip(cache, stepped(case, n), strict=True):
        if isinstance(entry, GatedDeltaCache):
            pairs = zip(entry.state[0], other.state[0], strict=True)
        else:
            pairs = zip(entry.keys_and_values(), other.keys_and_values(), strict=True)
        for x, y in pairs:
            assert x.shape == y.shape
            assert relative_error(x, y) <= bound


ORDERS = [
    *itertools.permutations(range(4)),
    *[tuple(random.Random(seed).choices(range(4), k=6)) for seed in range(10)],
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_rounds_leave_the_cache_of_plain_steps(order):
    """The caches are right after any accepted counts in any order."""
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = forward_cache(model, prompt[:-1])
    n = sum(order) + len(order)
    script = Script(expected, order)
    steps = decoding(model, prompt, cache, FixedDepth(3), script).tokens(n + 4)
    tokens = [next(steps) for _ in range(n)]
    steps.close()
    assert tokens_of(tokens) == expected[:n]
    assert [t.from_draft for t in tokens] == [x for a in order for x in [True] * a + [False]]
    assert_plain(cache, "base", len(prompt) + n)


@pytest.mark.parametrize("mtp", ["off", 1, 3, 8])
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_stopping_anywhere(case, mtp):
    """Within accepted drafts, after the last of them, after the trunk's own token.

    The head of `base` is always wrong: one round is as the other.
    """
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    for n in range(1, 4 if mtp == "off" or case == "base" else 8):
        cache = model.make_cache() + model.mtp.make_cache()
        steps = generate_step(prompt, model, max_tokens=20, mtp=mtp, prompt_cache=cache)
        tokens = [next(steps) for _ in range(n)]
        steps.close()
        assert tokens_of(tokens) == expected[:n]
        assert tokens_held(cache[:-1]) == len(prompt) + n
        assert_plain(cache[:-1], case, len(prompt) + n, 1e-5)
        assert_head(model, cache[-1], prompt + expected[:n])
        rest = generate_step([expected[n]], model, max_tokens=3, mtp=mtp, prompt_cache=cache)
        assert tokens_of(rest) == expected[n + 1 : n + 4]


@pytest.mark.parametrize("step", [1, 3, 4, 2048])
@pytest.mark.parametrize("mtp", ["off", "auto", 2])
def test_the_head_reads_the_whole_prompt(step, mtp):
    """In chunks, too, each chunk's last state with the token that begins the next."""
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = model.make_cache() + model.mtp.make_cache()
    options = {"mtp": mtp, "prompt_cache": cache, "prefill_step_size": step}
    assert greedy(model, prompt, 2, **options) == expected[:2]
    assert_head(model, cache[-1], prompt + expected[:2])


def test_a_conversation_goes_on_with_the_head_s_cache(tmp_path):
    """Also from a file: the drafts are those of an uninterrupted run."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")

    def drafted(steps):
        return [(step.token, step.from_draft) for step in steps]

    text = prompt + expected[:6]
    whole = drafted(generate_step(text, model, max_tokens=16, mtp=3))
    cache = model.make_cache() + model.mtp.make_cache()
    greedy(model, prompt, 5, mtp=3, prompt_cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    for entries in (cache, loaded):
        steps = generate_step([expected[5]], model, max_tokens=16, mtp=3, prompt_cache=entries)
        assert drafted(steps) == whole
    # Without the head's part the tokens are the same, and drafts begin anew.
    cache = model.make_cache()
    greedy(model, prompt, 5, mtp=3, prompt_cache=cache)
    steps = generate_step([expected[5]], model, max_tokens=16, mtp=3, prompt_cache=cache)
    assert [t for t, _ in drafted(steps)] == [t for t, _ in whole]


class Interrupt:
    """Makes a layer raise at its n-th call."""

    def __init__(self, layer, n, error=KeyboardInterrupt):
        self.layer, self.original = layer, layer.__class__
        calls = itertools.count(1)

        class Fails(layer.__class__):
            def __call__(self, *args):
                if next(calls) == n:
                    raise error
                return super().__call__(*args)

        self.fails = Fails

    def __enter__(self):
        self.layer.__class__ = self.fails

    def __exit__(self, *_):
        self.layer.__class__ = self.original


@pytest.mark.parametrize("depths", [(0,), (2,), (0, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("where", [0, 1, "head"])
def test_an_interrupt_within_a_forward(monkeypatch, where, depths):
    """Whichever layer of whichever forward it is, both caches hold what was yielded, all of it."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    monkeypatch.setattr(Speculation.of(model), "measured", Cycle(*depths))
    layer = model.mtp.layers[0] if where == "head" else model.layers[where]
    interrupted = 0
    for n in range(1, 9):
        cache = model.make_cache() + model.mtp.make_cache()
        steps = generate_step(prompt, model, max_tokens=12, prompt_cache=cache)
        tokens = [next(steps).token]
        with Interrupt(layer, n):
            try:
                for step in steps:
                    tokens.append(step.token)
            except KeyboardInterrupt:
                interrupted += 1
        assert tokens == expected[: len(tokens)]
        assert_plain(cache[:-1], "permutation", len(prompt) + len(tokens), 1e-5)
        assert_head(model, cache[-1], prompt + tokens)
    assert interrupted >= (1 if where == "head" and depths == (0,) else 6)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("mtp", ["off", 2])
def test_an_interrupt_while_waiting_for_the_device(monkeypatch, mtp, n):
    """That is when most come: the next plain step is on its way, or a round not yet judged."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    calls, record = itertools.count(1), Decoding._record

    def interrupted(*args, **options):
        if next(calls) == n:
            raise KeyboardInterrupt
        record(*args, **options)

    monkeypatch.setattr(Decoding, "_record", interrupted)
    cache = model.make_cache() + model.mtp.make_cache()
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        for step in generate_step(prompt, model, max_tokens=20, mtp=mtp, prompt_cache=cache):
            tokens.append(step.token)
    assert tokens == expected[: len(tokens)]
    assert_plain(cache[:-1], "permutation", len(prompt) + len(tokens), 1e-5)
    assert_head(model, cache[-1], prompt + tokens)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("mtp", ["off", 2])
def test_an_interrupt_within_the_prompt(mtp, n):
    """Both caches keep whole steps, and generation continues from them."""
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = model.make_cache() + model.mtp.make_cache()

    def progress(done, total):
        if done >= 2 * (n - 1) and (n < 5 or done == total):
            raise KeyboardInterrupt

    options = {"mtp": mtp, "prompt_cache": cache}
    with pytest.raises(KeyboardInterrupt):
        greedy(model, prompt, 1, prefill_step_size=2, prompt_progress_callback=progress, **options)
    held = tokens_held(cache[:-1])
    assert held == (2 * (n - 1) if n < 5 else 9)
    if held:
        assert_head(model, cache[-1], prompt[:held])
    assert greedy(model, prompt[held:], 12, **options) == expected[:12]


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_failing_processor(mtp, n):
    """At whichever call it fails, drafts included."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    calls = itertools.count(1)

    def processor(tokens, logits):
        if next(calls) == n:
            raise RuntimeError("lost")
        return logits

    cache = model.make_cache()
    steps = generate_step(prompt, model, mtp=mtp, prompt_cache=cache, logits_processors=[processor])
    tokens = []
    with pytest.raises(RuntimeError, match="lost"):
        for step in steps:
            tokens.append(step.token)
    assert tokens == expected[: len(tokens)]
    assert_plain(cache, "permutation", len(prompt) + len(tokens), 1e-5)


def test_quantized_keys_roll_back_as_well():
    model, (prompt, _) = golden("base")[0], golden_tokens("base")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}
    plain, drafted = model.make_cache(), model.make_cache()
    tokens = greedy(model, prompt, 30, mtp="off", prompt_cache=plain, **options)
    steps = generate_step(prompt, model, max_tokens=30, mtp=3, prompt_cache=drafted, **options)
    for step, token in zip(itertools.islice(steps, 20), tokens, strict=False):
        assert step.token == token
    assert any(isinstance(entry, QuantizedKVCache) for entry in drafted)  # while rounds go on
    assert tokens_of(steps) == tokens[20:]
    for a, b in zip(plain, drafted, strict=True):
        assert type(a) is type(b)
        if isinstance(a, QuantizedKVCache):
            assert a.offset == b.offset == len(prompt) + 30
            for x, y in zip(a.keys_and_values(), b.keys_and_values(), strict=True):
                assert relative_error(*(mx.dequantize(*z, 32, 8) for z in (x, y))) < 0.01


def test_hidden_states_do_not_wait_without_end(monkeypatch):
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    monkeypatch.setattr(mtp_drafter, "CATCH_UP", 4)
    drafter = Speculation.of(model).drafter()
    cache = forward_cache(model, prompt[:-1])
    for step in decoding(model, prompt, cache, FixedDepth(0), drafter).tokens(20):
        assert step.token in expected
        assert sum(tokens.size for _, tokens in drafter._waiting) < 4


def test_a_head_s_cache_of_another_text_is_begun_anew():
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = model.make_cache() + model.mtp.make_cache()
    greedy(model, prompt, 8, mtp=2, prompt_cache=cache)
    cache[:-1] = model.make_cache()
    assert greedy(model, prompt, 8, mtp=2, prompt_cache=cache) == expected[:8]
    assert_head(model, cache[-1], prompt + expected[:8])
