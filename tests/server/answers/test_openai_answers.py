"""Answers end to end: what a model wrote, through the engine and the server, in OpenAI's client."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from helpers_scripted import scripted
from helpers_server import until

CASES = json.loads(Path(__file__).with_name("answer_cases.json").read_text())
TEMPLATES = {("xml", False): "coder", ("json", False): "instruct", ("json", True): "thinking"}
NAMES = [case["name"] for case in CASES["cases"]]
QUESTION = [{"role": "user", "content": "Do it."}]


@pytest.fixture(scope="module")
def server():
    with scripted() as server:
        yield server


@pytest.fixture(scope="module")
def answers(server):
    """The answers of all cases, whole and streamed; they are asked for together."""

    def ask(case, seed):
        fields = {"template": TEMPLATES[case["format"], case["reasoning_open"]]}
        if case["tools"]:
            fields["tools"] = CASES["tools"][case["tools"]]
        return [create(QUESTION, seed, **fields) for create in (server.whole, server.streamed)]

    seeds = [server.say(case["text"]) for case in CASES["cases"]]
    with ThreadPoolExecutor(32) as pool:
        return dict(zip(NAMES, pool.map(ask, CASES["cases"], seeds), strict=True))


@pytest.mark.parametrize("case", CASES["cases"], ids=NAMES)
def test_cases(answers, case):
    whole, streamed = answers[case["name"]]
    assert streamed.seen == whole.seen
    expect = case["expect"]
    assert whole.content.strip() == (expect["content"] or "").strip()
    assert whole.reasoning.strip() == (expect["reasoning"] or "").strip()
    calls = [{"name": name, "arguments": json.loads(text)} for name, text in whole.calls]
    assert json.dumps(calls) == json.dumps(expect["tool_calls"])  # 5 and 5.0 differ
    assert whole.reason == ("tool_calls" if calls else "stop")


# --- ends -----------------------------------------------------------------------------------------
CALL = (
    "<tool_call>\n<function=write>\n<parameter=content>\none STOP two\n</parameter>\n"
    "</function>\n</tool_call>"
)
JSON_CALL = '<tool_call>\n{"name": "write", "arguments": {"content": "one STOP two"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "stop", "content", "reason"),
    [
        ("One. Two. Three.", "Two", "One. ", "stop"),
        ("One. Two. Three.", ["four", "Thr", "wo. T"], "One. T", "stop"),
        ("One. Two.", "Two. Three", "One. Two.", "stop"),
        ("One. Two.", "One", "", "stop"),
        ("Is 🙂 it?", "🙂", "Is ", "stop"),
    ],
)
def test_stop_strings(server, text, stop, content, reason):
    got = server.both(QUESTION, server.say(text), stop=stop)
    assert (got.content, got.reasoning, got.calls, got.reason) == (content, "", [], reason)


def test_a_stop_string_in_a_call_s_argument(server):
    """The argument is what came before it, and the call is not to be run."""
    tools = CASES["tools"]["F"]
    got = server.both(QUESTION, server.say(CALL), tools=tools, stop="STOP")
    assert (got.content, got.calls) == ("", [("write", '{"content": "one "}')])
    assert got.reason == "stop"
    got = server.both(
        QUESTION, server.say(JSON_CALL), tools=tools, stop="STOP", template="instruct"
    )
    assert (got.content, got.calls) == ("", [("write", '{"content": "one "}')])
    assert got.reason == "stop"


@pytest.mark.parametrize("stop", ["</tool_call>", "\n</function>\n</tool_call>"])
def test_a_stop_string_after_a_call_s_arguments(server, stop):
    tools = CASES["tools"]["F"]
    got = server.both(QUESTION, server.say(CALL + "\nMore."), tools=tools, stop=stop)
    assert (got.content, got.calls) == ("", [("write", '{"content": "one STOP two"}')])
    assert got.reason == "tool_calls"


@pytest.mark.parametrize("n", [1, 3, 8, 9, 12, 19, 21, 25])
def test_an_answer_that_max_tokens_cuts_off(server, n):
    """In its reasoning, its content, and in all parts of a call."""
    seed = server.say("<think>Hm.</think>So:\n" + CALL)
    got = server.both(QUESTION, seed, tools=CASES["tools"]["F"], max_tokens=n)
    assert (got.reason, got.usage.completion_tokens) == ("length", n)
    assert "Hm.".startswith(got.reasoning) and f"So:\n{CALL}".startswith(got.content)
    assert bool(got.content) == (n >= 6) and bool(got.calls) == (n >= 19)
    for name, arguments in got.calls:
        assert name == "write" and "one STOP two\n</".startswith(json.loads(arguments)["content"])


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        *(("[1, 2]", None), ("5", None), ("true", None), ('"text"', None), ("[]", None)),
        *(('"[1]"', None), ('"{\\"x\\": 1"', None), ("null", {}), ('"null"', {}), ("{}", {})),
        *(('{"x": [{"y": null}]}', {"x": [{"y": None}]}), ('{"": ""}', {"": ""})),
    ],
)
def test_arguments_of_every_shape(server, arguments, called):
    """Those that are no object are text; the chat goes on with either."""
    tools = CASES["tools"]["F"]
    text = f'<tool_call>\n{{"name": "write", "arguments": {arguments}}}\n</tool_call>'
    got = server.both(QUESTION, server.say(text), tools=tools, template="instruct")
    calls = [(name, json.loads(given)) for name, given in got.calls]
    assert calls == ([] if called is None else [("write", called)])
    assert (got.content, got.reason) == ((text, "stop") if called is None else ("", "tool_calls"))
    for template in ("instruct", "default"):
        history = [*QUESTION, got.message, *QUESTION]
        assert server.both(history, tools=tools, template=template).content == "Yes."


@pytest.mark.parametrize("text", ["Hé 🙂 well 数", "🙂", "a"])
def test_log_probabilities_of_parts_of_characters(server, text):
    got = server.both(QUESTION, server.say(text), logprobs=True, top_logprobs=2)
    spelled = b"".join(bytes(entry.bytes) for entry in got.logprobs[:-1])
    assert spelled.decode() == text == got.content
    assert len(got.logprobs) == got.usage.completion_tokens
    assert any("\ufffd" in entry.token for entry in got.logprobs) == (text != "a")
    for entry in got.logprobs:
        assert (entry.logprob, entry.top_logprobs[0].token) == (0.0, entry.token)
        assert entry.top_logprobs[0].bytes == entry.bytes


# --- clients that leave ---------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["On and", "<think>On and", CALL.partition("two")[0]])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_answer_of_a_client_that_leaves_is_dropped(server, text, streamed):
    """In text, in reasoning and in a call, all of which would fill the context."""
    seed = server.say(text, ends=False)
    fields = {"model": "demo", "messages": QUESTION, "seed": seed, "tools": CASES["tools"]["F"]}
    engine, count = server.engine, len(server.engine.read)
    if streamed:
        with server.client.chat.completions.create(**fields, stream=True) as chunks:
            assert next(chunks).choices[0].finish_reason is None
    else:
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.1).chat.completions.create(**fields)
    until(lambda: len(engine.read) > count)
    request = engine.read[count]
    until(lambda: request.context.stopped)
    until(lambda: not (engine._running or engine._waiting or engine._arrived.qsize()))
    assert request.generated < request.max_tokens
    assert server.both(QUESTION).content == "Yes."
