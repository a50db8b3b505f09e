"""A sequence has the same tokens, and leaves the same caches, whatever joins and leaves with it."""

import copy
import functools
import random

import mlx.core as mx
import pytest
from float64 import relative_error
from helpers_caches import assert_holds
from helpers_generate import golden, greedy, interleaved
from helpers_serving import Sequences
from helpers_speculative import Cycle
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.drafters.mtp import MTPDrafter
from mlx_qwen3next.decoding.sampling import SeededSampler
from mlx_qwen3next.model.cache import tokens_held
from mlx_qwen3next.model.mtp_head import MTPHead
from mlx_qwen3next.model.quantized_kv import KVQuantization
from mlx_qwen3next.model.qwen3_next import Trunk

N = 6  # tokens a sequence tells, unless it says something else


def model():
    """Its head is often right, but not always."""
    return golden("permutation")[0]


@functools.cache
def prompts():
    """Prompts of several lengths."""
    rng = random.Random(5)
    return [[rng.randrange(96) for _ in range(n)] for n in (1, 2, 9, 17, 6)]


def processors():
    return make_logits_processors(repetition_penalty=1.3, repetition_context_size=8)


@functools.cache
def alone(i, n=N, temp=0.0, penalty=False):
    """The tokens after prompt i, decoded plainly and by nobody's batch."""
    options = {"logits_processors": processors()} if penalty else {}
    if temp:
        options["sampler"] = SeededSampler(make_sampler(temp), 100 + i)
    return greedy(model(), prompts()[i], n, mtp="off", **options)


def insert(sequences, i, n=N, temp=0.0, penalty=False, **options):
    if temp:
        options["sampler"] = SeededSampler(make_sampler(temp), 100 + i)
    if penalty:
        options["processors"] = processors()
    return sequences.insert(prompts()[i], n, **options)


def assert_end(sequences, uid, head):
    """A sequence that has ended gives the text and a cache of exactly this."""
    end = sequences.ends[uid]
    assert end.all_tokens == sequences.text(uid)
    assert_holds(model(), end.prompt_cache, end.all_tokens, head)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("temp", [0.0, 0.9])
@pytest.mark.parametrize("depths", [(0,), (1,), (3,), (0, 0, 4)], ids=str)
def test_joining_and_leaving_at_random(depths, temp, seed):
    """Each tells what it tells alone; what it leaves, ended or removed, is what it told."""
    rng = random.Random(seed)
    depth = FixedDepth(depths[0]) if len(depths) == 1 else Cycle(*depths)
    sequences = Sequences(model(), depth, step_size=3)
    expected, waiting = {}, rng.sample(range(5), 5)
    while waiting or sequences.live():
        if waiting and (not sequences.live() or rng.random() < 0.15):
            i, penalty, n = waiting.pop(), rng.random() < 0.5, rng.randint(1, N)
            length = len(prompts()[i])
            cuts = sorted(rng.sample(range(1, length), min(2, length - 1)))
            uid = insert(sequences, i, n, temp, penalty, cuts=cuts)
            expected[uid] = alone(i, N, temp, penalty)[:n]
        sequences.step()
        if rng.random() < 0.03 and sequences.live():
            uid = rng.choice(sorted(sequences.live()))
            caches = sequences.remove(uid, return_prompt_caches=True)
            cache, tokens = caches[uid]
            if sequences.told[uid]:
                assert tokens == sequences.text(uid)
            if tokens:
                assert_holds(model(), cache, tokens, head=depths != (0,))
            expected[uid] = expected[uid][: len(sequences.told[uid])]
    assert sequences.told == expected
    for uid, end in sequences.ends.items():
        if end is not None:
            assert_end(sequences, uid, head=depths != (0,))


