"""mlx-lm's tests of its own server, applied to this one (after tests/test_server.py of mlx-lm
0.32.2), with the bundled model in place of a downloaded one."""

import copy
import functools
import gc
import json
import weakref

import pytest
from helpers_generate import bundled
from helpers_server import CHAT, TEXT, ask, events, exchange
from helpers_serving import Asked, running, served, user
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_qwen3next.prompt_cache.store import PromptCache
from mlx_qwen3next.server.engine import engine as serving


@pytest.fixture(scope="module")
def engine():
    with running("--max-tokens", 512, mtp="auto") as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with served(engine) as listening:
        yield listening


SAMPLING = {"max_tokens": 10, "temperature": 0.7, "top_p": 0.85, "repetition_penalty": 1.2}
CALLED = {"a": 2, "b": 3}
HELLO = [{"role": "system", "content": "You are a helpful assistant."}, user("Hello!")]


def assert_chat(answer, n=10):
    """An answer in OpenAI's form, of at most n tokens."""
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert 0 < answer["usage"]["completion_tokens"] <= n
    assert choice["finish_reason"] in ("length", "stop")


# --- TestServer ---------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_no_tokens_at_all_are_refused(server, path):
    status, answer = ask(server, path=path, max_tokens=0)
    assert status == 400 and "max_tokens" in answer["error"]["message"]


def test_a_completion_with_a_seed_can_be_repeated(server):
    fields = {
        "model": "default_model",
        "prompt": "Once upon a time",
        **{"max_tokens": 10, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1},
        **{"repetition_context_size": 20, "seed": 999, "stop": "stop sequence"},
    }
    answers = [ask(server, path=TEXT, **fields)[1] for _ in range(3)]
    assert answers[0]["id"] != answers[1]["id"]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] and len(set(texts)) == 1
    assert ask(server, path=TEXT, **fields | {"seed": 1})[1]["choices"][0]["text"] != texts[0]


def test_a_chat(server):
    status, answer = ask(server, messages=HELLO, **SAMPLING)
    assert status == 200
    assert_chat(answer)
    # The path without a version, too.
    assert exchange(server, "POST", "/chat/completions", {"messages": HELLO} | SAMPLING)[0] == 200


def test_contents_in_parts_are_the_same_chat(server):
    parts = [
        message | {"content": [{"type": "text", "text": message["content"]}]} for message in HELLO
    ]
    fields = SAMPLING | {"seed": 3}
    (one_status, one), (other_status, other) = (
        ask(server, messages=messages, **fields) for messages in (HELLO, parts)
    )
    assert one_status == other_status == 200
    assert one["choices"] == other["choices"]
    assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "arguments", ['{"a": 2, "b": 3}', {"a": 2, "b": 3}], ids=["text", "object"]
)
@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_calls_and_their_results_in_a_chat(server, content, arguments):
    """A call's content may be null, its arguments JSON's text or an object."""
    function = {"name": "add", "arguments": arguments}
    messages = [
        user("what is 2+3?"),
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"type": "function", "id": "123", "function": function}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "123"},
    ]
    status, answer = ask(server, messages=messages, **SAMPLING)
    assert status == 200
    assert_chat(answer)


def test_the_end_of_the_thread_releases_the_model():
    models = []

    def load():
        model, tokenizer = bundled()
        model = copy.copy(model)  # that nobody else holds
        models.append(weakref.ref(model))
        return model, tokenizer

    with running(load=load) as engine:
        assert ask_text(engine) and models[0]() is not None
        engine.drain(1)
        engine.ended.wait()
        gc.collect()
        assert models[0]() is None
        # The threads of the handler still read this.
        assert engine.args.allowed_origins == []


def ask_text(engine):
    return Asked(engine, "Once upon", max_tokens=2).read().text


def test_the_models(server):
    status, headers, raw = exchange(server, "GET", "/v1/models")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    answer = json.loads(raw)
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert (model["id"], model["object"]) == ("demo", "model")
    assert isinstance(model["created"], int)


def test_health_before_and_after_the_end():
    with running() as engine, served(engine) as listening:
        ask_text(engine)
        for status, health in ((200, "ok"), (503, "unavailable")):
            got, _, raw = exchange(listening, "GET", "/health")
            assert (got, json.loads(raw)) == (status, {"status": health})
            engine.drain(1)
            engine.ended.wait()


# --- TestServerWithDraftModel, with the drafts of the model's own head --------------------------
@pytest.fixture(scope="module")
def drafting():
    with running("--max-tokens", 512, mtp=3) as engine, served(engine) as listening:
        yield listening


