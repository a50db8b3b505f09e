"""Copied drafts, alone and with the head's, change no token and leave the right caches."""

import functools
import itertools

import mlx.core as mx
import pytest
from helpers_caches import assert_holds
from helpers_generate import (
    bundled,
    forward_cache,
    golden,
    golden_tokens,
    greedy,
    narrow,
    tokens_of,
)
from helpers_speculative import decoding
from speculation import rounds, simulated
from test_lookup import places

from mlx_qwen3next import generate_step, load_model, stream_generate
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.decoding import speculative
from mlx_qwen3next.decoding.draft_depth import MOST_COPIED, FixedDepth
from mlx_qwen3next.decoding.drafters.lookup import LookupDrafter
from mlx_qwen3next.decoding.drafters.speculation import Speculation, check_lookup
from mlx_qwen3next.decoding.generation import statistics
from mlx_qwen3next.decoding.speculative import Acceptance
from mlx_qwen3next.prompt_cache.store import PromptCache

TOKENS = 32
HEAD = 2  # drafts of the head where nothing is copied
DEPTHS = range(1, MOST_COPIED + 1)


@functools.cache
def simulation(case):
    """(model, prompt, text, the prompt and its greedy continuation, the head's drafts)."""
    if case == "narrow":
        model, tokenizer = narrow()
        prompt = tokenizer.encode("<|endoftext|>import os\nimport sys\n\n\ndef main(")
    else:
        model, (prompt, _) = golden(case)[0], golden_tokens(case)
    tokens, drafts = simulated(model, prompt, len(prompt) + TOKENS)
    return model, prompt, tokens, drafts


def known(case):
    """The text before the prompt, as it were: prompt and answer, with some of it changed."""
    _, prompt, tokens, _ = simulation(case)
    changed = {len(prompt) + i for i in (2, 3, 7, 11)}
    return [(t + 1) % 96 if i in changed else t for i, t in enumerate(tokens)]


def expected_rounds(case, depth, head):
    """The rounds (source, drafted, accepted) by copying as in the definition, else by the head."""
    _, prompt, tokens, drafts = simulation(case)
    before = known(case)
    text, result, at = before + tokens, [], len(prompt) - 1
    where = places(text, len(before) + len(prompt))
    room, was_plain = TOKENS, False
    while room:
        end, most = len(before) + at + 1, room - 1
        place, source, guesses = where[end], None, []
        # A plain step that follows another is on its way before the token between them is known.
        if was_plain and not head and where[end - 1] is None:
            place = None
        if place is not None and most:
            source, ahead = "lookup", text[:end]
            for _ in range(min(depth, most)):
                ahead.append(ahead[place + len(ahead) - end])
            guesses = ahead[end:]
        elif head and most:
            source, guesses = "mtp", drafts[at][: min(head, most)]
        right = [a == b for a, b in zip(guesses, tokens[at + 1 :], strict=False)]
        accepted = [*right, False].index(False)
        result.append((source, len(guesses), accepted))
        at, room, was_plain = at + accepted + 1, room - accepted - 1, source is None
    return result


class Chain:
    """The decoding of a golden or of the narrow model, by copies and by the head."""

    def __init__(self, case, depth, head):
        self.model, prompt, self.expected, _ = simulation(case)
        self.prompt = prompt
        speculation = Speculation.of(self.model)
        self.cache, self.head = forward_cache(self.model, prompt[:-1]), self.model.mtp.make_cache()
        mtp, copying = speculation.drafter(self.head), speculation.drafters(FixedDepth(0, 1), [])[0]
        copying.follow([*known(case), *prompt])
        ids = mx.array(prompt[:-1], mx.uint32)
        mtp.committed(ids, self.model.model(ids[None]))
        depths = FixedDepth(head, depth)
        self.decoding = decoding(self.model, prompt, self.cache, depths, copying, mtp)

    def check(self, tokens):
        """The caches hold the prompt and exactly these tokens, all of them expected ones."""
        text = self.prompt + tokens
        assert text == self.expected[: len(text)]
        assert_holds(self.model, self.cache + self.head, text)


