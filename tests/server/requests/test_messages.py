"""The messages and tools of a chat: their checks, and the form that chat templates read."""

import pytest
from helpers_server import MESSAGES, tokenizer

from mlx_qwen3next.server.requests.checks import RequestError
from mlx_qwen3next.server.requests.fields import normalise

FUNCTION = {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}


def chat(**fields):
    return normalise({"messages": MESSAGES} | fields, chat=True, names=("demo",))


def message(**fields):
    """The one message of a chat, after normalising."""
    (message,) = chat(messages=[fields])["messages"]
    return message


def refused(**fields):
    """The error that a message raises."""
    with pytest.raises(RequestError) as caught:
        message(**fields)
    return caught.value


def rendered(messages, tools=None):
    """The text that the bundled model's template makes."""
    return tokenizer().apply_chat_template(messages, tools=tools, tokenize=False)


def with_value(fields, place, value):
    """A copy of fields with another value at a place, such as ``parameters.properties``."""
    name, _, rest = place.partition(".")
    return fields | {name: with_value(fields[name], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "role"),
        ({"role": "model", "content": "x"}, "role"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "tool", "content": {}}, "content"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": ["x"]}, "content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
        ({"role": "user", "content": [{"text": "x"}]}, "content[0].type"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, "content[0].refusal"),
        (
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "http://x"}}]},
            "content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": {"type": "image"}}]},
            "content[0].text",
        ),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool_calls[0].function.name"),
        ({"role": "assistant", "function_call": "f"}, "function_call"),
        ({"role": "assistant", "function_call": {}}, "function_call.name"),
    ],
)
def test_the_path_of_a_fault_in_a_message_is_named(fields, param):
    error = refused(**fields)
    assert error.param == f"messages[0].{param}"
    assert str(error).startswith(f"{error.param} must be ")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, {}),
        ({"arguments": ""}, {}),
        ({"arguments": " \n"}, {}),
        ({"arguments": None}, {}),
        ({"arguments": "null"}, {}),
        ({"arguments": "{}"}, {}),
        ({"arguments": '{"x": 1}'}, {"x": 1}),
        ({"arguments": {"x": 1}}, {"x": 1}),
    ],
)
def test_arguments_of_a_call_become_an_object(given, taken):
    call = {"id": "1", "function": {"name": "f"} | given}
    (seen,) = message(role="assistant", tool_calls=[call])["tool_calls"]
    assert seen == {"id": "1", "function": {"name": "f", "arguments": taken}}


@pytest.mark.parametrize(
    "given",
    [
        *('{"path": "a.py", "content": "imp', "ls -l", "[1, 2]", "1", '"x"', "true", "{'x': 1}"),
        *('{"x": NaN}', '{"x": "\\ud800"}', "[" * 200, "}" * 3),
    ],
)
def test_arguments_that_are_no_object_are_shown_as_they_came(given):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    answered = {"role": "tool", "tool_call_id": "1", "content": "no JSON"}
    messages = chat(messages=[*MESSAGES, asked, answered])["messages"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"arguments": given}
    text = rendered(messages)
    assert f"<function=f>\n<parameter=arguments>\n{given}\n</parameter>" in text


@pytest.mark.parametrize(
    ("given", "shown"), [([1, "é"], '[1, "é"]'), (5, "5"), (0, "0"), ([], "[]"), (False, "false")]
)
def test_arguments_of_another_type_are_shown_as_json(given, shown):
    call = {"function": {"name": "f", "arguments": given}}
    (seen,) = message(role="assistant", tool_calls=[call])["tool_calls"]
    assert seen["function"]["arguments"] == {"arguments": shown}


def test_calls_of_the_older_form_are_tool_calls_and_their_results():
    function = {"name": "f", "arguments": '{"x": "1"}'}
    asked = {"role": "assistant", "content": None}
    answered = {"content": [{"type": "text", "text": "done"}]}
    older = [
        asked | {"function_call": function},
        answered | {"role": "function", "name": "f"},
    ]
    newer = [
        asked | {"tool_calls": [{"type": "function", "function": function}]},
        answered | {"role": "tool", "name": "f"},
    ]
    messages = chat(messages=MESSAGES + older)["messages"]
    assert messages == chat(messages=MESSAGES + newer)["messages"]
    assert messages[2] == {"role": "tool", "name": "f", "content": "done"}
    text = rendered(messages)
    assert "<function=f>\n<parameter=x>\n1\n</parameter>" in text
    assert "<tool_response>\ndone\n</tool_response>" in text
    assert message(role="assistant", content="a", function_call=None) == {
        "role": "assistant",
        "content": "a",
    }


