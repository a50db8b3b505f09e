"""The tree of checkpoints: what comes back is what was kept, and what is dropped is worth least."""

import random
import threading

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import bundled, forward_cache, golden, golden_tokens, greedy
from helpers_prompt_cache import ENOUGH, WIDTH, fake, kv_entry, rows, same, texts
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_qwen3next import generate_step
from mlx_qwen3next.model.cache import GatedDeltaCache, MTPCache, Round
from mlx_qwen3next.prompt_cache.pieces import Piece, assemble, take_apart
from mlx_qwen3next.prompt_cache.store import PromptCache


def cache_of(*inserted, max_bytes=ENOUGH, **options):
    cache = PromptCache(max_bytes=max_bytes, **options)
    for text in inserted:
        cache.insert(text, fake(text))
    return cache


def random_text(of, known):
    """A text that often continues or varies a known one, so that texts share and diverge."""
    start = list(of.choice(known))[: of.randrange(12)] if known and of.random() < 0.8 else []
    return tuple(start + of.choices(range(3), k=of.randrange(1, 7)))


# --- what comes back -----------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_the_longest_known_beginning_comes_back(seed):
    """Against a plain dictionary of all texts."""
    of = random.Random(seed)
    cache, known = PromptCache(max_bytes=ENOUGH), {}  # text -> whether the head is known
    for _ in range(60):
        text, head = random_text(of, [*known]), of.random() < 0.5
        cache.insert(text, fake(text, head))
        known[text] = known.get(text, False) or (head and len(text) > 1)
        assert texts(cache) == known.keys()
        for _ in range(3):
            prompt = random_text(of, [*known])
            held = max((n for n in range(len(prompt)) if prompt[:n] in known), default=0)
            fetched, n = cache.fetch(prompt)
            assert n == held
            if held:
                assert same(fetched, fake(prompt[:held], known[prompt[:held]]))
            else:
                assert fetched is None