# --- the same tokens, the same drafts -----------------------------------------------------------
@pytest.mark.parametrize(
    "case, depth, head",
    [
        *itertools.product(["permutation"], DEPTHS[::2], [0, HEAD]),
        *itertools.product(["base"], DEPTHS[::4], [HEAD]),
        *[("narrow", 7, 0), ("narrow", 15, HEAD)],
    ],
)
def test_rounds_are_those_of_a_simulation(case, depth, head):
    chain = Chain(case, depth, head)
    steps = list(chain.decoding.tokens(TOKENS))
    chain.check(tokens_of(steps))
    sources = [step.source for step in steps if not step.from_draft]
    got = [(source, *counts) for source, counts in zip(sources, rounds(steps), strict=True)]
    assert got == expected_rounds(case, depth, head)
    assert "lookup" in sources and (not head or "mtp" in sources)
    assert max(accepted for source, _, accepted in got if source == "lookup") == depth


SAMPLING = [
    {"temp": 0.7},
    {"temp": 1.5, "top_k": 20},
    {"temp": 0.9, "top_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temp": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.2, "logit_bias": {3: 1.0}},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("mtp", ["off", 2])
def test_a_seed_gives_the_same_samples(mtp, options):
    model, (prompt, _) = golden("permutation")[0], golden_tokens("permutation")

    def sample(**speculation):
        mx.random.seed(7)
        steps = list(generate_step(prompt * 6, model, max_tokens=20, **speculation, **options))
        return tokens_of(steps), mx.random.uniform().item(), {step.source for step in steps}

    *plain, none = sample(mtp="off")
    for lookup in (3, 15):
        *drafted, sources = sample(mtp=mtp, lookup=lookup)
        assert drafted == plain
        assert none == {None} and "lookup" in sources
        assert sources == {"lookup", None} if mtp == "off" else {"lookup", "mtp"} <= sources


def test_with_a_processor_of_ones_own_nothing_is_copied_by_itself():
    """Some follow the text from call to call, and would take drafts for it."""
    model, (prompt, _) = golden("permutation")[0], golden_tokens("permutation")
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    text = prompt * 6
    plain = greedy(model, text, 20, mtp="off")
    for lookup in ("auto", 7):
        seen.clear()
        options = {"mtp": "off", "lookup": lookup, "logits_processors": [processor]}
        assert greedy(model, text, 20, **options) == plain
        right = [tokens == (text + plain)[: len(tokens)] for tokens in seen]
        assert all(right) == (lookup == "auto")


def test_offers_are_asked_for_before_the_token_that_is_on_its_way_is_known():
    """So that plain steps stay queued one after the other."""
    model, prompt, _, _ = simulation("permutation")
    asked = []

    class Silent(LookupDrafter):
        def offer(self, ahead=False):
            asked.append(ahead)
            return super().offer(ahead)._replace(shares=[])

    cache = forward_cache(model, prompt[:-1])
    list(decoding(model, prompt, cache, FixedDepth(0), Silent()).tokens(5))
    assert asked == [False, True, True, True, True]


# --- however it ends ----------------------------------------------------------------------------
def test_stopping_anywhere():
    for n in range(1, 20):
        chain = Chain("permutation", 6, HEAD)
        steps = chain.decoding.tokens(TOKENS)
        tokens = [next(steps).token for _ in range(n)]
        steps.close()
        chain.check(tokens)


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_within_any_forward(monkeypatch, before):
    """Before anything of it is built, or after its layers have advanced."""
    forward = speculative.forward
    for n in range(1, 12):
        chain, calls, tokens = Chain("permutation", 6, HEAD), itertools.count(1), []

        def interrupted(*args, calls=calls, n=n):
            last = next(calls) == n
            if last and before:
                raise KeyboardInterrupt
            hidden = forward(*args)
            if last:
                raise KeyboardInterrupt
            return hidden

        monkeypatch.setattr(speculative, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for step in chain.decoding.tokens(TOKENS):
                tokens.append(step.token)
        monkeypatch.undo()
        chain.check(tokens)


def test_the_head_goes_on_from_copied_tokens():
    """Its drafts after a copied run are those of a sequence without copies."""
    expected = expected_rounds("permutation", 15, HEAD)
    after = [b for a, b in itertools.pairwise(expected) if (a[0], b[0]) == ("lookup", "mtp")]
    assert any(accepted for _, _, accepted in after)


# --- what is told of it --------------------------------------------------------------------------
def test_drafts_are_counted_by_their_source():
    counted = Acceptance()
    for step in Chain("permutation", 6, HEAD).decoding.tokens(TOKENS):
        counted.add(step)
    expected = expected_rounds("permutation", 6, HEAD)
    for counts, column in [(counted.drafted, 1), (counted.accepted, 2)]:
        for source in ("lookup", "mtp"):
            assert counts[source] == sum(row[column] for row in expected if row[0] == source)
    assert counted.rounds == len(expected)
    assert len(counted.by_depth) == 6


def test_closing_lines_name_the_sources():
    model, tokenizer = bundled()
    prompt = "a = [1, 2, 3, 4, 5, 6, 7, 8]\n" * 3
    options = {"max_tokens": 20, "mtp": "off", "lookup": 7}
    *_, last = stream_generate(model, tokenizer, prompt, **options)
    accepted, drafted = last.accepted["lookup"], last.drafted["lookup"]
    assert last.drafted.keys() == {"lookup"} and 0 < accepted <= drafted
    line = statistics(last).splitlines()[-1]
    assert line.startswith(f"Speculation: {last.rounds} rounds, ")
    assert line.endswith(f"; drafts accepted: copied {accepted} of {drafted}")


# --- which models, which texts ------------------------------------------------------------------
@functools.cache
def headless():
    model = load_model(BUNDLED, dtype=mx.float32)
    model.mtp = None
    return model


def test_a_model_without_a_head():
    _, tokenizer = bundled()
    prompt = tokenizer.encode("a = [1, 2, 3, 4, 5, 6, 7, 8]\n" * 3)
    plain = greedy(headless(), prompt, 16, mtp="off")
    steps = list(generate_step(prompt, headless(), max_tokens=16, lookup=7))
    assert tokens_of(steps) == plain
    assert any(step.from_draft and step.source == "lookup" for step in steps)
    tokens = [tokens_of(generate_step(prompt, headless(), max_tokens=16)) for _ in range(2)]
    assert tokens == [plain] * 2
    with pytest.raises(ValueError, match="no MTP head"):
        generate_step(prompt, headless(), mtp=2, lookup=3)


@pytest.mark.parametrize("step", [1, 5, 2048])
def test_the_whole_prompt_is_looked_at(step):
    """In whatever pieces it is read, and what was known of it before as well."""
    model, tokenizer = narrow()
    prompt = tokenizer.encode("alpha = beta + gamma(delta)\n" * 2)
    store = PromptCache(max_bytes=10**9)
    options = {"max_tokens": 12, "mtp": "off", "lookup": 5, "prefill_step_size": step}
    first, again, whole = (
        list(generate_step(prompt, model, **options, **cache))
        for cache in ({"prompt_cache": store}, {"prompt_cache": store}, {})
    )
    assert rounds(first) == rounds(again) == rounds(whole)
    assert tokens_of(first) == tokens_of(again) == greedy(model, prompt, 12, mtp="off")
    assert whole[0].drafted == 5


# --- what is asked for --------------------------------------------------------------------------
def test_which_values_are_taken():
    assert check_lookup(None, "auto") == "auto"
    assert all(check_lookup(x, "auto") == x for x in ("auto", "off", 1, MOST_COPIED))
    assert [check_lookup(None, mtp) for mtp in ("off", 3)] == ["off", "off"]
    assert check_lookup("auto", "off") == "auto"
    for wrong in (0, 16, True, "on", 2.0):
        with pytest.raises(ValueError, match="lookup must be 'auto', 'off' or 1 to 15, got"):
            check_lookup(wrong, "auto")
    with pytest.raises(ValueError, match="compares with plain steps"):
        check_lookup("auto", 3)
