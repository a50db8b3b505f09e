"""The server's requests to the generator and its answers: text, log-probabilities, tool calls and
errors, also through OpenAI's client."""

import json
import logging

import openai
import pytest
from helpers_server import (
    CALL,
    CHAT,
    MESSAGES,
    NAMES,
    TEXT,
    Fake,
    ask,
    calls_of,
    events,
    exchange,
    serving,
    tokenizer,
)
from jinja2 import TemplateError

from mlx_qwen3next.decoding.sampling import Sampling
from mlx_qwen3next.errors import ContextLengthError
from mlx_qwen3next.server.http.handler import Settings

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def client(server, **options):
    """An OpenAI client of a server."""
    url = "http://{}:{}/v1".format(*server.server_address[:2])
    return openai.OpenAI(base_url=url, **{"api_key": "any", "max_retries": 0} | options)


def test_the_generator_gets_the_request_without_the_models_names():
    generator = Fake()
    with serving(generator) as server:
        status, answer = ask(
            server,
            model="org/demo",
            messages=[{"role": "developer", "content": [{"type": "text", "text": "Be"}]}],
            xtc_probability=1,
            stop="end",
            logit_bias={"5": 1},
            max_completion_tokens=7,
            seed=3,
            stream=None,
        )
    (chat, args), (ctx,) = generator.requests[0], generator.contexts
    assert (status, answer["model"]) == (200, "demo")
    assert chat.messages == [{"role": "system", "content": "Be"}]
    assert (args.sampling.xtc_probability, args.stop_words, args.max_tokens) == (1.0, ["end"], 7)
    assert (args.sampling.logit_bias, args.seed) == ({5: 1.0}, 3)
    assert ctx.stopped  # so that the generator forgets the request


def test_the_commands_defaults_fill_missing_fields():
    generator = Fake(max_tokens=2, temp=0.5)
    with serving(generator) as server:
        _, answer = ask(server)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2
    assert generator.requests[0][1].sampling.temp == 0.5


def test_a_requests_fields_win_over_the_recommendation_one_by_one():
    generator = Fake(max_tokens=2, temp=0.7, top_p=0.8, top_k=20, min_p=None)
    with serving(generator) as server:
        ask(server)
        ask(server, temperature=0, top_k=5)
    first, second = (arguments.sampling for _, arguments in generator.requests)
    assert first == Sampling(temp=0.7, top_p=0.8, top_k=20)
    assert second == Sampling(temp=0.0, top_p=0.8, top_k=5)


def test_prompts_may_be_tokens():
    generator = Fake()
    with serving(generator) as server:
        _, answer = ask(server, path=TEXT, prompt=[[5, 6, 7]])
    assert generator.requests[0][0] == [5, 6, 7]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["choices"][0]["text"] == "Hello."


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "chat.completion.chunk"), (TEXT, "text_")])
def test_streams_are_of_one_kind_and_name(path, kind):
    with serving() as server:
        for wanted in (True, False):
            data, _ = events(server, path, stream_options={"include_usage": wanted})
            assert data.pop() == "[DONE]"
            assert {chunk["object"][: len(kind)] for chunk in data} == {kind}
            assert {chunk["model"] for chunk in data} == {"demo"}
            assert len({(chunk["id"], chunk["object"]) for chunk in data}) == 1
            assert [bool(chunk.get("usage")) for chunk in data[-2:]] == [False, wanted]


def test_a_stream_of_nothing_is_kept_alive_by_comments():
    with serving(Fake(progress=2)) as server:
        assert events(server)[1] == [": keepalive 0/2", ": keepalive 1/2"]


def test_a_request_that_waits_is_kept_alive_too():
    generator = Fake()
    responses = generator._responses

    def waiting(args, callback):
        for _ in range(3):
            callback(0, 9)
        yield from responses(args, callback)

    generator._responses = waiting
    with serving(generator) as server:
        assert events(server)[1] == [": keepalive 0/9"] * 3


def test_a_bad_default_is_the_servers_fault(caplog):
    with serving(Fake(temp=-1.0)) as server:
        status, answer = ask(server)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "temp must be" in answer["error"]["message"]
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert isinstance(record.exc_info[1], ValueError)


WORDS = "Hé 🙂 well"


def sampled(text=WORDS):
    """The ids and texts of the tokens that the fake samples."""
    ids = [*tokenizer().encode(text, add_special_tokens=False), tokenizer().eos_token_id]
    return ids, [tokenizer().decode([token]) for token in ids]


