"""Speculation changes no token, and rounds leave the caches that plain decoding leaves."""

import copy
import functools
import itertools
import random
from types import SimpleNamespace

import mlx.core as mx
import pytest
from float64 import relative_error
from helpers_generate import (
    GOLDENS,
    bundled,
    forward_cache,
    golden,
    golden_tokens,
    greedy,
    tokens_of,
)
from mlx_lm import batch_generate
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import greedy_sampler, make_sampler

from mlx_qwen3next import generate_step, load_model, mtp, speculative
from mlx_qwen3next.cache import GatedDeltaCache, tokens_held
from mlx_qwen3next.depth import MAX_DEPTH, FixedDepth, MeasuredDepth
from mlx_qwen3next.sampling import Chooser
from mlx_qwen3next.speculative import Acceptance, Decoding

CASES = ["base", "eps", "dense", "permutation"]
DEPTHS = range(1, MAX_DEPTH + 1)
NOISE = 1e-4  # relative, between two right ways to compute the same in float32


class Script:
    """A drafter whose rounds are right up to given depths."""

    def __init__(self, truth, rights):
        self.truth, self.rights, self.at = truth, iter(rights), 0

    def propose(self, token, depth, choose):
        right = next(self.rights, 0)
        ahead = self.truth[self.at : self.at + depth]
        drafts = [t if i < right else (t + 1) % 96 for i, t in enumerate(ahead)]
        return [mx.array([t], mx.uint32) for t in drafts]

    def committed(self, tokens, hidden):
        assert hidden.shape[:2] == (1, tokens.size)
        self.at += tokens.size

    def rest(self):
        pass


class Cycle:
    """Depths in turns: plain steps and rounds follow each other in every order."""

    idle = False

    def __init__(self, *depths):
        self.depths = itertools.cycle(depths)

    def choose(self, room):
        return min(next(self.depths), room)

    def record(self, depth, accepted, seconds):
        pass


def decoding(model, prompt, cache, depth, drafter):
    """The greedy decoding of a prompt, of which the cache already holds all but the last token."""
    last = mx.array(prompt[-1:], mx.uint32)
    return Decoding(model, cache, last, Chooser(greedy_sampler, [], last), depth, drafter)


# --- the same tokens ----------------------------------------------------------------------------
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_goldens(case, depth):
    prompt, expected = golden_tokens(case)
    steps = list(generate_step(prompt, golden(case)[0], max_tokens=len(expected), mtp=depth))
    assert tokens_of(steps) == expected
    assert any(step.drafted == depth for step in steps)


def test_drafts_are_accepted_and_refused():
    """The head of `permutation` is often right, but not always: both are put to the test here."""
    prompt, expected = golden_tokens("permutation")
    steps = generate_step(prompt, golden("permutation")[0], max_tokens=len(expected), mtp=4)
    accepted = [step.from_draft for step in steps if step.drafted]
    assert 0.3 < sum(accepted) / len(accepted) < 0.95


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_tokens_of_the_demo_model(depth):
    model, tokenizer = bundled()
    for text in ("<|endoftext|>import os\n", "def merge(left, right):\n", "class Queue"):
        prompt = tokenizer.encode(text)
        assert greedy(model, prompt, 48, mtp=depth) == greedy(model, prompt, 48, mtp="off")


@pytest.mark.parametrize("depths", [(0, 2), (3, 0, 0, 1), (0, 0, 8, 8)], ids=str)
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_plain_steps_and_rounds_in_turns(case, depths):
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    cache, head = forward_cache(model, prompt[:-1]), model.mtp.make_cache()
    drafter = model.make_draft_model(head)
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


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_a_seed_gives_the_same_samples_with_and_without_speculation(case, options, depth):
    model, (prompt, _) = golden(case)[0], golden_tokens(case)

    def sample(mtp):
        mx.random.seed(7)
        steps = list(generate_step(prompt, model, max_tokens=30, mtp=mtp, **options))
        return tokens_of(steps), mx.random.uniform().item(), steps

    plain, drafted = sample("off"), sample(depth)
    assert plain[:2] == drafted[:2]
    assert any(step.drafted for step in drafted[2])
    for a, b in zip(plain[2], drafted[2], strict=True):
        p, q = mx.exp(a.logprobs), mx.exp(b.logprobs)
        assert mx.abs(p - q).max().item() < NOISE


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


