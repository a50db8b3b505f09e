"""Structured output over HTTP: the fields of each protocol, reasoning, refusals, cut answers."""

import json

import pydantic
import pytest
from helpers_protocols import MESSAGES_PATH, RESPONSES_PATH, message_of, post, response_of, stream
from helpers_scripted import scripted
from helpers_server import CHAT

from mlx_qwen3next.server.grammars import compiled

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
RIGHT = '{"city": "Ulm", "warm": true}'
FUNCTION = {"name": "f", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
FORMATS = {  # by path: the field with the format, for a schema
    CHAT: lambda schema: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    },
    MESSAGES_PATH: lambda schema: {
        "output_config": {"format": {"type": "json_schema", "schema": schema}}
    },
    RESPONSES_PATH: lambda schema: {
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    },
}
PATHS = pytest.mark.parametrize("path", list(FORMATS))


@pytest.fixture(scope="module")
def server():
    with scripted() as server:
        yield server


@pytest.fixture
def without(monkeypatch):
    """Removes llguidance."""
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)


def body(path, seed=0, template="coder", **fields):
    said = [{"role": "user", "content": "Where?"}]
    asked = {"input": said} if path == RESPONSES_PATH else {"messages": said, "max_tokens": 60}
    options = {"seed": seed, "chat_template_kwargs": {"chat_template": template}}
    return asked | options | fields


def text_of(path, answer):
    """The text of an answer and how it has ended."""
    if path == CHAT:
        (choice,) = answer["choices"]
        return choice["message"]["content"], choice["finish_reason"]
    if path == MESSAGES_PATH:
        return "".join(b.get("text", "") for b in answer["content"]), answer["stop_reason"]
    texts = [part["text"] for item in answer["output"] for part in item["content"]]
    return texts[-1], answer["status"]


def refused(server, path, **fields):
    status, answer = post(server.address, path, body(path, **fields))
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    if path != MESSAGES_PATH:
        param = "tools" if "tools" in fields else next(iter(fields))
        assert answer["error"]["param"].split(".")[0] == param
    return answer["error"]["message"]


@PATHS
def test_answers_fit_the_schema_whatever_the_model_wants(server, path):
    """The model's text is left where it breaks the rules."""
    ends = {CHAT: "stop", MESSAGES_PATH: "end_turn", RESPONSES_PATH: "completed"}
    fields = FORMATS[path](SCHEMA)
    status, answer = post(server.address, path, body(path, server.say(RIGHT), **fields))
    assert (status, text_of(path, answer)) == (200, (RIGHT, ends[path]))
    # It would go on for ever, but the grammar ends with the last bracket.
    seed = server.prefer(RIGHT + " And more.")
    status, answer = post(server.address, path, body(path, seed, **fields))
    assert (status, text_of(path, answer)) == (200, (RIGHT, ends[path]))
    if path != CHAT:
        read = {MESSAGES_PATH: message_of, RESPONSES_PATH: response_of}[path]
        answer = read(stream(server.address, path, body(path, seed, stream=True, **fields)))
        assert text_of(path, answer) == (RIGHT, ends[path])
    wrong = RIGHT.replace("true", "1")
    status, answer = post(server.address, path, body(path, server.prefer(wrong), **fields))
    assert type(json.loads(text_of(path, answer)[0])["warm"]) is bool


@PATHS
def test_cut_answers_say_so(server, path):
    ends = {CHAT: "length", MESSAGES_PATH: "max_tokens", RESPONSES_PATH: "incomplete"}
    limit = {"max_output_tokens" if path == RESPONSES_PATH else "max_tokens": 4}
    fields = FORMATS[path](SCHEMA) | limit
    status, answer = post(server.address, path, body(path, server.say(RIGHT), **fields))
    text, end = text_of(path, answer)
    assert (status, end) == (200, ends[path]) and RIGHT.startswith(text) and text != RIGHT


