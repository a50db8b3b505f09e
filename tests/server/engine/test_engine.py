"""The server's thread gives the answers of the command, and keeps checkpoints of all texts."""

import random
import threading

import mlx.core as mx
import pytest
from helpers_generate import bundled, endless, narrow, tokens_of
from helpers_server import TEXT, connected, exchange, post, strict_json, until
from helpers_serving import (
    ENDLESS,
    TEXTS,
    Asked,
    ask,
    assistant,
    chat,
    encode,
    expected,
    expected_text,
    running,
    served,
    user,
)

from mlx_qwen3next import load
from mlx_qwen3next.decoding.pace import LEAST
from mlx_qwen3next.errors import QueueFullError
from mlx_qwen3next.model.qwen3_next import Trunk
from mlx_qwen3next.prompt_cache import store
from mlx_qwen3next.prompt_cache.store import PromptCache
from mlx_qwen3next.server.engine import engine as serving

OPENING = 3  # tokens a chat's prompt ends with, "<|im_start|>assistant\n"


# --- answers ------------------------------------------------------------------------------------
def decoding(kind, load):
    """An engine that decodes plainly, with drafts, or with quantized keys and values."""
    quantized = kind == "quantized"
    flags = ("--kv-bits", 8, "--quantized-kv-start", 0) if quantized else ()
    engine = running(*flags, load=load, mtp=3 if quantized else kind)
    return engine, {"kv_bits": 8, "quantized_kv_start": 0} if quantized else {}


KINDS = ["off", 3, "quantized"]


@pytest.fixture(scope="module", params=KINDS)
def engine(request):
    started, options = decoding(request.param, narrow)
    with started as engine:
        engine.options = options
        yield engine


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """An engine of the bundled model, whose answers are text that comes back as the same tokens."""
    started, options = decoding(request.param, bundled)
    with started as engine:
        engine.options = options | {"load": bundled}
        yield engine


@pytest.mark.parametrize("text", TEXTS[:2])
def test_a_completion_is_the_command_s(engine, text):
    want = expected_text(text, **engine.options)
    for prompt in (text, encode(text)):
        answer = ask(engine, prompt)
        assert answer.text == want
        assert [response.finish_reason for response in answer.seen] == [None] * 15 + ["length"]


def test_a_chat_is_the_command_s(trained):
    messages = [{"role": "system", "content": "Be brief."}, user("What is a list?")]
    want = expected(chat(*messages), 60, **trained.options)
    answer = ask(trained, messages, max_tokens=60)
    assert answer.tokens == tokens_of(want)
    assert answer.text == "".join(response.text for response in want)
    assert answer.reason == want[-1].finish_reason == "stop"
    assert answer.ctx.prompt == chat(*messages)


def test_a_seed_gives_the_command_s_answer_alone_and_among_others(engine):
    """Requests with a seed are batched like all others."""
    options = {"temperature": 0.7, "penalty": 1.2}
    names = {"temperature": "temp", "penalty": "repetition_penalty"}
    sampling = {names[name]: value for name, value in options.items()} | engine.options
    texts = {}
    for seed in (1, 2**63):
        want = expected_text(TEXTS[1], seed=seed, **sampling)
        alone = ask(engine, TEXTS[1], seed=seed, **options)
        others = [Asked(engine, text, max_tokens=12, temperature=0.5) for text in TEXTS[:2]]
        among = ask(engine, TEXTS[1], seed=seed, **options)
        for other in others:
            other.read()
        assert alone.text == among.text == want
        texts[seed] = want
    assert len(set(texts.values())) == 2
    unseeded = {ask(engine, TEXTS[1], **options).text for _ in range(2)}
    assert len(unseeded) > 1


def test_concurrent_requests_have_the_same_answers_as_alone(engine):
    asked = [Asked(engine, TEXTS[i % 4], max_tokens=4 + 3 * i) for i in range(5)]
    for i, answer in enumerate(asked):
        assert answer.read().text == expected_text(TEXTS[i % 4], 4 + 3 * i, **engine.options)