def check_chat_content(content, alternatives):
    ids, texts = sampled()
    assert [entry["id"] for entry in content] == ids
    assert [entry["token"] for entry in content] == texts
    assert {entry["logprob"] for entry in content} == {-0.25}
    # The tokens of the emoji are parts of a character.
    assert any("\ufffd" in part for part in texts)
    whole = b"".join(bytes(entry["bytes"]) for entry in content)
    assert whole.decode() == tokenizer().decode(ids)
    for entry in content:
        tops = entry["top_logprobs"]
        assert [top["logprob"] for top in tops] == [-0.25, -2.0][:alternatives]
        assert all(top["token"] == tokenizer().decode([top["id"]]) for top in tops)


def test_log_probabilities_of_a_chat():
    with serving(Fake(WORDS)) as server:
        _, answer = ask(server, logprobs=True)
        check_chat_content(answer["choices"][0]["logprobs"]["content"], 0)
        _, answer = ask(server, logprobs=True, top_logprobs=2)
        check_chat_content(answer["choices"][0]["logprobs"]["content"], 2)
        assert "logprobs" not in ask(server)[1]["choices"][0]


def test_log_probabilities_of_a_streamed_chat_come_once():
    with serving(Fake(WORDS)) as server:
        data, _ = events(server, top_logprobs=2)
        chunks = [chunk["choices"][0] for chunk in data[:-1]]
        check_chat_content([x for chunk in chunks for x in chunk["logprobs"]["content"]], 2)
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        assert text == WORDS


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_of_a_completion(streamed):
    with serving(Fake("Hello you")) as server:
        if streamed:
            data, _ = events(server, TEXT, logprobs=2)
            choices = [chunk["choices"][0] for chunk in data[:-1]]
        else:
            choices = ask(server, path=TEXT, logprobs=2)[1]["choices"]
        whole = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for choice in choices:
            for name, entries in choice["logprobs"].items():
                whole[name] += entries
    _, texts = sampled("Hello you")
    assert whole["tokens"] == texts
    assert whole["token_logprobs"] == [-0.25] * len(texts)
    assert whole["top_logprobs"] == [{text: -0.25, "&": -2.0} for text in texts]
    for text, offset in zip(texts[:-1], whole["text_offset"], strict=False):
        assert "Hello you"[offset:].startswith(text)


def test_no_log_probability_is_beyond_json():
    with serving(Fake(logprobs=(float("-inf"), float("nan")))) as server:
        for path, fields in ((CHAT, {"top_logprobs": 2}), (TEXT, {"logprobs": 2})):
            assert ask(server, path=path, **fields)[0] == 200
        _, answer = ask(server, path=TEXT, logprobs=0)
        logprobs = answer["choices"][0]["logprobs"]
        assert set(logprobs["token_logprobs"]) == {-9999.0}
        assert set(logprobs["top_logprobs"]) == {None}


WEATHER = ("weather", '{"city": "Paris"}')


def whole(server, streamed, **fields):
    """The text, reasoning, calls, finish reason, log-probabilities and usage of an answer."""
    if streamed:
        data, _ = events(server, stream_options={"include_usage": True}, **fields)
        *chunks, last, _ = data
        choices, key = [chunk["choices"][0] for chunk in chunks], "delta"
    else:
        last = ask(server, **fields)[1]
        choices, key = last["choices"], "message"
    messages = [choice[key] for choice in choices]
    return (
        "".join(message.get("content") or "" for message in messages),
        "".join(message.get("reasoning", "") for message in messages),
        calls_of(messages),
        choices[-1]["finish_reason"],
        [x["id"] for choice in choices for x in choice["logprobs"]["content"]],
        last["usage"]["completion_tokens"],
    )


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("end", ["stop", None])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Hello.", ("Hello.", "", [], "stop")),
        ("if a <", ("if a <", "", [], "stop")),  # may begin <tool_call>
        ("<think>Hm. </", ("", "Hm. </", [], "stop")),
        (f"So: {CALL}<", ("So: <", "", [WEATHER], "tool_calls")),
        (CALL.removesuffix("</tool_call>"), ("", "", [WEATHER], "tool_calls")),
    ],
)
def test_no_text_is_lost_at_the_end(text, answer, end, streamed):
    ids = tokenizer().encode(text, add_special_tokens=False)
    ids += [tokenizer().eos_token_id] * (end == "stop")
    with serving(Fake(text, end=end)) as server:
        got = whole(server, streamed, tools=TOOLS, logprobs=True)
    assert got == (*answer, ids, len(ids))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_value_of_the_wrong_type_stays_the_text_it_is(streamed):
    tools = json.loads(json.dumps(TOOLS).replace('"string"', '"integer"'))
    with serving(Fake("So: " + CALL.replace("Paris", "inf"))) as server:
        got = whole(server, streamed, tools=tools, logprobs=True)
        assert got[:4] == ("So:", "", [("weather", '{"city": "inf"}')], "tool_calls")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "health", "status"),
    [
        (ValueError("too long\nsecond line"), "ok", 400),
        (TemplateError("roles must alternate"), "draining", 400),
        (RuntimeError("shutting down"), "draining", 503),
        (RuntimeError("thread died"), "unavailable", 503),
        (RuntimeError("a bug\nsecond line"), "ok", 500),
        (KeyError("a bug"), "draining", 500),
        (BrokenPipeError("of another kind"), "ok", 500),
    ],
)
def test_errors_before_the_first_token(error, health, status, streamed, caplog):
    with serving(Fake(before=error, health=health)) as server:
        got, headers, raw = exchange(
            server, "POST", CHAT, {"messages": MESSAGES, "stream": streamed}
        )
    answer = json.loads(raw)["error"]
    assert got == status
    assert headers.get_all("Content-Length") == [str(len(raw))]
    assert ("Retry-After" in headers) == (status == 503)
    assert str(error).splitlines()[0] in answer["message"]
    assert "second line" not in answer["message"]
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == (status >= 500)
    assert all(record.exc_info[1] is error for record in logged)


