"""Anthropic's Messages and OpenAI's Responses over HTTP: the order of events, ends, errors, what is
kept, and what agents really send. The generator has no model."""

import json
from pathlib import Path

import pytest
from helpers_protocols import (
    MESSAGES_PATH,
    RESPONSES_PATH,
    message_of,
    post,
    response_of,
    seen,
    stream,
)
from helpers_server import CALL, NAMES, Fake, ask, exchange, serving

from mlx_qwen3next.errors import ContextLengthError, QueueFullError
from mlx_qwen3next.server.http.handler import Settings
from mlx_qwen3next.server.protocols import custom_tools, stored

# What agents sent to this server in November 2026, with their texts and tools cut short.
AGENTS = json.loads(Path(__file__).with_name("agent_requests.json").read_text())
ASKED = {
    MESSAGES_PATH: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64},
    RESPONSES_PATH: {"input": "Hi", "max_output_tokens": 64},
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = {
    MESSAGES_PATH: [{"name": "weather", "input_schema": SCHEMA}],
    RESPONSES_PATH: [{"type": "function", "name": "weather", "parameters": SCHEMA}],
}
STREAMED = {MESSAGES_PATH: message_of, RESPONSES_PATH: response_of}
BOTH = pytest.mark.parametrize("path", [MESSAGES_PATH, RESPONSES_PATH])
THOUGHT = "<think>\nHm.\n</think>\n\n"


def without_ids(answer):
    text = json.dumps(answer)
    names = ("id", "call_id", "signature", "created_at")
    for name in names:
        text = text.replace(f'"{name}"', f'"{name}.{name}"')
    drop = {f"{name}.{name}" for name in names}
    return json.loads(text, object_hook=lambda x: {k: x[k] for k in x if k not in drop})


# --- answers --------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("Hé 🙂.", [("text", "Hé 🙂.")]),
        (THOUGHT + "Yes.", [("reasoning", "Hm."), ("text", "Yes.")]),
        (CALL, [("call", "weather", {"city": "Paris"})]),
        (
            f"{THOUGHT}Let me see.\n{CALL}\n{CALL}\nDone.",
            [
                *(("reasoning", "Hm."), ("text", "Let me see.")),
                *([("call", "weather", {"city": "Paris"})] * 2),
                ("text", "\n\n\nDone."),  # with the blanks before the calls, as in a chat
            ],
        ),
    ],
    ids=["empty", "text", "reasoning", "call", "all"],
)
def test_a_stream_makes_the_whole_answer(path, text, parts):
    body = ASKED[path] | {"tools": TOOLS[path]}
    with serving(Fake(text, max_tokens=200)) as server:
        body["max_tokens" if path == MESSAGES_PATH else "max_output_tokens"] = 200
        status, whole = post(server, path, body)
        assert status == 200
        streamed = STREAMED[path](stream(server, path, body))
    assert seen(whole) == parts
    assert without_ids(streamed) == without_ids(whole)
    called = any(kind == "call" for kind, *_ in parts)
    if path == MESSAGES_PATH:
        assert whole["stop_reason"] == ("tool_use" if called else "end_turn")
        assert (whole["role"], whole["type"], whole["model"]) == ("assistant", "message", "demo")
    else:
        assert (whole["status"], whole["incomplete_details"]) == ("completed", None)
        assert (whole["object"], whole["model"]) == ("response", "demo")
        counts = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
        assert (counts > 0) == (("reasoning", "Hm.") in parts)