def test_answers_with_drafts(drafting, server):
    for path, fields in ((TEXT, {"prompt": "Once upon a time"}), (CHAT, {"messages": HELLO})):
        fields |= {"max_tokens": 10, "temperature": 0.0}
        status, answer = ask(drafting, path=path, **fields)
        assert status == 200
        assert answer["usage"]["completion_tokens"] > 0
        assert answer["choices"] == ask(server, path=path, **fields)[1]["choices"]


def test_a_stream_with_drafts(drafting):
    data, _ = events(drafting, messages=HELLO, max_tokens=10, temperature=0.0)
    assert data.pop() == "[DONE]"
    assert len(data) > 1
    for chunk in data:
        (choice,) = chunk["choices"]
        assert "delta" in choice
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data)
    _, answer = ask(drafting, messages=HELLO, max_tokens=10, temperature=0.0)
    assert text == answer["choices"][0]["message"]["content"]


def test_the_prompt_cache_with_drafts(drafting):
    for end in ("Tell me a story about", "Tell me a story about dragons."):
        messages = [HELLO[0], user(end)]
        status, answer = ask(drafting, messages=messages, max_tokens=5, temperature=0.0)
        assert status == 200
        assert answer["choices"][0]["message"]["content"]
    again = ask(drafting, messages=messages, max_tokens=5, temperature=0.0)[1]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"] == answer["choices"]


# --- TestServerKVCacheQuantization and TestServerWithoutKVCacheQuantization ---------------------
@pytest.mark.parametrize(
    ("flags", "kind"),
    [((), KVCache), (("--kv-bits", 4, "--quantized-kv-start", 0), QuantizedKVCache)],
)
def test_keys_and_values_are_kept_as_asked_for(flags, kind):
    cache = PromptCache(max_bytes=2**30)
    prompt = "Once upon a time"
    tokens = bundled()[1].encode(prompt)
    with running(*flags, cache=cache) as engine, served(engine) as listening:
        assert ask(listening, path=TEXT, prompt=prompt, max_tokens=8)[0] == 200
        held, n = cache.fetch([*tokens, 0])
        assert n > 0
        entries = [entry for entry in held if isinstance(entry, (KVCache, QuantizedKVCache))]
        assert entries and all(isinstance(entry, kind) for entry in entries)
        if kind is QuantizedKVCache:
            assert {(entry.bits, entry.group_size) for entry in entries} == {(4, 64)}


@pytest.mark.parametrize("flags", [(), ("--kv-bits", 4, "--quantized-kv-start", 12)])
def test_requests_are_answered_together(monkeypatch, flags):
    """With seeds, and quantized, which mlx-lm's server does not batch."""
    seen, step = [], serving.Engine._step

    def counted(engine):
        seen.append(len(engine._running))
        step(engine)

    monkeypatch.setattr(serving.Engine, "_step", counted)
    with running(*flags) as engine:
        asked = [Asked(engine, "Once upon a time", max_tokens=30, seed=i) for i in range(4)]
        assert all(len(answer.read().tokens) > 0 for answer in asked)
    assert max(seen) == 4


# --- TestKeepalive ------------------------------------------------------------------------------
def test_a_long_prompt_keeps_a_stream_alive():
    """Comments tell the progress; an answer without streaming has none."""
    with running("--prefill-step-size", 8) as engine, served(engine) as listening:
        data, comments = events(listening, TEXT, prompt=[5] * 30, max_tokens=2)
        assert comments == [f": keepalive {n}/30" for n in (8, 16, 24, 29, 30)]
        assert data[-1] == "[DONE]"
        _, _, raw = exchange(listening, "POST", TEXT, {"prompt": [6] * 30, "max_tokens": 2})
        assert b"keepalive" not in raw and json.loads(raw)["choices"]


# --- TestGenerationThreadDeath ------------------------------------------------------------------
def test_no_request_waits_for_a_thread_that_could_not_load():
    def fails():
        raise RuntimeError("no memory")

    with running(load=fails, dies=True) as engine, served(engine) as listening:
        engine.ended.wait()
        assert engine.health == "unavailable"
        status, answer = ask(listening)
        assert (status, answer["error"]["type"]) == (503, "server_error")
        with pytest.raises(RuntimeError):
            ask_text(engine)


def test_a_request_in_flight_when_the_thread_dies_does_not_wait_for_ever(monkeypatch):
    """No known fault ends the thread; an unknown one must not go unnoticed."""

    def dies(engine):
        raise MemoryError("beyond recovery")

    with running(dies=True) as engine, served(engine) as listening:
        monkeypatch.setattr(engine, "_step", functools.partial(dies, engine))
        status, answer = ask(listening)
        assert status == 503 and "died" in answer["error"]["message"]
        assert json.loads(exchange(listening, "GET", "/health")[2]) == {"status": "unavailable"}
