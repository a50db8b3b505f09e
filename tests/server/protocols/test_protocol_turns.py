"""Messages and Responses end to end: second turns cost their new tokens; calls that are forced."""

import json

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
from helpers_scripted import CONTEXT, scripted
from helpers_server import CHAT, exchange

from mlx_qwen3next.server.grammars import compiled

SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
XML = "<tool_call>\n<function=f>\n<parameter=x>\nls <b>\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{"name": "f", "arguments": {"x": "ls <b>"}}\n</tool_call>'
THOUGHT = "Hm,\nso.\n</think>\n\n"
CALLS = {"coder": XML, "instruct": JSON, "thinking": JSON}
TEMPLATES = pytest.mark.parametrize("template", list(CALLS))
BILLING = "x-anthropic-billing-header: cc_version=2.1.332.{}; cc_entrypoint=sdk-cli;"


@pytest.fixture(scope="module")
def server():
    with scripted() as server:
        yield server


def answers(template):
    """What the model says in two turns of a loop."""
    thought = THOUGHT if template == "thinking" else ""
    blank = "\n\n" if template == "coder" else "\n"
    return f"{thought}Let me see.{blank}{CALLS[template]}", f"{thought}Done."


def asking(server, seed, template, **fields):
    options = {"chat_template_kwargs": {"chat_template": template}}
    return {"seed": seed, "temperature": 0} | options | fields


def generated(text, server):
    """The number of a script's tokens and of its end."""
    return len(server.engine.scripts[server.say(text)][0])


@TEMPLATES
@pytest.mark.parametrize("streamed", [False, True])
def test_the_second_turn_of_messages(server, template, streamed):
    first, second = answers(template)
    tools = [{"name": "f", "input_schema": SCHEMA}]
    question = f"Messages {template} {streamed}"
    reminder = [{"type": "text", "text": "Remember.", "cache_control": {"type": "ephemeral"}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "system", "content": reminder},
    ]

    def turn(text, number):
        system = [BILLING.format(number), "Be brief."]
        blocks = [{"type": "text", "text": block} for block in system]
        body = asking(server, server.say(text), template, messages=messages, tools=tools)
        body |= {"system": blocks, "max_tokens": 200}
        if streamed:
            return message_of(stream(server.address, MESSAGES_PATH, body))
        return post(server.address, MESSAGES_PATH, body)[1]

    answer = turn(first, "93d")
    assert answer["stop_reason"] == "tool_use"
    prompt = sum(answer["usage"][f"{kind}input_tokens"] for kind in ("", "cache_read_"))
    (use,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert use["input"] == {"x": "ls <b>"}
    # What Claude Code sends next: the same texts in other forms.
    messages[0]["content"][0]["cache_control"] = {"type": "ephemeral"}
    messages[1]["content"] = "Remember."
    result = {"tool_use_id": use["id"], "type": "tool_result", "content": "a.py"}
    messages += [
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result]},
    ]
    usage = turn(second, "12a")["usage"]
    known = prompt + generated(first, server)
    assert usage["cache_read_input_tokens"] >= known - 1  # the last token was not processed
    text = server.prompt()
    assert "billing" not in text and text.count("Remember.") == 1


@TEMPLATES
@pytest.mark.parametrize("form", ["items", "sealed", "previous"])
def test_the_second_turn_of_responses(server, template, form):
    first, second = answers(template)
    tools = [{"type": "function", "name": "f", "parameters": SCHEMA}]
    question = f"Responses {template} {form}"
    items = [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": question}]},
    ]

    def turn(text, given, **fields):
        body = asking(server, server.say(text), template, input=given, tools=tools)
        body |= {"include": ["reasoning.encrypted_content"], "store": form == "previous"}
        return response_of(stream(server.address, RESPONSES_PATH, body | fields))

    answer = turn(first, items)
    assert answer["status"] == "completed"
    (call,) = [item for item in answer["output"] if item["type"] == "function_call"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "a.py"}
    if form == "previous":
        usage = turn(second, [result], previous_response_id=answer["id"])["usage"]
    else:
        output = json.loads(json.dumps(answer["output"]))
        for item in output if form == "sealed" else ():  # as Codex sends it back
            if item["type"] == "reasoning":
                del item["content"]
        usage = turn(second, [*items, *output, result])["usage"]
    known = answer["usage"]["input_tokens"] + generated(first, server)
    assert usage["input_tokens_details"]["cached_tokens"] >= known - 1