def test_the_counts_of_tokens():
    with serving() as server:
        _, chat = ask(server)
        _, message = post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH])
        _, response = post(server, RESPONSES_PATH, ASKED[RESPONSES_PATH])
        _, counted = post(server, f"{MESSAGES_PATH}/count_tokens", ASKED[MESSAGES_PATH])
    prompt, generated = chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]
    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (prompt - 1, 1)
    usage = response["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (prompt, 1)
    assert usage["output_tokens"] == message["usage"]["output_tokens"] == generated
    assert counted == {"input_tokens": prompt}


def test_an_answer_that_is_too_long_says_so():
    with serving(Fake("one two three four")) as server:
        _, whole = post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH] | {"max_tokens": 2})
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("max_tokens", None)
        body = ASKED[RESPONSES_PATH] | {"max_output_tokens": 2}
        _, whole = post(server, RESPONSES_PATH, body)
        streamed = response_of(stream(server, RESPONSES_PATH, body))
    for response in (whole, streamed):
        assert response["status"] == response["output"][-1]["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}


@BOTH
def test_one_call_is_enough_if_the_request_says_so(path):
    one = {"parallel_tool_calls": False}
    if path == MESSAGES_PATH:
        one = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    body = ASKED[path] | {"tools": TOOLS[path]} | one
    generator = Fake(f"{CALL}\n{CALL}", max_tokens=200)
    with serving(generator) as server:
        for answer in (post(server, path, body)[1], STREAMED[path](stream(server, path, body))):
            assert seen(answer) == [("call", "weather", {"city": "Paris"})]
            assert answer.get("stop_reason", answer.get("status")) in ("tool_use", "completed")
    assert all(context.stopped for context in generator.contexts)


def test_a_call_in_a_namespace():
    space = {"type": "namespace", "name": "n", "tools": TOOLS[RESPONSES_PATH]}
    body = ASKED[RESPONSES_PATH] | {"tools": [space]}
    with serving(Fake(CALL.replace("=weather", "=n.weather"))) as server:
        for answer in (
            post(server, RESPONSES_PATH, body)[1],
            response_of(stream(server, RESPONSES_PATH, body)),
        ):
            (call,) = answer["output"]
            assert (call["namespace"], call["name"]) == ("n", "weather")


CUSTOM = [{"type": "custom", "name": "patch"}]
INPUTS = {
    '{"input": "a \\"b\\"\\n\\ud83d\\ude42\\\\"}': 'a "b"\n🙂\\',
    '{"input": ""}': "",
    '{"input": 5}': '{"input": 5}',
    '{"other": "x"}': '{"other": "x"}',
    "{}": "{}",
}


@pytest.mark.parametrize("arguments", INPUTS)
def test_a_call_of_a_custom_tool(arguments):
    call = f'<tool_call>\n{{"name": "patch", "arguments": {arguments}}}\n</tool_call>'
    body = ASKED[RESPONSES_PATH] | {"tools": CUSTOM, "max_output_tokens": 200}
    with serving(Fake(call, max_tokens=200)) as server:
        _, whole = post(server, RESPONSES_PATH, body)
        streamed = response_of(stream(server, RESPONSES_PATH, body))
    assert seen(whole) == [("call", "patch", INPUTS[arguments])]
    assert without_ids(streamed) == without_ids(whole)


def test_the_text_of_arguments_that_go_on():
    text = 'a "b"\n🙂\\'
    arguments = json.dumps({"input": text})
    begun = [custom_tools.begun_text(arguments[:end]) for end in range(len(arguments) + 1)]
    assert all(text.startswith(each) for each in begun)
    assert sorted(set(begun), key=len) == [text[:end] for end in range(len(text) + 1)]


def test_the_input_of_a_custom_tool_comes_in_pieces():
    text = "*** Begin Patch\n+one\n+two\n"
    call = f"<tool_call>\n<function=patch>\n<parameter=input>\n{text}\n</parameter>\n</function>"
    body = ASKED[RESPONSES_PATH] | {"tools": CUSTOM, "max_output_tokens": 200}
    with serving(Fake(call, max_tokens=200)) as server:
        events = stream(server, RESPONSES_PATH, body)
    assert seen(response_of([*events])) == [("call", "patch", text)]
    deltas = [event for event in events if event["type"].endswith("_input.delta")]
    assert len(deltas) > 5


# --- what agents send -----------------------------------------------------------------------------
@pytest.mark.parametrize("request_", AGENTS, ids=[request["client"] for request in AGENTS])
def test_requests_of_agents(request_):
    body, path = request_["body"], request_["path"].partition("?")[0]
    with serving(Fake(f"I will.\n{CALL}"), Settings(names=("qwen3-coder-next",))) as server:
        if body and body.get("stream") and path in STREAMED:
            events = stream(server, request_["path"], body, request_["headers"])
            answer = STREAMED[path](events)
            assert seen(answer)[0] == ("text", "I will.")
            return
        status, _, raw = exchange(
            server, request_["method"], request_["path"], body, request_["headers"]
        )
    assert status == 200
    assert (raw == b"") == (request_["method"] == "HEAD")


@BOTH
def test_fields_and_headers_that_are_unknown_do_not_matter(path):
    generator = Fake()
    headers = {"anthropic-version": "1999-01-01", "anthropic-beta": "x-2030", "x-stainless-os": "?"}
    headers |= {"openai-beta": "responses=v9", "x-api-key": "none"}
    unknown = {"new_field": {"a": [1]}, "metadata": {"user_id": "x"}, "service_tier": "auto"}
    unknown |= {"context_management": {"edits": []}, "prompt_cache_key": "k", "user": "u"}
    unknown |= {"n": 2, "response_format": {"type": "json_object"}, "logprobs": True}
    with serving(generator) as server:
        for extra in ({}, unknown):
            status, answer = post(server, f"{path}?beta=true&x", ASKED[path] | extra, headers)
            assert (status, seen(answer)) == (200, [("text", "Hello.")])
    assert generator.requests[0] == generator.requests[1]


def test_which_server_it_is():
    with serving() as server:
        for path in ("/api/version", "/api/tags", "/v1/models"):
            status, _, raw = exchange(server, "GET", path)
            assert status == 200
            told = json.loads(raw)
            if path == "/v1/models":
                (model,) = told["data"]
                assert (model["id"], model["max_model_len"]) == ("demo", 4096)
                assert (model["type"], model["display_name"]) == ("model", "demo")
                assert (told["has_more"], told["first_id"]) == (False, "demo")
            if path == "/api/tags":
                assert [model["name"] for model in told["models"]] == ["demo"]
        for name, status in (("demo", 200), ("gpt-oss:20b", 200), ("other", 404)):
            assert post(server, "/api/pull", {"model": name, "stream": True})[0] == status


def test_aliases():
    settings = Settings(names=NAMES, aliases=("my-*", "other"))
    with serving(settings=settings) as server:
        for model, status in (("My-model", 200), ("other", 200), ("demo", 200), ("gpt-5", 404)):
            assert ask(server, model=model)[0] == status
            assert exchange(server, "GET", f"/v1/models/{model}")[0] == status
        assert ask(server)[0] == ask(server, model="default_model")[0] == 200


# --- errors ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [{"x-api-key": "secret"}, {"authorization": "Bearer secret"}])
def test_a_key_in_either_header(key):
    settings = Settings(names=NAMES, api_key="secret")
    with serving(settings=settings) as server:
        for headers, status in ((key, 200), ({}, 401), ({name: "other" for name in key}, 401)):
            got, answer = post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH], headers)
            assert got == status
            kind = answer["error"]["type"] if status == 401 else None
            assert kind in (None, "authentication_error")
        both = key | {"authorization": "Bearer secret", "x-api-key": "other"}
        assert post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH], both)[0] == 200