# --- what is accepted ---------------------------------------------------------------------------
def simulated(model, prompt, n):
    """Greedy tokens after a prompt and, for each position, MAX_DEPTH drafts of what follows it: by
    plain steps, and recursion on copies of the head's cache."""
    cache, head = model.make_cache(), model.mtp.make_cache()
    tokens, drafts, hidden = list(prompt), {}, None
    while len(drafts) < n:
        at = len(drafts)
        if at < len(prompt) - 1:  # the prompt's drafts are of no interest
            drafts[at] = []
        if hidden is not None:
            m = model.mtp(hidden, mx.array([[tokens[at]]]), head)
            provisional, guesses = [copy.copy(head[0])], []
            while at >= len(prompt) - 1 and len(guesses) < MAX_DEPTH:
                guesses.append(model.logits(m).argmax().item())
                m = model.mtp(m, mx.array([[guesses[-1]]]), provisional)
            drafts[at] = guesses
        else:
            drafts[at] = []
        hidden = model.model(mx.array([[tokens[at]]]), cache)
        if at == len(tokens) - 1:
            tokens.append(model.logits(hidden).argmax().item())
    return tokens, drafts


@functools.cache
def simulation(case):
    if case == "demo":
        model, tokenizer = bundled()
        prompt = tokenizer.encode("<|endoftext|>import os\nimport sys\n\n\ndef main(")
    else:
        model, (prompt, _) = golden(case)[0], golden_tokens(case)
    return model, prompt, *simulated(model, prompt, len(prompt) + 40)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("case", ["base", "permutation", "demo"])
def test_accept_counts_are_those_of_a_simulation(case, depth):
    model, prompt, tokens, drafts = simulation(case)
    expected, at, room = [], len(prompt) - 1, 24
    while room:
        guesses = drafts[at][: min(depth, room - 1)]
        pairs = zip(guesses, tokens[at + 1 :], strict=False)
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        expected.append((len(guesses), right))
        at, room = at + right + 1, room - right - 1
    counts, right = [], 0
    for step in generate_step(prompt, model, max_tokens=24, mtp=depth):
        right += step.from_draft
        if not step.from_draft:
            counts.append((step.drafted, right))
            right = 0
    assert counts == expected


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


# --- the cache ----------------------------------------------------------------------------------
@functools.cache
def stepped(case, n):
    """The trunk's cache after n tokens of the greedy text, one by one."""
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    cache = forward_cache(model, prompt[:-1])
    for token in (prompt + expected)[len(prompt) - 1 : n]:
        model.model(mx.array([[token]]), cache)
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
    """Whatever is accepted, in whatever order."""
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
    """Within accepted drafts, after the last of them, after the trunk's own token."""
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    for n in range(1, 10):
        cache = model.make_cache() + model.mtp.make_cache()
        steps = generate_step(prompt, model, max_tokens=20, mtp=mtp, prompt_cache=cache)
        tokens = [next(steps) for _ in range(n)]
        steps.close()
        assert tokens_of(tokens) == expected[:n]
        assert tokens_held(cache[:-1]) == len(prompt) + n
        assert_plain(cache[:-1], case, len(prompt) + n, 1e-5)
        assert_head(model, cache[-1], prompt + expected[:n])
        rest = generate_step([expected[n]], model, max_tokens=5, mtp=mtp, prompt_cache=cache)
        assert tokens_of(rest) == expected[n + 1 : n + 6]


def assert_head(model, entry, tokens):
    """The head's cache is that of one call over all pairs of hidden states and next tokens."""
    hidden, expected = model.model(mx.array([tokens])), model.mtp.make_cache()
    model.mtp(hidden[:, :-1], mx.array([tokens[1:]]), expected)
    assert entry.offset == len(tokens) - 1
    pairs = zip(entry.keys_and_values(), expected[0].keys_and_values(), strict=True)
    for x, y in [*pairs, (entry.hidden, hidden[:, -1:])]:
        assert x.shape == y.shape
        assert relative_error(x, y) <= NOISE


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
    monkeypatch.setattr(model.mtp, "depth", Cycle(*depths))
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
    """Whole steps stay, in both caches, and generation goes on from there."""
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


