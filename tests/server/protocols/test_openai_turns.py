"""Loops of tool calls with OpenAI's client: what comes back of an answer is known token for token.

``cached_tokens`` tells how much of a prompt was not processed again.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_scripted import scripted

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    **{"path": {"type": "string"}, "n": {"type": "integer"}},
                    "o": {"type": "object"},
                },
            },
        },
    }
]


def xml(**arguments):
    parts = [f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items()]
    return f"<tool_call>\n<function=write>\n{''.join(parts)}</function>\n</tool_call>"


def in_json(arguments):
    return f'<tool_call>\n{{"name": "write", "arguments": {arguments}}}\n</tool_call>'


# The answers of a loop, in the form in which each template writes them.
XML = [
    "Let me see.\n\n" + xml(path="/a <b>", n=5, o='{"a": [1, null]}'),
    xml(path="\n two\n"),
    "Two.\n\n" + xml() + "\n" + xml(n=-1),
    xml(path="é 🙂 </tool_call>"),
    "Done.",
]
JSON = [
    "Let me see.\n" + in_json('{"path": "/a <b>", "n": 5, "o": {"a": [1, null]}}'),
    in_json('{"path": "\\n two\\n"}'),
    "Two.\n" + in_json("{}") + "\n" + in_json('{"n": -1}'),
    in_json('{"path": "é 🙂 </tool_call>"}'),
    "Done.",
]
LOOPS = {"coder": XML, "instruct": JSON, "thinking": JSON}
OPENING = 2  # tokens with which the template opens the reasoning
THOUGHT = "Hm,\nso.\n</think>\n\n"


def functions(message):
    return [call.model_dump() for call in message.tool_calls or []]


def plain(message, **content):
    """A dict made by hand.

    Args:
        content: in place of no content.
    """
    made = {"role": "assistant"} | content
    made |= {"content": message.content} if message.content else {}
    made |= {"reasoning_content": message.reasoning} if hasattr(message, "reasoning") else {}
    return made | ({"tool_calls": functions(message)} if message.tool_calls else {})


def with_arguments(message, form):
    """A dict whose calls have their arguments in another form."""
    made = plain(message, content=None)
    for call in made.get("tool_calls", []):
        call["function"]["arguments"] = form(json.loads(call["function"]["arguments"]))
    return made


ECHOES = {
    "the object": lambda message: message,
    "model_dump": lambda message: message.model_dump(),
    "model_dump without None": lambda message: message.model_dump(exclude_none=True),
    "to_dict": lambda message: message.to_dict(),
    "content null": lambda message: plain(message, content=None),
    "content empty": lambda message: plain(message, content=""),
    "content missing": lambda message: plain(message),
    "content in parts": lambda message: (
        plain(message) | {"content": [{"type": "text", "text": message.content or ""}]}
    ),
    "arguments as objects": lambda message: with_arguments(message, dict),
    "arguments written again": lambda message: with_arguments(message, json.dumps),
    "streamed object": lambda message: message,
    "streamed model_dump": lambda message: message.model_dump(),
    "streamed by hand": lambda message: plain(message, content=None),
}


@pytest.fixture(scope="module")
def server():
    with scripted() as server:
        yield server


def chat(server, number, template, echo):
    """A question, its loop of calls, and another question; returns the answers."""
    messages, answers = [{"role": "user", "content": f"{number}: do it."}], []
    for script in (*LOOPS[template], "Yes."):
        seed = server.say((THOUGHT if template == "thinking" else "") + script)
        ask = server.streamed if echo.startswith("streamed") else server.whole
        got = ask(messages, seed, tools=TOOLS, template=template)
        answers.append(got)
        messages.append(ECHOES[echo](got.message))
        results = [{"role": "tool", "tool_call_id": "1", "content": "ok"} for _ in got.calls]
        messages += results or [{"role": "user", "content": "Again."}]
    return answers


CHATS = list(itertools.product(LOOPS, ECHOES))


@pytest.fixture(scope="module")
def chats(server):
    """The answers of all chats, which go on at the same time; each begins in a way of its own."""
    with ThreadPoolExecutor(len(CHATS)) as pool:
        runs = [pool.submit(chat, server, i, *key) for i, key in enumerate(CHATS)]
    return dict(zip(CHATS, runs, strict=True))


def cached(got):
    return got.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize(("template", "echo"), CHATS)
def test_each_turn_processes_its_new_tokens_alone(chats, template, echo):
    answers = chats[template, echo].result()
    assert [len(got.calls) for got in answers] == [1, 1, 2, 1, 0, 0]
    assert [got.reason for got in answers] == ["tool_calls"] * 4 + ["stop"] * 2
    turns = list(itertools.pairwise(answers))
    if template == "thinking":  # once there is another question, the reasoning is left out
        turns.pop()
        assert cached(answers[-1]) == answers[0].usage.prompt_tokens - OPENING
    for before, got in turns:
        assert cached(got) == before.usage.total_tokens


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("template", "script"),
    [
        ("instruct", '<tool_call>{"name":"write","arguments":{"n":1}}</tool_call>'),
        ("instruct", 'So:\n\n\n<tool_call>\n{"arguments": {"n": 1}, "name": "write"}\n'),
        ("coder", "<tool_call><function=write><parameter=n>1</parameter></function></tool_call>"),
        ("default", "<function=write>\n<parameter=n>\n1\n</parameter>\n"),
        ("default", "<think>\nHm.\n</think>\n\n" + xml(n=1)),
        ("thinking", "\n\nHm.\n\n\n</think>\n" + in_json('{"n": 1}')),
    ],
)
def test_a_prompt_is_known_though_the_template_writes_its_answer_in_another_way(
    server, template, script, streamed
):
    messages = [{"role": "user", "content": f"{script} {streamed}"}]
    ask = server.streamed if streamed else server.whole
    first = ask(messages, server.say(script), tools=TOOLS, template=template)
    assert first.calls == [("write", '{"n": 1}')]
    messages += [first.message, {"role": "tool", "tool_call_id": "1", "content": "ok"}]
    second = ask(messages, tools=TOOLS, template=template)
    # A prompt's own end is its last token, or before the tag that opens the reasoning.
    end = OPENING if template == "thinking" else 1
    assert cached(second) == first.usage.prompt_tokens - end


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_is_known_though_its_reasoning_does_not_come_back(server, streamed):
    messages = [{"role": "user", "content": f"Without reasoning, {streamed}."}]
    ask = server.streamed if streamed else server.whole
    answers = []
    for script in JSON:
        answers.append(
            ask(messages, server.say(THOUGHT + script), tools=TOOLS, template="thinking")
        )
        message = answers[-1].message.model_dump(exclude_none=True)
        messages.append({name: x for name, x in message.items() if name != "reasoning"})
        messages.append({"role": "tool", "tool_call_id": "1", "content": "ok"})
    for before, got in itertools.pairwise(answers):
        assert cached(got) == before.usage.prompt_tokens - OPENING