@pytest.mark.parametrize("sequences", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_dropped_the_rest_is_right(seed, sequences):
    of = random.Random(seed)
    budget = 8 * fakes_bytes([1, 2, 3])
    cache = PromptCache(max_bytes=budget, max_sequences=sequences)
    inserted, fetches = [], 0
    for _ in range(150):
        text = random_text(of, inserted)
        inserted.append(text)
        cache.insert(text, fake(text, head=of.random() < 0.5))
        if of.random() < 0.1:
            cache.trim(budget // 2)
            assert cache.nbytes <= budget // 2
        kept = texts(cache)
        assert cache.nbytes <= budget and kept <= {*inserted}
        leaves = [t for t in kept if not any(u[: len(t)] == t and u != t for u in kept)]
        assert sequences is None or len(leaves) <= sequences
        prompt = random_text(of, inserted)
        fetched, n = cache.fetch(prompt)
        assert n == max((n for n in range(len(prompt)) if prompt[:n] in kept), default=0)
        if fetched:
            fetches += 1
            assert same(fetched[:3], fake(prompt[:n]))
            assert len(fetched) == 3 or same(fetched, fake(prompt[:n], head=True))
    assert fetches > 15 and len(cache) > 1
    cache.clear()
    assert texts(cache) == set() and cache.nbytes == 0 and cache.fetch([0, 1]) == (None, 0)


def fakes_bytes(text):
    return cache_of(text).nbytes


def test_a_prompt_that_is_known_whole_leaves_a_token_to_process():
    cache = cache_of([1, 2], [1, 2, 3, 4])
    assert cache.fetch([1, 2, 3, 4])[1] == 2
    assert cache.fetch([1, 2, 3, 4, 5])[1] == 4
    assert cache.fetch([1, 2]) == (None, 0)
    assert cache.fetch([1]) == cache.fetch([]) == (None, 0)


def test_where_texts_diverge_there_is_no_checkpoint():
    cache = cache_of([1, 2, 3, 4], [1, 2, 5])
    assert texts(cache) == {(1, 2, 3, 4), (1, 2, 5)}
    assert cache.fetch([1, 2, 6]) == (None, 0)
    cache.insert([1, 2], fake([1, 2]))
    assert cache.fetch([1, 2, 6])[1] == 2


def test_shared_text_is_kept_once():
    alone = fakes_bytes(range(100))
    cache = cache_of(range(100), [*range(99), 7])
    assert alone < cache.nbytes < 1.1 * alone
    before = cache.nbytes
    cache.insert(range(100), fake(range(100)))
    assert cache.nbytes == before and len(cache) == 2


def test_a_checkpoint_more_costs_no_more_the_more_there_are(monkeypatch):
    """Arrays are cut for the node that is new, or lacks something; sizes are not added up again."""
    calls = []

    def spy(name, real):
        return lambda *args: calls.append(name) or real(*args)

    monkeypatch.setattr(Piece, "part", spy("part", Piece.part))
    monkeypatch.setattr(Piece, "nbytes", property(spy("nbytes", Piece.nbytes.fget)))
    cache = cache_of(*(range(n) for n in range(2, 40)))
    calls.clear()
    cache.insert(range(50), fake(range(50)))
    assert calls == ["part", "nbytes"]
    cache.insert(range(50), fake(range(50)))
    assert calls == ["part", "nbytes"]
    cache.insert(range(50), fake(range(50), head=True))
    assert calls.count("part") == 1 + len(cache)
    calls.clear()
    cache.trim(cache.nbytes // 2)
    assert calls.count("nbytes") < 39 and texts(cache)


def test_tokens_in_any_form():
    tokens = np.array([1, 2, 3], np.int64)
    cache = PromptCache(max_bytes=ENOUGH)
    cache.insert(tokens, fake([1, 2, 3]))
    tokens[:] = 9  # the caller's own
    for prompt in ([1, 2, 3, 4], np.array([1, 2, 3, 4]), mx.array([1, 2, 3, 4], mx.uint32)):
        assert cache.fetch(prompt)[1] == 3
    own = np.array([5, 6, 7], np.uint32)
    cache.insert(own, fake([5, 6, 7]))
    own[:] = 9
    assert cache.fetch([5, 6, 7, 8])[1] == 3


# --- nothing is shared ---------------------------------------------------------------------------
def advance(cache, fill):
    """Overwrites and goes on, in place, as drafting does."""
    for entry in cache:
        if isinstance(entry, GatedDeltaCache):
            for x in entry.cache:
                x[:] = fill
        else:
            entry.trim(1)
            more = mx.full((1, 2, 4, WIDTH), fill)
            entry.update_and_fetch(more, more)
            if isinstance(entry, MTPCache):
                entry.hidden[:] = fill


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_was_fetched_is_the_callers(pieces, quantized):
    cache = PromptCache(max_bytes=ENOUGH)
    for n in (3, 6)[-pieces:]:
        cache.insert(range(n), fake(range(n), True, quantized))
    for fill in (7.0, 8.0):
        fetched, n = cache.fetch(range(7))
        assert n == 6 and same(fetched, fake(range(6), True, quantized))
        advance(fetched, fill)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_was_inserted_stays_the_callers(quantized):
    cache, live = PromptCache(max_bytes=ENOUGH), fake(range(6), True, quantized)
    cache.insert(range(6), live)
    assert same(live, fake(range(6), True, quantized))
    advance(live, 7.0)
    assert same(cache.fetch(range(7))[0], fake(range(6), True, quantized))


def test_keys_end_with_the_last_token():
    """Makes the next update create new arrays, instead of copying shared ones."""
    cache = PromptCache(max_bytes=ENOUGH)
    cache.insert(range(6), fake(range(6), True))
    for entry in cache.fetch(range(7))[0]:
        if not isinstance(entry, GatedDeltaCache):
            assert entry.keys.shape[2] == entry.offset


def live_bytes():
    mx.clear_cache()
    return mx.get_active_memory()


def test_no_larger_array_is_kept_alive():
    """Neither the live cache's, nor that of a node which was split and whose rest is gone."""
    before = live_bytes()
    cache, live = PromptCache(max_bytes=ENOUGH), fake(range(1000))
    live[1] = kv_entry(rows(range(1000), 3), room=9000)
    big = mx.zeros((1, 2**18, WIDTH))
    live[0].cache[0] = big[:, -1:]  # a view, as a long prompt's last rows are
    cache.insert(range(1000), live)
    del live, big
    assert live_bytes() - before < 1.2 * cache.nbytes
    cache.insert([*range(100), 7], fake([*range(100), 7]))
    assert live_bytes() - before < 1.2 * cache.nbytes
    cache.trim(cache.nbytes // 2)
    assert texts(cache) == {(*range(100), 7)}
    assert live_bytes() - before < 1.2 * cache.nbytes


@pytest.mark.parametrize("quantized", [False, True])
def test_from_one_thread_to_another(quantized):
    """Arrays that one thread has not evaluated cannot be evaluated by another."""
    cache, results = PromptCache(max_bytes=ENOUGH), []

    def work():
        for text in ([1, 2, 3], [1, 2, 4]):
            cache.insert(text, fake(text, head=True))
        cache.insert([1, 2, 3, 4], fake([1, 2, 3, 4], True, quantized))
        results.append(cache.fetch([1, 2, 3, 4, 5])[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for fetched in (results[0], cache.fetch([1, 2, 3, 4, 5])[0]):
        assert same(fetched, fake([1, 2, 3, 4], True, quantized))


# --- quantized keys and values -------------------------------------------------------------------
def test_plain_above_quantized():
    """A cache is quantized when it has become long."""
    cache = cache_of(range(4))
    cache.insert(range(9), fake(range(9), quantized=True))
    assert same(cache.fetch(range(10))[0], fake(range(9), quantized=True))
    assert same(cache.fetch(range(5))[0], fake(range(4)))


def test_plain_takes_the_place_of_quantized():
    cache = PromptCache(max_bytes=ENOUGH)
    cache.insert(range(9), fake(range(9), quantized=True))
    cache.insert([0, 1, 2, 3, 7], fake([0, 1, 2, 3, 7]))
    assert same(cache.fetch([0, 1, 2, 3, 7, 8])[0], fake([0, 1, 2, 3, 7]))
    assert same(cache.fetch(range(10))[0], fake(range(9), quantized=True))
    texts(cache)


# --- the MTP head --------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", ["hidden", "beginning"])
def test_a_head_that_began_within_the_text_is_not_kept(missing):
    cache, live = PromptCache(max_bytes=ENOUGH), fake(range(6), head=True)
    if missing == "hidden":
        live[-1].hidden = None
    else:
        live[-1].trim(2)
    cache.insert(range(6), live)
    assert same(cache.fetch(range(7))[0], fake(range(6)))
    cache.insert(range(6), fake(range(6), head=True))  # it is made up for
    assert same(cache.fetch(range(7))[0], fake(range(6), head=True))


def test_a_head_is_filled_in_above():
    cache = cache_of(range(3), range(6))
    cache.insert(range(9), fake(range(9), head=True))
    assert same(cache.fetch(range(10))[0], fake(range(9), head=True))
    assert same(cache.fetch(range(7))[0], fake(range(6)))  # its hidden state is not known
    cache.insert([*range(9), 5], fake([*range(9), 5]))  # and goes no further than it is known
    assert len(cache.fetch([*range(9), 5, 6])[0]) == 3


def test_a_head_with_a_gap_is_not_given_back():
    last = take_apart(np.arange(6, dtype=np.uint32), fake(range(6), head=True))
    first, last = last.part(0, 3), last.part(3, 6)
    assert same(assemble([first, last]), fake(range(6), head=True))
    first.head = {}
    assert same(assemble([first, last]), fake(range(6)))


# --- what is dropped -----------------------------------------------------------------------------
def test_a_checkpoint_that_others_follow_gives_back_its_states_only():
    cache = cache_of(range(50), range(51), range(100))
    before, node = cache.nbytes, next(n for n in cache._used if n.piece.end == 51)
    states = sum(x.nbytes for x in node.piece.checkpoint.values())
    cache.trim(before - 1)
    assert texts(cache) == {tuple(range(50)), tuple(range(100))}  # 51 saves a token
    assert cache.nbytes == before - states
    assert same(cache.fetch(range(101))[0], fake(range(100)))


def test_a_leaf_gives_back_what_served_it_alone():
    cache = cache_of(range(50), [*range(30), 7])
    cache.trim(cache.nbytes - 1)
    assert texts(cache) == {(*range(30), 7)}  # it saves more for each byte that is its own
    assert cache.nbytes == fakes_bytes(range(31))
    cache.trim(cache.nbytes - 1)
    assert cache.nbytes == 0


def test_what_a_leaf_gives_back_counts_with_it():
    shared, other = range(30), range(100, 140)
    cache = cache_of([*shared, 6], [*shared, 7])
    cache.trim(cache.nbytes - 1)
    cache.insert(other, fake(other))
    assert cache.fetch([*shared, 7, 0])[1] == 31
    cache.trim(cache.nbytes - 1)
    assert texts(cache) == {tuple(other)}  # more tokens beside the same states


def test_the_clock_lets_what_is_not_used_grow_old():
    """A long text is worth more than a short one, but not for ever."""
    long, short = range(100, 200), range(10)
    budget = fakes_bytes(long) + 2 * fakes_bytes(short)
    cache = cache_of(long, max_bytes=budget)
    for i in range(3):
        cache.insert([i, *short], fake([i, *short]))
    assert tuple(long) in texts(cache) and len(cache) == 2
    for i in range(3, 60):
        cache.insert([i, *short], fake([i, *short]))
    assert tuple(long) not in texts(cache) and len(cache) > 2


def test_what_is_used_stays():
    used, other = range(100, 110), range(8)
    cache = cache_of(used, max_bytes=4 * fakes_bytes(used))
    for i in range(60):
        cache.insert([i, *other], fake([i, *other]))
        assert cache.fetch([*used, 0])[1] == 10


def test_of_equals_the_least_recently_used_goes():
    cache = cache_of([1, 1], [2, 2], [3, 3])
    cache.fetch([1, 1, 0])
    cache.insert([2, 2], fake([2, 2]))
    cache.trim(cache.nbytes - 1)
    assert texts(cache) == {(1, 1), (2, 2)}
    cache.trim(cache.nbytes - 1)
    assert texts(cache) == {(2, 2)}


def test_as_many_sequences_as_wanted():
    """The beginnings of a text do not count; a text goes with those that served it alone."""
    cache = cache_of(range(20), range(30), range(31), [7, 7], max_sequences=2)
    assert len(cache) == 4
    cache.insert([8, 8, 8], fake([8, 8, 8]))
    assert texts(cache) == {tuple(range(n)) for n in (20, 30, 31)} | {(8, 8, 8)}
    cache.insert([*range(20), 9], fake([*range(20), 9]))
    assert len([t for t in texts(cache) if len(t) >= 20]) == 4 and len(cache) == 4
    assert cache_of([1], max_sequences=0).nbytes == 0


def test_what_is_too_large_is_not_kept():
    cache = cache_of(range(50), max_bytes=fakes_bytes(range(50)) - 1)
    assert len(cache) == cache.nbytes == 0
    cache.trim(-1)


# --- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "cache", "reason"),
    [
        (range(5), fake(range(6)), "holds 6 tokens, not 5"),
        (range(7), fake(range(6)), "holds 6 tokens, not 7"),
        ([], fake(range(6)), "empty"),
        ([1], [GatedDeltaCache(), KVCache()], "empty"),
        ([1], [], "empty"),
    ],
    ids=["fewer", "more", "none", "empty", "no entries"],
)
def test_a_cache_that_does_not_hold_the_tokens_is_refused(tokens, cache, reason):
    kept = cache_of([0, 1])
    with pytest.raises(ValueError, match=reason):
        kept.insert(tokens, cache)
    assert texts(kept) == {(0, 1)}


# --- with a model --------------------------------------------------------------------------------
QUANTIZED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}


def read(model, tokens, cache=None, **options):
    """A cache of the tokens as the server makes it: prefill, and the head beside it."""
    cache = model.make_cache() + model.mtp.make_cache() if cache is None else cache
    steps = generate_step(tokens, model, max_tokens=1, prompt_cache=cache, mtp=2, **options)
    held = [*tokens, next(steps).token]
    steps.close()
    return held, cache


@pytest.mark.parametrize("options", [{}, QUANTIZED], ids=["plain", "quantized"])
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_going_on_from_a_checkpoint_says_what_a_fresh_run_says(case, options):
    """After turns, after a divergence, after a fall back; with drafts and without."""
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    kept = PromptCache(max_bytes=ENOUGH)
    held, live = read(model, prompt, **options)
    kept.insert(held, live)
    turn, live = read(model, expected[1:9], live, **options)
    kept.insert(held + turn, live)
    other, live = read(model, [*held, 5, 6, 7], **options)
    kept.insert(other, live)
    lengths = len(held), len(held + turn), len(other)
    for text, at in (
        (held + turn + expected[10:12], lengths[1]),
        (held + turn, lengths[0]),
        ([*other, 8], lengths[2]),
        ([*held, 5, 6, 1], lengths[0]),
    ):
        fresh = greedy(model, text, 7, mtp="off", **options)
        for mtp in ("off", 3):
            cache, n = kept.fetch(text)
            assert n == at and isinstance(cache[-1], MTPCache)
            assert greedy(model, text[n:], 7, mtp=mtp, prompt_cache=cache, **options) == fresh
            quantized = any(isinstance(entry, QuantizedKVCache) for entry in cache)
            assert quantized == bool(options)


def test_a_round_that_was_not_replayed_yet():
    """The tokens a round kept are in the states that are kept here."""
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    kept, live = PromptCache(max_bytes=ENOUGH), forward_cache(model, prompt)
    with Round(live, 3) as round:
        model.model(mx.array([expected[:3]]), live)
        round.commit(2)
    kept.insert(prompt + expected[:2], live)
    cache, n = kept.fetch(prompt + expected[:3])
    assert n == len(prompt) + 2
    assert greedy(model, expected[2:3], 8, prompt_cache=cache) == expected[3:11]


def test_the_head_goes_on_as_if_it_had_not_stopped():
    """With the demo model, whose head is trained: as many drafts are right as without a stop."""
    model, tokenizer = bundled()
    text = tokenizer.encode("def copyfile(src, dst, *, follow_symlinks=True):\n")
    kept = PromptCache(max_bytes=ENOUGH)
    held, live = read(model, text[:-3])
    kept.insert(held, live)
    drafts = {}
    for name, cache in (("kept", kept.fetch(held + text[-2:])[0]), ("live", live)):
        steps = generate_step(text[-2:], model, max_tokens=40, mtp=3, prompt_cache=cache)
        drafts[name] = [(step.token, step.from_draft) for step in steps]
    assert drafts["kept"] == drafts["live"]
    assert sum(drafted for _, drafted in drafts["kept"]) > 5