def test_a_prompt_beyond_the_context_has_openais_code():
    with serving(Fake(before=ContextLengthError("shorten it", 9, 8))) as server:
        status, answer = ask(server)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["message"] == "shorten it"


@pytest.mark.parametrize(
    ("error", "health", "status"),
    [
        (ValueError("odd\nsecond line"), "ok", 500),
        (RuntimeError("thread died"), "unavailable", 503),
        (ConnectionResetError("of another kind"), "ok", 500),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_errors_in_the_middle(error, health, status, at, caplog):
    generator = Fake(fail=error, at=at, health=health)
    with serving(generator) as server:
        got, answer = ask(server)
        assert got == status
        data, _ = events(server)
    assert len(data) == at + 1
    assert data[-1] == answer
    assert answer["error"]["type"] == "server_error"
    assert "second line" not in answer["error"]["message"]
    assert [ctx.stopped for ctx in generator.contexts] == [True, True]
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.exc_info[1] for record in logged] == [error, error]


def test_openai_chat_and_models():
    with serving() as server:
        with client(server) as openai_client:
            assert [model.id for model in openai_client.models.list()] == ["demo"]
            assert openai_client.models.retrieve("org/demo").id == "org/demo"
            answer = openai_client.chat.completions.create(
                model="demo", messages=MESSAGES, logprobs=True, top_logprobs=1
            )
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("Hello.", "stop")
        assert choice.logprobs.content[0].top_logprobs[0].logprob == -0.25
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_openai_completions():
    with serving() as server, client(server) as openai_client:
        answer = openai_client.completions.create(model="demo", prompt="Hi", logprobs=1)
        assert answer.choices[0].text == "Hello."
        assert answer.choices[0].logprobs.text_offset == [0, 1, 3, 5, 6]
        chunks = list(openai_client.completions.create(model="demo", prompt="Hi", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello."


def test_openai_streams():
    with serving() as server, client(server) as openai_client:
        stream = openai_client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello."
        assert last.usage.completion_tokens == 5


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_tools(streamed):
    text = f"<think>Hm.</think>Let me see.{CALL}"
    with serving(Fake(text)) as server, client(server) as openai_client:
        request = {"model": "demo", "messages": MESSAGES, "tools": TOOLS}
        if streamed:
            chunks = list(openai_client.chat.completions.create(**request, stream=True))
            deltas = [chunk.choices[0].delta for chunk in chunks]
            calls = calls_of([delta.to_dict() for delta in deltas])
            content = "".join(delta.content or "" for delta in deltas)
            reason = chunks[-1].choices[0].finish_reason
        else:
            (choice,) = openai_client.chat.completions.create(**request).choices
            calls, content = calls_of([choice.message.to_dict()]), choice.message.content
            reason = choice.finish_reason
        assert (content, reason, calls) == ("Let me see.", "tool_calls", [WEATHER])
        name, arguments = calls[0]
        call = {"id": "1", "type": "function"}
        call |= {"function": {"name": name, "arguments": arguments}}
        made = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
        again = request | {"messages": [*MESSAGES, made, result]}
        openai_client.chat.completions.create(**again)


def test_openai_errors():
    generator = Fake()
    with (
        serving(generator, Settings(names=NAMES, api_key="key")) as server,
        client(server, api_key="key") as openai_client,
    ):
        create = openai_client.chat.completions.create
        with pytest.raises(openai.BadRequestError, match="n must be 1"):
            create(model="demo", messages=MESSAGES, n=2)
        with pytest.raises(openai.NotFoundError, match="not served here") as caught:
            create(model="other", messages=MESSAGES)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai_client.with_options(api_key="other").models.list()
        generator.fail, generator.at = OSError("disk"), 2
        with pytest.raises(openai.InternalServerError, match="disk"):
            create(model="demo", messages=MESSAGES)
        with pytest.raises(openai.APIError, match="disk"):
            list(create(model="demo", messages=MESSAGES, stream=True))