def test_a_stop_word_ends_an_answer(engine):
    """The word may begin and end within tokens; the client gets the end at once."""
    text = expected_text(TEXTS[0], 30)
    for start, length in ((3, 1), (9, 4), (12, 9)):
        word = text[start : start + length]
        answer = ask(engine, TEXTS[0], max_tokens=30, stop=["never", word], **{})
        assert answer.text == text[: text.find(word)]
        assert answer.reason == "stop"
        assert len(answer.tokens) < 30


def test_log_probabilities(engine):
    answer = ask(engine, TEXTS[2], logprobs=True, top_logprobs=3)
    for response, want in zip(answer.seen, expected(TEXTS[2], **engine.options), strict=True):
        assert response.logprob == pytest.approx(want.logprobs[want.token].item(), abs=1e-3)
        tops = sorted((logprob for _, logprob in response.top_tokens), reverse=True)
        assert tops == pytest.approx(sorted(want.logprobs.tolist())[:-4:-1], abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([5, 4096], {}, "outside 0…4095"),
        ("", {}, "empty"),
        ([5] * 8193, {}, "maximum context length is 8192 tokens"),
        ("x", {"top_k": 4096}, "top_k"),
        ("x", {"logit_bias": {4096: 1.0}}, "logit_bias"),
        ([{"role": "nobody", "content": "x"}], {}, "unknown role"),
    ],
)
def test_a_request_that_cannot_be_answered_is_a_value_error(engine, prompt, fields, message):
    with pytest.raises(ValueError, match=message):
        Asked(engine, prompt, **fields)
    assert engine.health == "ok"


def test_the_context_ends_an_answer(tmp_path):
    directory = endless(tmp_path / "short", max_position_embeddings=40)
    with running(load=lambda: load(directory, dtype=mx.float32)) as engine:
        answer = ask(engine, [5] * 38, max_tokens=100)
        assert (len(answer.tokens), answer.reason) == (2, "length")
        answer = ask(engine, [5] * 40, max_tokens=100)
        assert (len(answer.tokens), answer.reason) == (1, "length")


# --- the prompt cache ---------------------------------------------------------------------------
def test_the_next_turn_reads_only_what_is_new(trained):
    messages = [user("What does os.path.join do?")]
    first = ask(trained, messages, max_tokens=24)
    second = [*messages, assistant(first.text), user("And math.sqrt?")]
    answer = ask(trained, second, max_tokens=12)
    assert first.ctx.prompt + first.tokens == answer.ctx.prompt[: answer.cached]
    assert answer.text == expected_text(chat(*second), 12, **trained.options)
    again = ask(trained, second, max_tokens=12)
    assert again.cached == len(again.ctx.prompt) - 1
    assert again.text == answer.text


def test_a_prompt_that_equals_an_earlier_text(engine):
    """Here mlx-lm's own server has nothing to process, which ends its thread."""
    prompt = encode("from math import sqrt\n")
    first = ask(engine, prompt, max_tokens=5)
    whole = prompt + first.tokens
    for _ in range(2):
        answer = ask(engine, whole, max_tokens=5)
        assert answer.tokens == tokens_of(expected(whole, 5, **engine.options))
        assert 0 < answer.cached < len(whole)


def test_an_edited_turn_goes_on_from_the_turn_before(engine, monkeypatch):
    """Checkpoints are kept at the turns of a chat, also of a chat that comes as a whole."""
    monkeypatch.setattr(store, "SPACING", 16)
    filler = " ".join(f"word{i}" for i in range(8))
    messages = [user(f"First: {filler}"), assistant(f"Second {filler}"), user("Third")]
    head = len(chat(*messages[:2])) - OPENING
    one = len(chat(messages[0])) - OPENING
    assert one > 16 and head - one > 16
    first = ask(engine, messages, max_tokens=3)
    assert first.cached == 0
    edited = [*messages[:2], user("Another")]
    answer = ask(engine, edited, max_tokens=8)
    assert answer.cached >= head
    assert answer.text == expected_text(chat(*edited), 8, **engine.options)
    edited = [messages[0], assistant("Changed"), user("Another")]
    answer = ask(engine, edited, max_tokens=8)
    assert one <= answer.cached < head
    assert answer.text == expected_text(chat(*edited), 8, **engine.options)


