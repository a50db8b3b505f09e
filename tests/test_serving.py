"""The server's thread gives everyone the command's answers, keeps what it has read, and survives
whatever goes wrong."""

import functools
import random
import threading

import mlx.core as mx
import pytest
from helpers_generate import bundled, endless, tokens_of
from helpers_server import until
from helpers_serving import Asked, ask, assistant, running, user

from mlx_qwen3next import load, prompt_cache, serving, stream_generate
from mlx_qwen3next.model import Trunk
from mlx_qwen3next.prompt_cache import PromptCache
from mlx_qwen3next.sampling import Sampling
from mlx_qwen3next.text import StopWords, TextDecoder

TEXTS = ("import os\n", "class Queue:\n    def put(self", "def merge(left, right):\n", "x = [")
OPENING = 3  # tokens a chat's prompt ends with, "<|im_start|>assistant\n"
ENDLESS = {4086: -100.0, 4088: -100.0}  # a bias against both stop tokens


def encode(text):
    return bundled()[1].encode(text)


def chat(*messages):
    return bundled()[1].apply_chat_template(list(messages), add_generation_prompt=True)


@functools.cache
def _expected(prompt, n, options, seed):
    if seed is not None:
        mx.random.seed(seed)
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    return list(stream_generate(*bundled(), prompt, n, mtp="off", **dict(options)))


def expected(prompt, n=16, seed=None, **options):
    """What the command generates: the responses."""
    prompt = tuple(prompt) if isinstance(prompt, list) else prompt
    return _expected(prompt, n, tuple(options.items()), seed)


def expected_text(*args, **options):
    return "".join(response.text for response in expected(*args, **options))


# --- stop words ---------------------------------------------------------------------------------
def told(words, pieces, reason="length"):
    """What is told of pieces of text, piece by piece, and whether a word stopped it."""
    holder, out = StopWords(words), []
    for i, piece in enumerate(pieces):
        text, stopped = holder.add(piece, reason if i == len(pieces) - 1 else None)
        out.append(text)
        if stopped:
            return out, True
    return out, False


@pytest.mark.parametrize(
    ("words", "pieces", "out", "stopped"),
    [
        (["STOP"], ["a STOP b"], ["a "], True),  # within a token
        (["STOP"], ["a S", "TO", "P b"], ["a ", "", ""], True),  # across tokens
        (["STOP"], ["a S", "TO", "x"], ["a ", "", "STOx"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),  # it begins again within itself
        (["abc", "bd"], ["ab", "d"], ["", "a"], True),  # one within the beginning of another
        (["d", "cd"], ["abcd"], ["ab"], True),  # whichever comes first
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True),
        (["é🙂"], ["xé", "🙂"], ["x", ""], True),
        (["STOP"], ["a S", "TO"], ["a ", "STO"], False),  # the end gives back what was held
        ([], ["a", "b"], ["a", "b"], False),
    ],
)
def test_stop_words(words, pieces, out, stopped):
    assert told(words, pieces) == (out, stopped)