ROLES = ["system", "developer", "user", "assistant", "tool", "function"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fields", [{}, {"content": None}, {"content": []}])
def test_no_content_is_an_empty_one(role, fields):
    seen = message(role=role, **fields)
    assert seen["content"] == ""
    assert rendered([*MESSAGES, seen]).startswith("<|im_start|>user\nHi<|im_end|>\n")


def test_reasoning_gets_the_name_that_templates_read():
    def reasoning(content="a", **fields):
        seen = message(role="assistant", content=content, **fields)
        assert seen["content"] == "a"
        assert not seen.keys() - {"role", "content", "reasoning_content"}
        return seen.get("reasoning_content")

    spoken = {"type": "output_text", "text": "a", "annotations": []}
    assert reasoning() is None
    assert reasoning(reasoning="r") == reasoning(reasoning_content="r") == "r"
    assert reasoning(reasoning="r", reasoning_content=None) == "r"
    assert reasoning(reasoning="r", reasoning_content="r") == "r"
    assert reasoning(reasoning="r", reasoning_content="") == "r"
    assert reasoning(reasoning="") is None  # so that templates look for it in the content
    for part in (
        {"type": "thinking", "thinking": "r", "signature": "x"},
        {"type": "reasoning", "text": "r"},
        {"type": "reasoning", "reasoning": "r"},
    ):
        assert reasoning(content=[part, spoken]) == "r"
        assert reasoning(content=[part, spoken, part]) == "rr"
        assert reasoning(content=[part, spoken], reasoning="whole") == "whole"
        assert refused(role="user", content=[part]).param == "messages[0].content[0].type"
    error = refused(role="assistant", content="a", reasoning=["r"])
    assert error.param == "messages[0].reasoning"


def test_parts_of_other_types_are_refused_by_their_type():
    error = refused(role="user", content=[{"type": "text", "text": "a"}, {"type": "x"}])
    assert error.param == "messages[0].content[1].type"
    assert 'got "x"' in str(error) and "not supported" in str(error)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "image") for kind in ("image", "image_url", "input_image")),
        *((kind, "file") for kind in ("file", "input_file")),
        *(("input_audio", "recording"), ("document", "document")),
    ],
)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_parts_that_the_model_cannot_read_are_told_of(role, kind, name):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    seen = message(role=role, content=parts)
    assert seen["content"] == f"a[Left out: {name}. This model reads only text.]"


def test_messages_get_the_form_that_templates_want():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert message(role="user", content=parts) == {"role": "user", "content": "ab"}
    parts = [{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "!"}]
    assert message(role="assistant", content=parts)["content"] == "no!"
    assert message(role="developer", content="x") == {"role": "system", "content": "x"}
    assert message(role="assistant", content=None) == {"role": "assistant", "content": ""}
    assert message(role="assistant") == {"role": "assistant", "content": ""}
    kept = {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"}
    assert message(**kept, refusal=None) == kept


@pytest.mark.parametrize("schema", [True, False, [], "object", 5, None])
@pytest.mark.parametrize("place", ["parameters", "parameters.properties.x"])
def test_a_schema_that_is_no_object_becomes_an_empty_one(place, schema):
    function = with_value(FUNCTION | {"description": "d"}, place, schema)
    seen = chat(tools=[{"type": "function", "function": function}])["tools"]
    empty = {"properties": {"x": {}}} if place.endswith("x") else {}
    if place == "parameters" and schema is None:  # the same as missing
        assert "parameters" not in seen[0]["function"]
    else:
        assert seen[0]["function"]["parameters"] == empty
    assert "<name>f</name>\n<description>d</description>\n<parameters>" in rendered(MESSAGES, seen)


@pytest.mark.parametrize(
    ("place", "value", "taken"),
    [
        ("description", 5, "5"),
        ("description", ["é"], '["é"]'),
        ("parameters.description", {}, "{}"),
        ("parameters.properties", [], {}),
        ("parameters.properties", True, {}),
        ("parameters.properties.x.description", False, "false"),
        ("parameters.properties.x.type", ["string", "null"], ["string", "null"]),
        ("parameters.properties.x.properties", {"y": True}, {"y": {}}),
        ("parameters.properties.x.const", None, None),
        ("parameters.additionalProperties", False, False),
        ("parameters.properties.x.items", True, True),
    ],
)
def test_a_tool_gets_the_form_that_templates_can_take(place, value, taken):
    function = with_value(FUNCTION, place, value)
    seen = chat(tools=[{"type": "function", "function": function}])["tools"]
    assert seen == [{"type": "function", "function": with_value(FUNCTION, place, taken)}]
    assert "<name>f</name>" in rendered(MESSAGES, seen)