VALUES = {"on": "boolean", "size": "number", "names": "array", "path": "string"}
WRITTEN = {
    "coder": "<tool_call>\n<function=g>\n<parameter=on>\nfalse\n</parameter>\n<parameter=size>\n"
    '1.0\n</parameter>\n<parameter=names>\n["a","b"]\n</parameter>\n<parameter=path>\n1.0\n'
    "</parameter>\n</function>\n</tool_call>",
    "instruct": '<tool_call>\n{"name": "g", "arguments": {"on": false, "size": 1.0, "names": '
    '["a", "b"], "path": "1.0"}}\n</tool_call>',
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES_PATH, RESPONSES_PATH])
@pytest.mark.parametrize("template", list(WRITTEN))
def test_values_come_back_as_the_model_wrote_them(server, template, path):
    """A client in JavaScript writes 1.0 as 1, and templates have their own way with values."""
    schema = {"properties": {name: {"type": kind} for name, kind in VALUES.items()}}
    sent = {"on": False, "size": 1, "names": ["a", "b"], "path": "1.0"}
    question = {"role": "user", "content": f"Values {template} {path}"}
    function = {"name": "g", "parameters": schema}
    seed = server.say(WRITTEN[template])
    body = asking(server, seed, template, messages=[question], max_tokens=200)
    if path == RESPONSES_PATH:
        items = [question]
        body |= {"input": items, "tools": [{"type": "function"} | function]}
        answer = post(server.address, path, body)[1]
        (call,) = answer["output"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
        items += [call | {"arguments": json.dumps(sent)}, output]
    elif path == MESSAGES_PATH:
        body["tools"] = [{"name": "g", "input_schema": schema}]
        answer = post(server.address, path, body)[1]
        (use,) = answer["content"]
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "ok"}
        body["messages"] += [{"role": "assistant", "content": [use | {"input": sent}]}]
        body["messages"] += [{"role": "user", "content": [result]}]
    else:
        body["tools"] = [{"type": "function", "function": function}]
        message = post(server.address, path, body)[1]["choices"][0]["message"]
        message["tool_calls"][0]["function"]["arguments"] = json.dumps(sent)
        body["messages"] += [message, {"role": "tool", "tool_call_id": "1", "content": "ok"}]
    first = server.engine.read[-1].context.prompt
    post(server.address, path, body)
    assert (
        server.engine.read[-1].context.cached >= len(first) + len(server.engine.scripts[seed]) - 1
    )


# --- calls that are forced ------------------------------------------------------------------------
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
def without_grammars(monkeypatch):
    """The server as it is where llguidance is not installed."""
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)


def forced_call(server, says, template, choice):
    """The answer to a request that forces a call of f: by any call, by f alone, or by its name."""
    return server.both(
        [{"role": "user", "content": "Do it."}],
        server.say(says),
        template=template,
        tools=[FUNCTION] if choice == "only" else [FUNCTION, OTHER],
        tool_choice=NAMED if choice == "named" else "required",
    )


CHOICES = pytest.mark.parametrize("choice", ["required", "only", "named"])


@TEMPLATES
@CHOICES
def test_a_forced_call(server, template, choice):
    """The model says the call, after its reasoning, and nothing else."""
    says = (THOUGHT if template == "thinking" else "") + CALLS[template]
    got = forced_call(server, says, template, choice)
    assert (got.content, got.reasoning) == ("", "Hm,\nso." if template == "thinking" else "")
    assert (got.reason, got.calls) == ("tool_calls", [("f", '{"x": "ls <b>"}')])


@TEMPLATES
@CHOICES
def test_a_forced_call_without_grammars(server, template, choice, without_grammars):
    """The answer is begun with the call, and the model says the rest alone."""
    begun = {"coder": "<tool_call>\n<function", "instruct": '<tool_call>\n{"name": "'}
    if choice != "required":
        begun["coder"] += "=f>\n"
        begun["instruct"] += 'f", "arguments":'
    begun["thinking"] = begun["instruct"]
    call = CALLS[template]
    assert call.startswith(begun[template])
    got = forced_call(server, call.removeprefix(begun[template]), template, choice)
    assert (got.content, got.reasoning) == ("", "")
    assert (got.reason, got.calls) == ("tool_calls", [("f", '{"x": "ls <b>"}')])
    closed = "<think>\n\n</think>\n\n" if template == "thinking" else ""
    assert server.prompt().endswith(f"assistant\n{closed}{begun[template]}")


@pytest.mark.parametrize("template", ["coder", "instruct"])
def test_the_turn_after_a_forced_call(server, template, without_grammars):
    opening = {"coder": "<tool_call>\n<function", "instruct": '<tool_call>\n{"name": "'}[template]
    rest = CALLS[template].removeprefix(opening)
    messages = [{"role": "user", "content": f"Call, {template}."}]
    fields = {"template": template, "tools": [FUNCTION, OTHER]}
    got = server.whole(messages, server.say(rest), tool_choice="required", **fields)
    result = {"role": "tool", "tool_call_id": "1", "content": "done"}
    usage = server.whole([*messages, got.message, result], **fields).usage
    known = got.usage.prompt_tokens + generated(rest, server)
    assert usage.prompt_tokens_details.cached_tokens >= known - 1


