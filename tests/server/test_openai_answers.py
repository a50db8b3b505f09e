"""Answers end to end: what a model wrote, through the engine and the server, in OpenAI's client."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_scripted import scripted

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