def test_the_checkpoint_of_a_prompt_lies_before_the_reasoning_it_opens(monkeypatch):
    """The next turn comes without the reasoning, so it could not use a later checkpoint."""
    tokenizer = bundled()[1]
    before, after = tokenizer.chat_template.rsplit("assistant\\n", 1)
    thinking = before + "assistant\\n<think>\\n" + after
    with running() as engine:
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", thinking)
        first = ask(engine, [user("Why?")], max_tokens=9)
        assert first.ctx.reasoning_open
        think = tokenizer.convert_tokens_to_ids("<think>")
        later = [user("Why?"), assistant("Because."), user("Really?")]
        assert ask(engine, later, max_tokens=1).cached == first.ctx.prompt.index(think)


@pytest.mark.parametrize("mtp", ["off", 3])
def test_answers_are_the_same_without_a_cache(mtp):
    rng = random.Random(4)
    whole = encode("\n".join(TEXTS) * 2)
    prompts = [[*whole[: rng.randrange(5, len(whole))], rng.randrange(300)] for _ in range(6)]
    answers = []
    for size in (1, 2**30):
        with running(cache=PromptCache(max_bytes=size), mtp=mtp) as engine:
            asked = [Asked(engine, prompt, max_tokens=6) for prompt in prompts[:3]]
            asked = [answer.read() for answer in asked]
            asked += [ask(engine, prompt, max_tokens=6) for prompt in prompts[3:]]
            answers.append([answer.tokens for answer in asked])
            assert any(answer.cached for answer in asked) == (size > 1)
    assert answers[0] == answers[1] == [tokens_of(expected(p, 6)) for p in prompts]


def test_the_cache_and_the_running_requests_keep_to_the_budget(monkeypatch):
    monkeypatch.setattr(store, "EVERY", 100)
    budget, sums = 4 * 2**20, []
    cache = PromptCache(max_bytes=budget)
    with running("--prefill-step-size", 256, cache=cache) as engine:
        for i in range(3):
            ask(engine, [5 + i] * 300, max_tokens=1)
            assert cache.nbytes <= budget
        assert cache.nbytes > budget // 2
        insert = cache.insert

        def watched(*args):
            insert(*args)
            sums.append(cache.nbytes + engine._batch.prompt_cache_nbytes)

        monkeypatch.setattr(cache, "insert", watched)
        live = Asked(engine, [9] * 300, max_tokens=8000, logit_bias=ENDLESS).read(1)
        ask(engine, [3] * 400, max_tokens=1)
        live.leave()
    assert len(sums) > 5 and max(sums) <= budget


def test_a_request_waits_until_there_is_memory_for_it():
    """A batch pads all sequences to the longest one."""
    cache = PromptCache(max_bytes=3 * 2**20)
    with running(cache=cache) as engine:
        first = Asked(engine, [9] * 300, max_tokens=8000, logit_bias=ENDLESS).read(1)
        long = Asked(engine, [3] * 900, max_tokens=1)
        until(lambda: waits(engine) == 1)
        first.read(20)
        assert waits(engine) == 1
        first.leave()
        assert len(long.read().tokens) == 1  # alone it is admitted with any length


@pytest.fixture
def steps(monkeypatch):
    """For each step of the running engines: (tokens of each request, bytes of caches)."""
    seen, step = [], serving.Engine._step

    def watched(engine):
        held = engine._checkpoints.nbytes + engine._batch.prompt_cache_nbytes
        seen.append(([len(request.tokens) for request in engine._running.values()], held))
        step(engine)

    monkeypatch.setattr(serving.Engine, "_step", watched)
    return seen