def test_auto_drafts_where_rounds_take_no_longer_than_steps(monkeypatch):
    """By a clock that ticks once a look."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(speculative, "time", clock)
    monkeypatch.setattr(model.mtp, "depth", MeasuredDepth())
    steps = [*generate_step(prompt, model, max_tokens=24)]
    steps += generate_step(prompt, model, max_tokens=24)
    assert tokens_of(steps) == expected[:24] * 2
    assert max(step.drafted for step in steps) >= 3
    assert not model.mtp.depth.idle


def test_auto_prepares_nothing_where_nothing_pays(monkeypatch):
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    now = itertools.count()

    class Slow(MeasuredDepth):
        def record(self, depth, accepted, seconds):
            super().record(depth, accepted, None if seconds is None else 1 + 9 * depth)

    monkeypatch.setattr(model.mtp, "depth", Slow())
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=now.__next__))
    steps = list(generate_step(prompt, model, max_tokens=24))
    assert 0 < sum(step.drafted > 0 for step in steps) <= 9
    assert model.mtp.depth.idle
    monkeypatch.setattr(model, "make_draft_model", None)  # is not called any more
    assert greedy(model, prompt, 12) == expected[:12]


def test_hidden_states_do_not_wait_without_end(monkeypatch):
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    monkeypatch.setattr(mtp, "CATCH_UP", 4)
    drafter = model.make_draft_model()
    cache = forward_cache(model, prompt[:-1])
    for step in decoding(model, prompt, cache, FixedDepth(0), drafter).tokens(20):
        assert step.token in expected
        assert sum(tokens.size for _, tokens in drafter._waiting) < 4


def test_a_random_processor_draws_alike():
    model, (prompt, _) = golden("permutation")[0], golden_tokens("permutation")

    def noise(tokens, logits):
        return logits + mx.random.normal(logits.shape)

    def sample(mtp):
        mx.random.seed(5)
        return greedy(model, prompt, 20, mtp=mtp, logits_processors=[noise])

    assert sample("off") == sample(3)


def test_a_head_s_cache_of_another_text_is_begun_anew():
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    cache = model.make_cache() + model.mtp.make_cache()
    greedy(model, prompt, 8, mtp=2, prompt_cache=cache)
    cache[:-1] = model.make_cache()
    assert greedy(model, prompt, 8, mtp=2, prompt_cache=cache) == expected[:8]
    assert_head(model, cache[-1], prompt + expected[:8])


# --- batches, memory ----------------------------------------------------------------------------
def test_a_batch_decodes_plainly_to_the_same_tokens():
    model, tokenizer = bundled()
    prompts = [tokenizer.encode(text) for text in ("import os\nimport", "class Queue:\n", "x = [")]
    single = [tokenizer.decode(greedy(model, prompt, 12, mtp=2)) for prompt in prompts]
    batch = batch_generate(model, tokenizer, prompts, max_tokens=12)
    assert batch.texts == single


@pytest.mark.parametrize("mtp", ["off", 2])
def test_memory_does_not_grow_with_the_number_of_rounds(mtp):
    """Beyond keys and values: 500 more tokens leave no graph behind."""
    prompt, _ = golden_tokens("base")
    model = load_model(GOLDENS / "base", dtype=mx.float32)
    cache = model.make_cache() + model.mtp.make_cache()
    used, arrays_held = [], []
    steps = generate_step(prompt, model, max_tokens=800, mtp=mtp, prompt_cache=cache)
    for n, step in enumerate(steps, start=1):
        del step
        if n in (200, 700):
            held = sum(c.nbytes for c in cache)
            used.append(mx.get_active_memory() - held)
            arrays_held.append(held)
    assert arrays_held[1] > arrays_held[0]
    assert used[1] - used[0] < 100_000