@PATHS
def test_reasoning_comes_before_the_format(server, path):
    seed = server.say("Hm.\n</think>\n\n" + RIGHT)
    asked = body(path, seed, "thinking", **FORMATS[path](SCHEMA))
    status, answer = post(server.address, path, asked)
    assert (status, text_of(path, answer)[0]) == (200, RIGHT)
    assert '"Hm."' in json.dumps(answer)
    # Turned off, it is closed in the prompt already.
    asked = body(path, server.say(RIGHT), "thinking", **FORMATS[path](SCHEMA))
    asked["chat_template_kwargs"] |= {"enable_thinking": False}
    status, answer = post(server.address, path, asked)
    assert (status, text_of(path, answer)[0]) == (200, RIGHT)


@PATHS
def test_what_a_schema_asks_in_vain_is_refused_with_its_place(server, path):
    schema = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    message = refused(server, path, **FORMATS[path](schema))
    assert '#/properties/a cannot be enforced: Unimplemented keys: ["uniqueItems"]' in message
    names = {CHAT: "response_format.json_schema", MESSAGES_PATH: "output_config.format"}
    assert message.startswith(names.get(path, "text.format") + ".schema: ")
    # In a tool that is strict, too.
    tool = {CHAT: {"type": "function", "function": FUNCTION | {"parameters": schema}}}
    tool[CHAT]["function"]["strict"] = True
    tool[MESSAGES_PATH] = {"name": "f", "input_schema": schema, "strict": True}
    tool[RESPONSES_PATH] = {"type": "function", "strict": True} | FUNCTION | {"parameters": schema}
    message = refused(server, path, template="instruct", tools=[tool[path]])
    assert message.startswith("the parameters of the tool 'f': #/properties/a cannot be enforced")


@PATHS
def test_without_llguidance_a_format_is_refused_with_the_remedy(server, path, without):
    message = refused(server, path, **FORMATS[path](SCHEMA))
    assert "pip install 'mlx-qwen3next[server]'" in message
    assert message.startswith(next(iter(FORMATS[path](SCHEMA))))


class Weather(pydantic.BaseModel):
    city: str
    warm: bool


def test_the_parse_helpers_of_openai_s_client(server):
    asked = {"model": "demo", "extra_body": {"seed": server.prefer(RIGHT)}, "temperature": 0}
    said = [{"role": "user", "content": "Where?"}]
    chat = server.client.chat.completions.parse(messages=said, response_format=Weather, **asked)
    response = server.client.responses.parse(input=said, text_format=Weather, **asked)
    for parsed in (chat.choices[0].message.parsed, response.output_parsed):
        assert parsed == Weather(city="Ulm", warm=True)


def test_json_objects_and_text(server):
    for form in ({"type": "json_object"}, {"type": "text"}):
        status, answer = post(
            server.address, CHAT, body(CHAT, server.prefer('["x"]'), response_format=form)
        )
        assert status == 200
        text, _ = text_of(CHAT, answer)
        assert (text == '["x"]') == (form["type"] == "text")
        assert form["type"] == "text" or text.startswith("{")


def test_a_format_and_a_message_that_is_continued_do_not_go_together(server):
    asked = body(CHAT, continue_final_message=True, **FORMATS[CHAT](SCHEMA))
    asked["messages"].append({"role": "assistant", "content": "{"})
    status, answer = post(server.address, CHAT, asked)
    assert (status, answer["error"]["param"]) == (400, "response_format.json_schema.schema")
    assert "goes on with a message" in answer["error"]["message"]


@pytest.mark.parametrize("template", ["coder", "instruct"])
def test_calls_are_what_is_asked_for_whatever_the_model_wants(server, template):
    """A name among several, one call, and arguments that fit, where the model wants others."""
    other = {"type": "function", "function": {"name": "other", "parameters": SCHEMA}}
    wanted = {
        "coder": "<tool_call>\n<function=other>\n<parameter=city>\nUlm\n</parameter>\n",
        "instruct": '<tool_call>\n{"name": "other", "arguments": {"city": "Ulm"}}\n</tool_call>',
    }[template]
    asked = body(CHAT, server.prefer(wanted), template, tools=[other, TOOL])
    asked |= {"tool_choice": {"type": "function", "function": {"name": "f"}}, "max_tokens": 200}
    asked |= {"parallel_tool_calls": False}
    status, answer = post(server.address, CHAT, asked)
    assert status == 200
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "f")
    arguments = json.loads(call["function"]["arguments"])
    assert arguments.keys() == {"city", "warm"} and type(arguments["warm"]) is bool