@pytest.mark.parametrize(
    ("before", "status", "kind"),
    [
        (ContextLengthError("long", 9, 8), 400, "invalid_request_error"),
        (ValueError("bad"), 400, "invalid_request_error"),
        (QueueFullError("full"), 429, "rate_limit_error"),
        (OSError("broken"), 500, "api_error"),
    ],
)
def test_errors_of_messages(before, status, kind):
    with serving(Fake(before=before)) as server:
        got, answer = post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH])
    assert (got, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    if isinstance(before, ContextLengthError):
        assert answer["error"]["message"] == "prompt is too long: 9 tokens > 8 maximum"


def test_errors_of_other_kinds():
    with serving() as server:
        # Anthropic's client takes this code for "send the whole conversation".
        thread = {"thread": {"type": "create"}}
        status, answer = post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH] | thread)
        code = answer["error"]["details"]["error_code"]
        assert (status, code) == (400, "thread_unsupported_request")
        status, answer = post(server, MESSAGES_PATH, ASKED[MESSAGES_PATH] | {"model": "other"})
        assert (status, answer["error"]["type"]) == (404, "not_found_error")
        status, answer = post(server, MESSAGES_PATH, b"{")
        assert (status, answer["type"]) == (400, "error")
        status, answer = post(server, RESPONSES_PATH, ASKED[RESPONSES_PATH] | {"model": "other"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_an_error_within_a_stream():
    with serving(Fake(fail=RuntimeError("broken"), at=2)) as server:
        *_, last = stream(server, MESSAGES_PATH, ASKED[MESSAGES_PATH])
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
        *events, last = stream(server, RESPONSES_PATH, ASKED[RESPONSES_PATH])
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert "broken" in last["response"]["error"]["message"]
        assert last["sequence_number"] == len(events)


# --- responses that are kept ----------------------------------------------------------------------
def test_a_response_is_kept_and_continued():
    generator = Fake()
    with serving(generator) as server:
        _, first = post(server, RESPONSES_PATH, ASKED[RESPONSES_PATH] | {"instructions": "Be."})
        place = f"{RESPONSES_PATH}/{first['id']}"
        status, _, raw = exchange(server, "GET", place)
        assert (status, json.loads(raw)) == (200, first)
        more = {"input": "And?", "previous_response_id": first["id"]}
        status, second = post(server, RESPONSES_PATH, more)
        assert (status, second["previous_response_id"]) == (200, first["id"])
        referred = {"type": "item_reference", "id": first["output"][0]["id"]}
        again = [{"role": "user", "content": "Hi"}, referred, {"role": "user", "content": "And?"}]
        assert post(server, RESPONSES_PATH, {"input": again})[0] == 200
        assert exchange(server, "DELETE", place)[0] == 200
        for method in ("GET", "DELETE"):
            assert exchange(server, method, place)[0] == 404
        status, answer = post(server, RESPONSES_PATH, more)
        assert (status, answer["error"]["param"]) == (400, "previous_response_id")
        assert "in memory" in answer["error"]["message"]
    expected = [("user", "Hi"), ("assistant", "Hello."), ("user", "And?")]
    for chat, _ in generator.requests[1:3]:  # without the instructions of the first
        assert [(m["role"], m["content"]) for m in chat.messages] == expected


def test_a_response_is_not_kept_if_the_request_says_so():
    with serving() as server:
        _, first = post(server, RESPONSES_PATH, ASKED[RESPONSES_PATH] | {"store": False})
        assert exchange(server, "GET", f"{RESPONSES_PATH}/{first['id']}")[0] == 404


def test_what_is_kept_has_a_bound(monkeypatch):
    def kept(name, size=0):
        return stored.Kept([{"id": name + "x", "text": "x" * size}], {"id": name})

    monkeypatch.setattr(stored, "MOST", 3)
    monkeypatch.setattr(stored, "MOST_BYTES", 10_000)
    responses = stored.Stored()

    def held():
        return [name for name in "abcdefg" if name in responses._kept]

    for name in "abcd":
        responses.put(kept(name))
    assert held() == ["b", "c", "d"]
    responses.delete("c")
    responses.put(kept("e", 9_000))
    assert held() == ["b", "d", "e"]
    responses.put(kept("f", 1_000))
    assert held() == ["f"]
    assert responses.item("input[0]", "fx")["id"] == "fx"
