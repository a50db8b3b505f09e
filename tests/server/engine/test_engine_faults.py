"""A request that fails harms neither the other requests nor the server."""

import json
import threading

import pytest
from helpers_generate import bundled, narrow, tokens_of
from helpers_server import TEXT, exchange, until
from helpers_serving import (
    ENDLESS,
    TEXTS,
    Asked,
    ask,
    encode,
    expected,
    expected_text,
    running,
    served,
)

from mlx_qwen3next.decoding.detokenize import TextDecoder
from mlx_qwen3next.decoding.sampling import Sampling
from mlx_qwen3next.model.qwen3_next import Trunk
from mlx_qwen3next.prompt_cache.store import PromptCache
from mlx_qwen3next.server.engine import engine as serving
from mlx_qwen3next.server.engine.engine import ATTEMPTS


# --- errors -------------------------------------------------------------------------------------
class Faults:
    """Raises an error in forwards whose tokens fulfil the condition `when`."""

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
        """Lets the next forward of several sequences fail."""
        left = [1]
        self.when = lambda tokens: len(tokens) > 1 and bool(left) and bool(left.pop())


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


POISON = 777


@pytest.mark.parametrize("mtp", ["off", 3])
@pytest.mark.parametrize("place", [2, 20])
def test_a_request_that_always_fails_ends_alone(faults, mtp, place):
    """It fails at the beginning of its prompt or later; the others in its batch are answered."""
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
        assert faults.count >= 1
        assert engine.health == "ok"
        faults.when = lambda _: False
        assert ask(engine, poisoned, max_tokens=5).tokens == tokens_of(expected(poisoned, 5))


def test_a_failing_request_that_is_repeated_ends_no_other(faults):
    """Clients may retry."""
    faults.when = lambda tokens: (tokens == POISON).any().item()
    with running(mtp="off") as engine:
        asked = [Asked(engine, text, max_tokens=60) for text in TEXTS[:2]]
        for _ in range(ATTEMPTS + 1):
            asked[0].read(1)
            with pytest.raises(RuntimeError, match="a fault"):
                ask(engine, [POISON] * 3)
        wanted = [expected_text(text, 60) for text in TEXTS[:2]]
        assert [answer.read().text for answer in asked] == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_single_failure_harms_no_request_of_a_batch(faults, mtp, temperature):
    """Each request is resumed where it was, with the random numbers that come next."""
    sampling = {"seed": 5, "temp": temperature}
    want = [expected_text(text, 20, **sampling) for text in TEXTS]
    with running(mtp=mtp) as engine:
        faults.once()
        asked = [
            Asked(engine, text, max_tokens=20, seed=5, temperature=temperature) for text in TEXTS
        ]
        assert [answer.read().text for answer in asked] == want
        assert faults.count == 1
        assert engine.health == "ok"


def test_the_third_failure_ends_a_request(faults):
    """The server does not retry forever, even if the request never fails alone."""
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
    """It fails within a step of the batch, which ends the thread of mlx-lm's own server."""
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
        until(lambda: len(engine._running) <= company)
        if company:
            assert other.read().text == expected_text(TEXTS[0], 24)
        assert ask(engine, TEXTS[2]).text == expected_text(TEXTS[2])


def test_a_sequence_that_cannot_be_ended(monkeypatch):
    """Ending it may take a forward, whose failure must not harm the other requests."""
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
        until(lambda: not engine._running)
        assert not left
        left.append(1)
        word = expected_text(TEXTS[1])[4:8]
        assert ask(engine, TEXTS[1], stop=[word]).text == expected_text(TEXTS[1]).split(word)[0]
        assert ask(engine, TEXTS[1]).text == expected_text(TEXTS[1])
        assert not left


def test_a_stop_word_and_the_last_token_at_once(monkeypatch, caplog):
    """A sequence that moves into a batch may have several tokens in one step. Those after a stop
    word are dropped, even if one of them ends the sequence."""

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
def test_health_and_requests_while_loading():
    go, answers = threading.Event(), []

    def slow():
        go.wait(10)
        return narrow()

    with running(load=slow) as engine:
        assert engine.health == "loading"
        client = threading.Thread(target=lambda: answers.append(ask(engine, TEXTS[0]).text))
        client.start()
        go.set()
        client.join()
        assert answers == [expected_text(TEXTS[0])]
        assert engine.health == "ok"


def test_a_model_that_cannot_be_loaded():
    errors = []

    def fails():
        raise ValueError("no such model")

    with running(load=fails, failed=errors.append, dies=True) as engine:
        engine.ended.wait()
        assert [str(error) for error in errors] == ["no such model"]
        assert engine.health == "unavailable"
        with pytest.raises(RuntimeError):
            Asked(engine, TEXTS[0])


def test_a_depth_the_model_cannot_draft_to_is_an_error_of_loading():
    errors = []

    def load():
        model, tokenizer = bundled()
        return type("Headless", (), {"drafts": False, "layers": model.layers})(), tokenizer

    with running(load=load, mtp=2, failed=errors.append, dies=True) as engine:
        engine.ended.wait()
    assert "no MTP head" in str(errors[0])


def test_draining_answers_earlier_requests(tmp_path):
    """It refuses later requests, and the next engine finds the checkpoints."""

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
        engine.ended.wait()
        assert engine.health == "unavailable"
        assert not hasattr(engine, "_model") and not hasattr(engine, "_batch")  # memory is free
    with running(cache=cache, mtp=3) as engine:
        answer = ask(engine, prompt, max_tokens=20)
        assert answer.cached == len(prompt) - 1
        assert answer.text == want


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_sent_to_its_end_when_the_thread_has_ended(monkeypatch, stream):
    with running() as engine, served(engine) as server:
        generate = engine.generate

        def ended(*args):
            context, responses = generate(*args)
            engine.drain(60)
            engine.ended.wait()
            return context, responses

        monkeypatch.setattr(engine, "generate", ended)
        fields = {"prompt": TEXTS[0], "max_tokens": 16, "logprobs": 1, "temperature": 0}
        status, _, raw = exchange(server, "POST", TEXT, fields | {"stream": stream})
    assert status == 200
    chunks = raw.decode().split("data: ")[1:-1] if stream else [raw]
    texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == expected_text(TEXTS[0])


def test_the_deadline_ends_the_requests_left():
    with running("--decode-concurrency", 1) as engine:
        asked = [Asked(engine, text, max_tokens=8000, logit_bias=ENDLESS) for text in TEXTS[:2]]
        asked[0].read(2)
        engine.drain(0)
        for answer in asked:
            with pytest.raises(RuntimeError, match="shutting down"):
                answer.read()
        engine.ended.wait()


def test_an_idle_engine_saves_its_checkpoints(tmp_path):
    """It does not wait for its end, which may be a crash."""
    cache = PromptCache(max_bytes=2**30, directory=tmp_path, fingerprint="model")
    with running(cache=cache) as engine:
        ask(engine, TEXTS[0])
        until(lambda: any(tmp_path.rglob("*.safetensors")))
        assert engine.health == "ok"