@pytest.mark.parametrize("mtp", ["off", 3])
def test_answers_that_outgrow_the_memory_wait_in_turn(steps, monkeypatch, mtp):
    """The youngest waits first, and goes on where it was. Two sequences of 512 tokens do not fit,
    nor do three of 256."""
    monkeypatch.setattr(serving, "AHEAD", 1)
    budget, temperature = 3 * 2**20, 0.8 if mtp == "off" else 0.0
    prompts = [encode(TEXTS[1] * 60)[-n:] for n in (500, 240, 240)]
    want = [tokens_of(expected(p, 20, seed=4, temp=temperature)) for p in prompts]
    options = {"seed": 4, "temperature": temperature, "max_tokens": 20}
    flags = ("--max-stall", 60)  # so that a busy machine changes nothing
    with running(*flags, cache=PromptCache(max_bytes=budget), mtp=mtp) as engine:
        asked = [Asked(engine, prompt, **options) for prompt in prompts]
        assert [answer.read().tokens for answer in asked] == want
    at = next(i for i, (lengths, _) in enumerate(steps) if max(lengths) == 512)
    (before, _), (after, _) = steps[at - 1 : at + 1]
    assert (len(before), max(before), after) == (2, 511, [512])
    assert min(before) > 240  # the second one had begun
    assert all(len(lengths) < 2 or max(lengths) < 512 for lengths, _ in steps)
    assert max(held for _, held in steps) <= budget


def test_the_cache_makes_room_for_an_answer_that_grows(steps):
    cache = PromptCache(max_bytes=2**30)
    with running(cache=cache) as engine:
        for token in (5, 6):
            ask(engine, [token] * 300, max_tokens=1)
        until(lambda: len(cache) == 4)  # at the end of each prompt and each answer
        # Enough for the answer and the checkpoint of its prompt with 256 tokens, not with 512.
        engine._memory.budget = budget = cache.nbytes + 1_100_000
        answer = Asked(engine, [9] * 250, max_tokens=12, logit_bias=ENDLESS).read(2)
        assert len(cache) == 5
        assert len(answer.read().tokens) == 12
    assert max(held for _, held in steps) <= budget


# --- slots --------------------------------------------------------------------------------------
def waits(engine):
    """The number of waiting requests."""
    return len(engine._waiting)


def test_requests_wait_for_a_slot():
    with running("--decode-concurrency", 2, "--prompt-concurrency", 1) as engine:
        asked = [Asked(engine, TEXTS[i % 4], max_tokens=8 + i) for i in range(7)]
        until(lambda: waits(engine) > 0)
        most = len(engine._running)
        for i, answer in enumerate(asked):
            assert answer.read().text == expected_text(TEXTS[i % 4], 8 + i)
            most = max(most, len(engine._running))
        assert most <= 2


def test_a_request_beyond_the_queue_is_refused():
    """A refusal is no failure: those that wait are answered, and then there is room again."""
    flags = ("--decode-concurrency", 1, "--prompt-concurrency", 1, "--max-queue", 2)
    with running(*flags) as engine, served(engine) as server:
        first = Asked(engine, TEXTS[0], max_tokens=8000, logit_bias=ENDLESS).read(1)
        waiting = [Asked(engine, text) for text in TEXTS[1:3]]
        until(lambda: waits(engine) == 2)
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            Asked(engine, TEXTS[3])
        for stream in (False, True):
            body = {"prompt": TEXTS[3], "stream": stream}
            status, headers, raw = exchange(server, "POST", TEXT, body)
            assert (status, headers["Retry-After"]) == (429, "5")
            error = strict_json(raw)["error"]
            assert error["code"] == "rate_limit_exceeded" and "waiting" in error["message"]
        first.leave()
        for text, answer in zip(TEXTS[1:3], waiting, strict=True):
            assert answer.read().text == expected_text(text)
        assert ask(engine, TEXTS[3]).text == expected_text(TEXTS[3])