def test_a_text_of_stop_words_loses_nothing():
    """However it is cut, all before the first stop word is told, and nothing else; nothing is held
    that cannot be a stop word's beginning."""
    rng = random.Random(3)
    for _ in range(2000):
        words = ["".join(rng.choices("abé", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abé", k=rng.randint(1, 14)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, stopped = told(words, pieces)
        read = ""
        for i, piece in enumerate(pieces[: len(out)]):
            read += piece
            ends = [at for word in words if (at := read.find(word)) >= 0]
            so_far, last = "".join(out[: i + 1]), i == len(pieces) - 1
            if ends:  # the first word that is complete
                assert stopped and len(out) == i + 1
                assert so_far == read[: min(ends)]
            else:
                held = read[len(so_far) :]
                assert so_far + held == read
                assert not held or (not last and any(word.startswith(held) for word in words))
        assert bool(ends) == stopped


# --- answers ------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["off", 3, "quantized"])
def engine(request):
    """Plain, with drafts, and one request at a time with quantized keys and values."""
    quantized = request.param == "quantized"
    flags = ("--kv-bits", 8, "--quantized-kv-start", 0) if quantized else ()
    with running(*flags, mtp=3 if quantized else request.param) as engine:
        engine.options = {"kv_bits": 8, "quantized_kv_start": 0} if quantized else {}
        yield engine


@pytest.mark.parametrize("text", TEXTS[:2])
def test_a_completion_is_the_command_s(engine, text):
    want = expected_text(text, **engine.options)
    for prompt in (text, encode(text)):
        answer = ask(engine, prompt)
        assert answer.text == want
        assert [response.finish_reason for response in answer.seen] == [None] * 15 + ["length"]


def test_a_chat_is_the_command_s(engine):
    messages = [{"role": "system", "content": "Be brief."}, user("What is a list?")]
    want = expected(chat(*messages), 60, **engine.options)
    answer = ask(engine, messages, max_tokens=60)
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


def test_many_at_a_time_have_the_answers_they_have_alone(engine):
    asked = [Asked(engine, TEXTS[i % 4], max_tokens=4 + 3 * i) for i in range(5)]
    for i, answer in enumerate(asked):
        assert answer.read().text == expected_text(TEXTS[i % 4], 4 + 3 * i, **engine.options)


def test_a_stop_word_ends_an_answer(engine):
    """Wherever its tokens begin and end; the client that waits for it is free at once."""
    text = expected_text(TEXTS[0], 30)
    for start, length in ((3, 1), (9, 4), (12, 9)):
        word = text[start : start + length]
        answer = ask(engine, TEXTS[0], max_tokens=30, stop=["never", word], **{})
        assert answer.text == text[: text.find(word)]
        assert answer.reason is None  # mlx-lm's handler makes "stop" of it, and drops no text
        assert len(answer.tokens) < 30


def test_log_probabilities(engine):
    answer = ask(engine, TEXTS[2], logprobs=True, top_logprobs=3)
    for response, want in zip(answer.seen, expected(TEXTS[2], **engine.options), strict=True):
        assert response.logprob == pytest.approx(want.logprobs[want.token].item(), abs=1e-3)
        tops = sorted((top["logprob"] for top in response.top_tokens), reverse=True)
        assert tops == pytest.approx(sorted(want.logprobs.tolist())[:-4:-1], abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([5, 4096], {}, "outside 0…4095"),
        ("", {}, "empty"),
        ([5] * 8193, {}, "max_position_embeddings"),
        ("x", {"top_k": 4096}, "top_k"),
        ("x", {"logit_bias": {4096: 1.0}}, "logit_bias"),
        ([{"role": "nobody", "content": "x"}], {}, "unknown role"),
    ],
)
def test_what_cannot_be_answered_is_a_value_error(engine, prompt, fields, message):
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
def test_the_next_turn_reads_only_what_is_new(engine):
    messages = [user("What does os.path.join do?")]
    first = ask(engine, messages, max_tokens=60)
    second = [*messages, assistant(first.text), user("And math.sqrt?")]
    answer = ask(engine, second, max_tokens=20)
    assert first.ctx.prompt + first.tokens == answer.ctx.prompt[: answer.cached]
    assert answer.text == expected_text(chat(*second), 20, **engine.options)
    again = ask(engine, second, max_tokens=20)
    assert again.cached == len(again.ctx.prompt) - 1
    assert again.text == answer.text


def test_a_prompt_that_is_a_whole_text_of_before(engine):
    """mlx-lm's own server then has nothing to process, which ends its thread."""
    prompt = encode("from math import sqrt\n")
    first = ask(engine, prompt, max_tokens=5)
    whole = prompt + first.tokens
    for _ in range(2):
        answer = ask(engine, whole, max_tokens=5)
        assert answer.tokens == tokens_of(expected(whole, 5, **engine.options))
        assert 0 < answer.cached < len(whole)


def test_an_edited_turn_goes_on_from_the_turn_before(engine, monkeypatch):
    """A checkpoint is kept at turns, when they come one by one and when they come at once."""
    monkeypatch.setattr(prompt_cache, "SPACING", 16)
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
    """The next turn comes without the reasoning, so nothing beyond is of use to it."""
    tokenizer = bundled()[1]
    before, after = tokenizer.chat_template.rsplit("assistant\\n", 1)
    thinking = before + "assistant\\n<think>\\n" + after
    with running() as engine:
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", thinking)
        first = ask(engine, [user("Why?")], max_tokens=9)
        assert first.ctx.initial_state == "reasoning"
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


def test_the_cache_and_the_live_requests_keep_to_the_budget(monkeypatch):
    budget = 2**20
    cache = PromptCache(max_bytes=budget)
    trim = cache.trim
    with running("--prefill-step-size", 256, cache=cache) as engine:
        for i in range(4):
            ask(engine, [5 + i] * 100, max_tokens=1)
            assert cache.nbytes <= budget
        assert cache.nbytes > budget // 2
        live = Asked(engine, [9] * 300, max_tokens=8000, logit_bias=ENDLESS).read(1)
        taken, room = engine._batch.prompt_cache_nbytes, []
        monkeypatch.setattr(cache, "trim", lambda size: room.append((size, trim(size))))
        ask(engine, [3, 4], max_tokens=1)
        assert taken > 0 and room[0][0] <= budget - taken  # when the other came
        live.leave()


# --- places -------------------------------------------------------------------------------------
def waits(engine):
    return len(engine._waiting)


def test_more_requests_than_places_wait_for_one():
    with running("--decode-concurrency", 2, "--prompt-concurrency", 1) as engine:
        asked = [Asked(engine, TEXTS[i % 4], max_tokens=8 + i) for i in range(7)]
        assert waits(engine) > 0
        most = len(engine._live)
        for i, answer in enumerate(asked):
            assert answer.read().text == expected_text(TEXTS[i % 4], 8 + i)
            most = max(most, len(engine._live))
        assert most <= 2


@pytest.mark.parametrize("mtp", ["off", 3])
def test_whoever_has_gone_frees_the_place(mtp):
    """In the queue, in the prompt, in decoding, alone and in a batch; others are not disturbed."""
    endless = {"max_tokens": 8000, "logit_bias": ENDLESS}
    flags = ("--decode-concurrency", 2, "--prefill-step-size", 4)
    with running(*flags, mtp=mtp) as engine:
        Asked(engine, TEXTS[0], **endless).read(3).leave()  # alone
        until(lambda: not engine._live)
        Asked(engine, [5] * 4000, max_tokens=2).leave()  # in the prompt
        until(lambda: not engine._live)
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
        until(lambda: not engine._live)
        until(lambda: engine._batch.prompt_cache_nbytes == 0)
        assert ask(engine, TEXTS[2]).text == expected_text(TEXTS[2])


# --- errors -------------------------------------------------------------------------------------
class Faults:
    """Raises in forwards for which `when` gives true, of the tokens of the forward."""

    def __init__(self, monkeypatch):
        self.when, self.count = lambda tokens: False, 0
        call = Trunk.__call__

        def forward(model, tokens, *args):
            if self.when(tokens):
                self.count += 1
                raise RuntimeError("a fault\nof a second line")
            return call(model, tokens, *args)

        monkeypatch.setattr(Trunk, "__call__", forward)

    def once(self):
        """In the next forward."""
        left = [1]
        self.when = lambda _: bool(left) and bool(left.pop())


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


POISON = 777


@pytest.mark.parametrize("mtp", ["off", 3])
@pytest.mark.parametrize("place", [2, 20])
def test_a_request_that_always_fails_ends_alone(faults, mtp, place):
    """At the beginning of a prompt or later in it; those in its batch have their answers."""
    prompt = encode(TEXTS[0] * 8)
    poisoned = [*prompt[:place], POISON, *prompt[place:]]
    want = [expected_text(text, 16) for text in TEXTS]
    with running("--prefill-step-size", 8, mtp=mtp) as engine:
        faults.when = lambda tokens: (tokens == POISON).any().item()
        asked = [Asked(engine, text, max_tokens=16) for text in TEXTS[:3]]
        asked[0].read(2)
        bad = Asked(engine, poisoned)
        asked.append(Asked(engine, TEXTS[3], max_tokens=16))
        with pytest.raises(RuntimeError, match=r"^a fault$"):
            bad.read()
        assert [answer.read().text for answer in asked] == want
        assert faults.count >= 2
        assert engine.health == "ok"
        with pytest.raises(RuntimeError, match="a fault"):
            ask(engine, poisoned)
        faults.when = lambda _: False
        assert ask(engine, poisoned, max_tokens=5).tokens == tokens_of(expected(poisoned, 5))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_failure_that_does_not_come_again_harms_nobody_in_a_batch(faults, mtp, temperature):
    """Each goes on where it was, with the random numbers that come next."""
    sampling = {"seed": 5, "temp": temperature}
    want = [expected_text(text, 20, **sampling) for text in TEXTS]
    with running(mtp=mtp) as engine:
        asked = [
            Asked(engine, text, max_tokens=20, seed=5, temperature=temperature) for text in TEXTS
        ]
        for answer in asked:
            answer.read(3)
        faults.once()
        assert [answer.read().text for answer in asked] == want
        assert faults.count == 1
        assert engine.health == "ok"


def test_the_third_failure_ends_a_request(faults):
    """Also if it is never alone with it: a server does not try forever."""
    with running() as engine:
        faults.when = lambda tokens: tokens.shape[0] > 1 or tokens.shape[1] > 1
        asked = [Asked(engine, text) for text in TEXTS[:2]]
        for answer in asked:
            with pytest.raises(RuntimeError, match="a fault"):
                answer.read()
        assert faults.count <= 3 * len(asked)
        faults.when = lambda _: False
        assert ask(engine, TEXTS[0]).text == expected_text(TEXTS[0])


@pytest.mark.parametrize("what", ["sampler", "logits_processors"])
@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_sampler_or_processor_that_fails(monkeypatch, mtp, what):
    """It fails within the batch's step, where mlx-lm's own server ends."""
    make = getattr(Sampling, what)

    def spoiled(sampling):
        made = make(sampling)
        if sampling.top_k != 7:
            return made

        def fails(*_):
            raise ZeroDivisionError("odd")

        return fails if what == "sampler" else [fails]

    monkeypatch.setattr(Sampling, what, spoiled)
    with running(mtp=mtp) as engine:
        asked = [Asked(engine, text, max_tokens=24) for text in TEXTS[:2]]
        asked[0].read(2)
        with pytest.raises(RuntimeError, match="odd"):
            ask(engine, TEXTS[2], top_k=7, temperature=0.5)
        assert [a.read().text for a in asked] == [expected_text(text, 24) for text in TEXTS[:2]]
        with pytest.raises(RuntimeError, match="odd"):  # alone, too
            ask(engine, TEXTS[2], top_k=7, temperature=0.5)
        assert engine.health == "ok"


@pytest.mark.parametrize("company", [False, True])
def test_a_token_that_cannot_be_decoded(monkeypatch, company):
    add = TextDecoder.add

    def spoiled(decoder, token, reason=None):
        if token == POISON:
            raise UnicodeError("no text")
        return add(decoder, token, reason)

    monkeypatch.setattr(TextDecoder, "add", spoiled)
    with running(mtp=3) as engine:
        other = Asked(engine, TEXTS[0], max_tokens=24) if company else None
        with pytest.raises(RuntimeError, match="no text"):
            ask(engine, TEXTS[1], logit_bias={POISON: 100.0})
        until(lambda: len(engine._live) <= company)
        if company:
            assert other.read().text == expected_text(TEXTS[0], 24)
        assert ask(engine, TEXTS[2]).text == expected_text(TEXTS[2])


def test_a_sequence_that_cannot_be_ended(monkeypatch):
    """That may take a forward, whose failure is nobody's who goes on."""
    remove = serving.SpeculativeBatchGenerator.remove
    left = [1]

    def fails(*args, **options):
        if left and left.pop():
            raise RuntimeError("a fault")
        return remove(*args, **options)

    monkeypatch.setattr(serving.SpeculativeBatchGenerator, "remove", fails)
    with running(mtp=3) as engine:
        other = Asked(engine, TEXTS[0], max_tokens=40).read(2)
        Asked(engine, TEXTS[1], max_tokens=8000, logit_bias=ENDLESS).read(3).leave()
        assert other.read().text == expected_text(TEXTS[0], 40)
        until(lambda: not engine._live)
        assert not left
        left.append(1)
        word = expected_text(TEXTS[1])[4:8]
        assert ask(engine, TEXTS[1], stop=[word]).text == expected_text(TEXTS[1]).split(word)[0]
        assert ask(engine, TEXTS[1]).text == expected_text(TEXTS[1])
        assert not left


def test_a_stop_word_and_the_last_token_at_once(monkeypatch, caplog):
    """A sequence that is handed to a batch may tell several tokens in one step: those after the
    stop word are nobody's, also if one of them ends it."""

    class Lumps(serving.SpeculativeBatchGenerator):
        def next(self):
            steps = [super(Lumps, self).next() for _ in range(40)]
            return [r for step in steps for r in step[0]], [r for step in steps for r in step[1]]

        def extract_cache(self, uids):
            return {}

    monkeypatch.setattr(serving, "SpeculativeBatchGenerator", Lumps)
    text = expected_text(TEXTS[0], 12)
    with running(mtp=3) as engine:
        for _ in range(2):
            answer = ask(engine, TEXTS[0], max_tokens=12, stop=[text[8:11]])
            assert answer.text == text[: text.find(text[8:11])]
        assert engine.health == "ok"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_checkpoint_that_cannot_be_kept_is_only_logged(monkeypatch, caplog):
    def fails(*_):
        raise OSError("no room")

    with running() as engine:
        monkeypatch.setattr(PromptCache, "insert", fails)
        assert ask(engine, TEXTS[0]).text == expected_text(TEXTS[0])
        until(lambda: "no room" in caplog.text)
        assert engine.health == "ok"


# --- the beginning and the end ------------------------------------------------------------------
def test_health_while_loading_and_what_is_asked_then():
    go, answers = threading.Event(), []

    def slow():
        go.wait(10)
        return bundled()

    with running(load=slow) as engine:
        assert engine.health == "loading"
        assert not engine.is_healthy
        client = threading.Thread(target=lambda: answers.append(ask(engine, TEXTS[0]).text))
        client.start()
        go.set()
        client.join()
        assert answers == [expected_text(TEXTS[0])]
        assert engine.health == "ok" and engine.is_healthy


def test_a_model_that_cannot_be_loaded():
    errors = []

    def fails():
        raise ValueError("no such model")

    with running(load=fails, failed=errors.append, dies=True) as engine:
        engine.join()
        assert [str(error) for error in errors] == ["no such model"]
        assert engine.health == "unavailable"
        with pytest.raises(RuntimeError):
            Asked(engine, TEXTS[0])


def test_a_depth_the_model_cannot_draft_to_is_an_error_of_loading():
    errors = []

    def load():
        model, tokenizer = bundled()
        return type("Headless", (), {"mtp": None, "layers": model.layers})(), tokenizer

    with running(load=load, mtp=2, failed=errors.append, dies=True) as engine:
        engine.join()
    assert "no MTP head" in str(errors[0])


def test_draining_answers_what_was_asked(tmp_path):
    """And refuses what comes later; the next engine finds the checkpoints."""

    def cache(_):
        return PromptCache(max_bytes=2**30, directory=tmp_path, fingerprint="model")

    prompt = encode(TEXTS[1] * 2)
    with running("--decode-concurrency", 2, cache=cache, mtp=3) as engine:
        asked = [Asked(engine, prompt, max_tokens=20) for _ in range(4)]
        engine.drain(60)
        assert engine.health == "draining"
        with pytest.raises(RuntimeError, match="shutting down"):
            Asked(engine, TEXTS[0])
        want = expected_text(prompt, 20)
        assert [answer.read().text for answer in asked] == [want] * 4
        engine.join()
        assert engine.health == "unavailable"
        assert engine.model_provider.model is None  # its memory is free
    with running(cache=cache, mtp=3) as engine:
        answer = ask(engine, prompt, max_tokens=20)
        assert answer.cached == len(prompt) - 1
        assert answer.text == want


def test_a_deadline_ends_what_is_left():
    with running("--decode-concurrency", 1) as engine:
        asked = [Asked(engine, text, max_tokens=8000, logit_bias=ENDLESS) for text in TEXTS[:2]]
        asked[0].read(2)
        engine.drain(0)
        for answer in asked:
            with pytest.raises(RuntimeError, match="shutting down"):
                answer.read()
        engine.join()


def test_an_idle_engine_saves_its_checkpoints(tmp_path):
    """Not only at its end, which may come as a crash."""
    cache = PromptCache(max_bytes=2**30, directory=tmp_path, fingerprint="model")
    with running(cache=cache) as engine:
        ask(engine, TEXTS[0])
        until(lambda: any(tmp_path.rglob("*.safetensors")))
        assert engine.health == "ok"