@pytest.mark.parametrize("path", [MESSAGES_PATH, RESPONSES_PATH])
def test_a_forced_call_in_other_protocols(server, path):
    seed = server.say(XML)
    if path == MESSAGES_PATH:
        body = {"messages": [{"role": "user", "content": "Do it."}], "max_tokens": 100}
        body |= {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
    else:
        tools = [{"type": "function", "name": "f", "parameters": SCHEMA}]
        body = {"input": "Do it.", "tools": tools, "tool_choice": "required"}
    body |= asking(server, seed, "coder")
    streamed = {MESSAGES_PATH: message_of, RESPONSES_PATH: response_of}[path]
    for answer in (
        post(server.address, path, body)[1],
        streamed(stream(server.address, path, body)),
    ):
        assert seen(answer) == [("call", "f", {"x": "ls <b>"})]


def test_a_name_in_control_tokens_is_text(server, without_grammars):
    name = "<|im_end|>"
    seed = server.say("</function>\n</tool_call>")
    tool = {"type": "function", "function": {"name": name}}
    server.whole([{"role": "user", "content": "Do."}], seed, tools=[tool], tool_choice="required")
    forced = server.count("<|im_end|>")
    server.whole([{"role": "user", "content": "Do."}], tools=[FUNCTION])
    assert server.count("<|im_end|>") == forced


def test_a_call_cannot_be_forced_where_an_answer_goes_on(server):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    body = {"messages": messages, "tools": [FUNCTION], "tool_choice": "required"}
    for fields in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        status, answer = post(server.address, CHAT, body | fields)
        assert (status, answer["error"]["param"]) == (400, "tool_choice")
        assert "goes on with a message" in answer["error"]["message"]


# --- counts, ends and thinking --------------------------------------------------------------------
def test_tokens_are_counted_before_they_are_processed(server):
    body = {"messages": [{"role": "user", "content": "Count this."}], "max_tokens": 100}
    status, counted = post(server.address, f"{MESSAGES_PATH}/count_tokens", body)
    usage = post(server.address, MESSAGES_PATH, body)[1]["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert (status, counted) == (200, {"input_tokens": prompt})
    body["messages"][0]["content"] *= CONTEXT
    status, counted = post(server.address, f"{MESSAGES_PATH}/count_tokens", body)
    assert status == 200 and counted["input_tokens"] > CONTEXT
    status, refused = post(server.address, MESSAGES_PATH, body)
    assert (status, refused["error"]["message"]) == (
        400,
        f"prompt is too long: {counted['input_tokens']} tokens > {CONTEXT} maximum",
    )
    _, _, raw = exchange(server.address, "GET", "/v1/models")
    assert json.loads(raw)["data"][0]["max_model_len"] == CONTEXT


def test_the_stop_sequence_that_ended_a_message(server):
    body = {"messages": [{"role": "user", "content": "Do it."}], "max_tokens": 100}
    body |= asking(server, server.say("One STOP two END"), "coder", stop_sequences=["END", "STOP"])
    for answer in (
        post(server.address, MESSAGES_PATH, body)[1],
        message_of(stream(server.address, MESSAGES_PATH, body)),
    ):
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "STOP")
        assert seen(answer) == [("text", "One ")]


@pytest.mark.parametrize("path", [MESSAGES_PATH, RESPONSES_PATH])
def test_thinking_can_be_off(server, path):
    body = {"messages": [{"role": "user", "content": "Do it."}], "max_tokens": 100}
    off = {"thinking": {"type": "disabled"}}
    if path == RESPONSES_PATH:
        body, off = {"input": "Do it."}, {"reasoning": {"effort": "none"}}
    on = server.say(f"{THOUGHT}Yes.")
    answer = post(server.address, path, body | asking(server, on, "thinking"))[1]
    assert [kind for kind, _ in seen(answer)] == ["reasoning", "text"]
    seed = server.say("Yes.")
    answer = post(server.address, path, body | asking(server, seed, "thinking") | off)[1]
    assert seen(answer) == [("text", "Yes.")]
    assert server.prompt().endswith("<think>\n\n</think>\n\n")


# --- log-probabilities ----------------------------------------------------------------------------
@TEMPLATES
def test_the_log_probabilities_of_a_response_are_those_of_its_text(server, template):
    thought = THOUGHT if template == "thinking" else ""
    text = "Héllo 🙂, you see.\n"
    seed = server.say(f"{thought}{text}\n{CALLS[template]}")
    tools = [{"type": "function", "name": "f", "parameters": SCHEMA}]
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "tools": tools}
    body = asking(server, seed, template, input="Do it.") | wanted
    whole = post(server.address, RESPONSES_PATH, body)[1]
    streamed = response_of(stream(server.address, RESPONSES_PATH, body))
    for answer in (whole, streamed):
        (message,) = [item for item in answer["output"] if item["type"] == "message"]
        (content,) = message["content"]
        spelled = bytes(byte for entry in content["logprobs"] for byte in entry["bytes"])
        assert spelled.decode().strip() == content["text"].strip() == text.strip()
        assert all(len(entry["top_logprobs"]) == 2 for entry in content["logprobs"])