@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_client_that_has_gone_frees_its_slot(mtp):
    """It may leave in the queue, in the prompt or in decoding; other requests are not disturbed."""
    endless = {"max_tokens": 8000, "logit_bias": ENDLESS}
    flags = ("--decode-concurrency", 2, "--prefill-step-size", 4)
    with running(*flags, mtp=mtp) as engine:
        Asked(engine, TEXTS[0], **endless).read(3).leave()  # alone
        until(lambda: not engine._running)
        Asked(engine, [5] * 4000, max_tokens=2).leave()  # in the prompt
        until(lambda: not engine._running)
        batch = [Asked(engine, text, **endless) for text in TEXTS[:2]]
        queued, last = Asked(engine, TEXTS[2], **endless), Asked(engine, TEXTS[3])
        batch[0].read(2)
        queued.leave()
        until(lambda: waits(engine) == 1)
        batch[0].leave()
        assert last.read().text == expected_text(TEXTS[3])
        ahead = len(batch[1].read(40).tokens)
        assert batch[1].text.startswith(expected_text(TEXTS[1], 12))
        assert ahead == 40
        batch[1].leave()
        until(lambda: not engine._running)
        until(lambda: engine._batch.prompt_cache_nbytes == 0)
        assert ask(engine, TEXTS[2]).text == expected_text(TEXTS[2])


def test_waiting_requests_get_progress(monkeypatch):
    """Without it the handler would not notice that a client has gone."""
    monkeypatch.setattr(serving, "KEEPALIVE", 0.01)
    with running("--decode-concurrency", 1, "--prompt-concurrency", 1) as engine:
        first = Asked(engine, TEXTS[0], max_tokens=8000, logit_bias=ENDLESS).read(1)
        waiting = Asked(engine, TEXTS[1], max_tokens=1)
        first.read(20)
        first.leave()
        waiting.read()
    assert waiting.progress[0] == (0, len(encode(TEXTS[1])))


# --- the chunks of prompts ----------------------------------------------------------------------
@pytest.fixture
def chunks(monkeypatch):
    """The tokens of each forward of several tokens a sequence, as (sequences, tokens of each)."""
    seen, call = [], Trunk.__call__

    def watched(trunk, tokens, *args):
        if tokens.shape[1] > 1:
            seen.append(tuple(tokens.shape))
        return call(trunk, tokens, *args)

    monkeypatch.setattr(Trunk, "__call__", watched)
    return seen


@pytest.mark.parametrize("company", [False, True])
def test_a_client_that_closes_is_noticed_at_the_next_chunk(monkeypatch, company):
    """Its place is free after the chunk that was being read when the handler noticed."""
    permits, read, call = threading.Semaphore(0), [], Trunk.__call__

    def gated(trunk, tokens, *args):
        if tokens.shape[1] > 1:
            assert permits.acquire(timeout=60)
            read.append(tokens.shape[1])
        return call(trunk, tokens, *args)

    with running("--prefill-step-size", 16) as engine, served(engine) as server:
        live = []
        if company:
            live.append(Asked(engine, TEXTS[0], max_tokens=8000, logit_bias=ENDLESS).read(2))
        monkeypatch.setattr(Trunk, "__call__", gated)
        with connected(server, post(TEXT, prompt=[5] * 4000, stream=True)):
            permits.release(2)
            until(lambda: len(read) == 2)
            (context,) = (r.context for r in engine._running.values() if len(r.tokens) == 4000)
        permits.release()  # after this chunk the handler tries to tell the client the progress
        until(lambda: context.stopped)
        permits.release()  # the chunk that may have begun by now; there is none after it
        until(lambda: len(engine._running) == len(live))
        assert len(read) <= 4 and set(read) == {16}
        for answer in live:
            answer.read(20).leave()
        until(lambda: engine._batch.prompt_cache_nbytes == 0)


@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_long_prompt_is_read_in_small_chunks_beside_a_stream(chunks, mtp):
    prompts = [encode(text * 30) for text in TEXTS[:2]]
    want = [tokens_of(expected(prompt, 12)) for prompt in prompts]
    with running("--max-stall", 1e-9, mtp=mtp) as engine:
        first = TEXTS[0] * 10  # enough to tell the pace
        live = Asked(engine, first, max_tokens=8000, logit_bias=ENDLESS).read(2)
        chunks.clear()
        asked = [Asked(engine, prompt, max_tokens=12) for prompt in prompts]
        assert [answer.read().tokens for answer in asked] == want
        assert max(n for _, n in chunks) == LEAST
        live.read(20).leave()
    assert live.text.startswith(expected_text(first, 12))