def steps(n):
    """The number of steps of a lone sequence with prompt 3 before it ends, for n tokens."""
    return range(n + len(prompts()[3]) // 4 + 3)


@pytest.mark.parametrize("temp", [0.0, 0.9])
@pytest.mark.parametrize("depth", [0, 4])
def test_another_joins_at_every_moment(depth, temp):
    """In the prompt, before the first token, within a round, between plain steps, before the last
    token."""
    lumps = set()
    for k in steps(N):
        sequences = Sequences(model(), FixedDepth(depth))
        first = insert(sequences, 3, N, temp, cuts=[9])
        for _ in range(k):
            sequences.step()
        second = insert(sequences, 2, 6, temp)
        _, generated = sequences.step()
        lumps.add(sum(response.uid == first for response in generated))
        sequences.run()
        assert sequences.told == {first: alone(3, N, temp), second: alone(2, 6, temp)}
        for uid in (first, second):
            assert_end(sequences, uid, head=depth > 0)
    assert max(lumps) >= (4 if depth else 2)  # what was left of a round, then the batch's own


@pytest.mark.parametrize("temp", [0.0, 0.9])
@pytest.mark.parametrize("depth", [0, 3])
def test_another_leaves_at_every_moment(depth, temp):
    """A token that the batch has chosen already is reported, also if it is the last one."""
    for n in range(1, 9):
        sequences = Sequences(model(), FixedDepth(depth))
        first, second = insert(sequences, 2, n, temp), insert(sequences, 4, N, temp)
        sequences.run()
        assert sequences.told == {first: alone(2, n, temp), second: alone(4, N, temp)}
        assert_end(sequences, second, head=depth > 0)
    for last in (1, 2, 3):  # tokens that the other still has to tell
        sequences = Sequences(model(), FixedDepth(depth))
        first, second = insert(sequences, 4, 8, temp), insert(sequences, 4, N, temp)
        while len(sequences.told[first]) < 8 - last:
            sequences.step()
        sequences.remove(second)
        sequences.run()
        assert sequences.told[first] == alone(4, 8, temp)
        assert_end(sequences, first, head=depth > 0)


@pytest.mark.parametrize("temp", [0.0, 0.9])
@pytest.mark.parametrize("between", [0, 1, 2, 3])
def test_out_of_the_batch_and_back(between, temp):
    """Also so soon that the token chosen by the batch is still to be reported."""
    sequences = Sequences(model(), FixedDepth(3))
    first, second = insert(sequences, 3, 20, temp), insert(sequences, 1, 3, temp)
    while second in sequences.live():
        sequences.step()
    for _ in range(between):
        sequences.step()
    third = insert(sequences, 2, 5, temp)
    sequences.run()
    expected = {first: alone(3, 20, temp), second: alone(1, 3, temp), third: alone(2, 5, temp)}
    assert sequences.told == expected
    for uid in expected:
        assert_end(sequences, uid, head=True)


@pytest.mark.parametrize("stop", [0, 2, 4])
@pytest.mark.parametrize("company", ["none", "joins", "leaves"])
def test_a_stop_sequence_ends_a_sequence_wherever_it_comes(company, stop):
    """Within a round, within what is told at once when another joins, in a batch, and begun there
    but ended outside."""
    told = alone(3)
    ending = tuple(told[max(stop - 1, 0) : stop + 1])
    n = next(i for i in range(1, N) if tuple(told[:i][-len(ending) :]) == ending)
    for k in steps(n):
        sequences = Sequences(model(), FixedDepth(4))
        first = sequences.insert(prompts()[3], N, stop=[ending])
        second = insert(sequences, 2, 4) if company == "leaves" else None
        for _ in range(k):
            sequences.step()
        if company == "joins":
            second = insert(sequences, 2, 4)
        elif second in sequences.live():
            sequences.remove(second)
        sequences.run()
        assert sequences.told[first] == told[:n]
        assert sequences.ends[first].finish_reason == "stop"
        assert_end(sequences, first, head=True)
        if company == "joins":
            assert sequences.told[second] == alone(2, 4)


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize("depth", [0, 4])
def test_removed_at_every_moment(depth, company):
    """The cache holds what was told, or as much of the prompt as was read; others go on."""
    for k in steps(N):
        for wanted in (False, True):
            sequences = Sequences(model(), FixedDepth(depth))
            first = insert(sequences, 3, cuts=[9])
            second = insert(sequences, 4) if company else None
            for _ in range(k):
                sequences.step()
            if first in sequences.ends:
                continue
            caches = sequences.remove(first, return_prompt_caches=wanted)
            assert list(caches) == [first] * wanted
            for cache, tokens in caches.values():
                whole = sequences.text(first)
                assert tokens == (whole if sequences.told[first] else whole[: len(tokens)])
                if tokens:
                    assert_holds(model(), cache, tokens, head=depth > 0)
            sequences.run()
            assert sequences.told[first] == alone(3)[: len(sequences.told[first])]
            if company:
                assert sequences.told[second] == alone(4)


def test_removed_right_after_the_batch_s_token_was_told():
    """Alone again, and nothing decoded yet: the token is in the cache nevertheless."""
    sequences = Sequences(model(), FixedDepth(3))
    first, second = insert(sequences, 3), insert(sequences, 4)
    while len(sequences.told[first]) < 3:
        sequences.step()
    sequences.remove(second)
    before = len(sequences.told[first])
    sequences.step()
    assert len(sequences.told[first]) == before + 1
    ((cache, tokens),) = sequences.remove(first, return_prompt_caches=True).values()
    assert tokens == sequences.text(first)
    assert_holds(model(), cache, tokens, head=True)


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize("depth", [0, 3])
def test_caches_of_a_prompt_s_segments(depth, company):
    sequences = Sequences(model(), FixedDepth(depth))
    prompt, seen = prompts()[3], []
    uid = insert(sequences, 3, 5, cuts=[5, 12])
    if company:
        insert(sequences, 2, 9)
    while not sequences.told[uid]:
        prompted, _ = sequences.step()
        for response in prompted:
            if response.uid == uid and response.end_of_segment and not response.end_of_prompt:
                ((cache, tokens),) = sequences.generator.extract_cache([uid]).values()
                assert tokens == prompt[: len(tokens)]
                assert_holds(model(), cache, tokens, head=depth > 0)
                seen.append(len(tokens))
    assert seen == [5, 12, len(prompt) - 1]
    sequences.run()
    assert sequences.told[uid] == alone(3, 5)  # reading the caches has changed nothing


def test_progress_is_of_the_whole_prompt():
    sequences = Sequences(model(), FixedDepth(2))
    insert(sequences, 3, 2, cuts=[9])
    sequences.run()
    reads = [4, 8, 9, 13, 16, 17]
    assert [response.progress for response in sequences.prompted] == [(n, 17) for n in reads]


@pytest.mark.parametrize("leaver", [False, True])
@pytest.mark.parametrize("depth", [0, 3])
def test_going_on_from_what_was_returned(depth, leaver):
    """With the head's part; alone, in a batch; after one new token and after several."""
    sequences = Sequences(model(), FixedDepth(depth))
    first, second = insert(sequences, 3, 6), insert(sequences, 2, 4 if leaver else 6)
    sequences.run()
    for new in ([11], [3, 1, 4, 1, 5]):
        held, caches = {}, {}
        again = Sequences(model(), FixedDepth(depth))
        for uid in (first, second):
            end = sequences.ends[uid]
            held[uid] = list(end.all_tokens)
            caches[uid] = copy.deepcopy(end.prompt_cache)
        uids = {
            again.insert(held[uid] + new, 8, cache=caches[uid], held=held[uid]): uid
            for uid in (first, second)[: 1 + leaver]
        }
        again.run()
        for uid, told in again.told.items():
            assert told == greedy(model(), held[uids[uid]] + new, 8, mtp="off")
            assert again.ends[uid].all_tokens == again.text(uid)
            assert_holds(model(), again.ends[uid].prompt_cache, again.text(uid), head=depth > 0)


@pytest.mark.parametrize("start", [0, 10, 30])
@pytest.mark.parametrize("i", [0, 3])
@pytest.mark.parametrize("depth", [0, 3])
def test_keys_and_values_are_quantized(depth, i, start):
    """From where that is asked for: in the prompt, in the answer, or after a prompt of one token.
    What is returned is what was decoded with."""
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    sequences = Sequences(
        model(), FixedDepth(depth), quantization=KVQuantization(**options), step_size=4
    )
    uid = insert(sequences, i, 40)
    sequences.run()
    expected = greedy(model(), prompts()[i], 40, mtp="off", prefill_step_size=4, **options)
    assert sequences.told[uid] == expected
    end = sequences.ends[uid]
    trunk = end.prompt_cache[: len(model().layers)]
    assert [c.bits for c in trunk if isinstance(c, QuantizedKVCache)] == [8]
    assert tokens_held(trunk) == len(end.all_tokens) == len(sequences.text(uid))


@pytest.mark.parametrize("depth", [0, 3])
def test_quantized_sequences_of_a_batch(depth):
    """Each is quantized from its own position on, and goes on as it does alone."""
    model, options = interleaved(), {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 12}
    sequences = Sequences(
        model, FixedDepth(depth), quantization=KVQuantization(**options), step_size=5
    )
    expected = {}

    def join(i, n):
        prompt = [token % 64 for token in prompts()[i]]
        for kept in (options, {}):
            steps = generate_step(prompt, model, max_tokens=n, mtp="off", **kept)
            expected.setdefault(i, []).append([mx.exp(step.logprobs) for step in steps][-1])
        return sequences.insert(prompt, n)

    uids = {join(i, n): i for i, n in ((0, 24), (3, 20), (1, 16))}
    while not any(sequences.told.values()):
        sequences.step()
    uids[join(2, 9)] = 2  # ends first
    sequences.run()
    for uid, i in uids.items():
        end, (quantized, plain) = sequences.ends[uid], expected[i]
        assert relative_error(mx.exp(end.logprobs), quantized) <= 1e-5
        assert relative_error(quantized, plain) > 1e-3
        trunk = end.prompt_cache[: len(model.layers)]
        assert [c.bits for c in trunk if isinstance(c, QuantizedKVCache)] == [2, 2]
        assert tokens_held(trunk) == len(end.all_tokens)
        assert end.all_tokens == sequences.text(uid)


@pytest.fixture
def proposals(monkeypatch):
    """Counts the rounds that are drafted."""
    made = []
    propose = MTPDrafter.propose

    def counted(self, *args):
        made.append(self)
        return propose(self, *args)

    monkeypatch.setattr(MTPDrafter, "propose", counted)
    return made


def test_drafts_are_made_alone_and_only_then(proposals):
    """And they are as good after a time in a batch as without it."""
    sequences = Sequences(model(), FixedDepth(4))
    first = insert(sequences, 3, 40)
    sequences.run()
    rounds = len(proposals)
    assert 0 < rounds < 25
    tokens = {}
    for joined in (True, False):
        sequences = Sequences(model(), FixedDepth(4))
        first = insert(sequences, 3, 40)
        if joined:
            second = insert(sequences, 2, 8)
            proposals.clear()
            while second in sequences.live():
                sequences.step()
            assert proposals == []
            told = len(sequences.told[first])
        else:
            while len(sequences.told[first]) < told:
                sequences.step()
        proposals.clear()
        sequences.run()
        tokens[joined] = len(proposals)
        assert sequences.told[first] == alone(3, 40)
    assert abs(tokens[True] - tokens[False]) <= 2


def test_a_batch_brings_the_head_up_to_date():
    """Within the batch already: what waits there takes memory, and its cache is what is kept."""
    sequences = Sequences(model(), FixedDepth(4))
    uids = [insert(sequences, i, 9) for i in (2, 3, 4)]
    sequences.run()
    for uid in uids:
        assert_end(sequences, uid, head=True)


def test_nothing_is_kept_for_drafts_that_are_not_made(monkeypatch):
    calls = []
    monkeypatch.setattr(MTPHead, "__call__", lambda *_: calls.append(1))
    sequences = Sequences(model(), FixedDepth(0))
    uids = [insert(sequences, 3), insert(sequences, 2, 5)]
    sequences.run()
    for uid in uids:
        assert_end(sequences, uid, head=False)
    assert not calls


def test_the_bytes_of_what_is_live():
    """Also of the one that is alone, whose caches the batch does not know."""
    sequences = Sequences(model(), FixedDepth(3))
    generator = sequences.generator
    assert generator.prompt_cache_nbytes == 0
    uid = insert(sequences, 3, 10)
    while not sequences.told[uid]:
        sequences.step()
    least = sum(c.nbytes for c in model().make_cache())
    single = generator.prompt_cache_nbytes
    assert single > least
    insert(sequences, 2)
    while not all(sequences.told.values()):
        sequences.step()
    assert generator.prompt_cache_nbytes > single
    sequences.run()
    assert generator.prompt_cache_nbytes == 0


def test_closing_gives_up_what_is_live(monkeypatch):
    """At once: what is left to the garbage collector runs in whichever thread that is."""
    sequences = Sequences(model(), FixedDepth(3))
    insert(sequences, 3)
    while not sequences.told[0]:
        sequences.step()
    tokens = sequences.generator._alone._steps
    monkeypatch.setattr(Trunk, "__call__", None)  # nothing is to be computed any more
    sequences.generator.close()
    assert tokens.gi_frame is None
    assert sequences.generator.prompt_cache_nbytes == 0
    sequences.generator.close()  # the collector does so again


def test_prompts_of_other_lengths_are_not_padded(monkeypatch):
    """Each token of a prompt is processed once, and nothing else is."""
    sizes, call = [], Trunk.__call__

    def counted(trunk, tokens, *args):
        sizes.append(tokens.size)
        return call(trunk, tokens, *args)

    monkeypatch.setattr(Trunk, "__call__", counted)
    sequences = Sequences(model(), FixedDepth(0))
    for i in range(len(prompts())):
        insert(sequences, i, n=1)
    while len(sequences.ends) < len(prompts()):
        sequences.step()
    assert sum(sizes) <= sum(map(len, prompts())) + 2 * len(prompts())
