"""Bodies of Messages and Responses, translated and checked: what is the same, what is refused."""

import copy
import json

import pytest
from helpers_protocols import MESSAGES_PATH, RESPONSES_PATH
from helpers_server import bodies

from mlx_qwen3next.server.protocols.anthropic import Message
from mlx_qwen3next.server.protocols.form import About
from mlx_qwen3next.server.protocols.openai_responses import ModelResponse
from mlx_qwen3next.server.protocols.stored import Kept, Stored
from mlx_qwen3next.server.requests.checks import RequestError
from mlx_qwen3next.server.requests.fields import normalise, parse

FORMS = {MESSAGES_PATH: Message, RESPONSES_PATH: ModelResponse}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
QUESTION = {"role": "user", "content": "Hi"}


def fields_of(path, body, stored=None):
    """The checked fields of a body."""
    about = About("demo", 0, "test", stored or Stored())
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return normalise(FORMS[path](parse(body), about).request, chat=True, names=("demo",))


def messages(*given, **fields):
    return fields_of(MESSAGES_PATH, {"messages": [*given] or [QUESTION]} | fields)


def responses(given="Hi", **fields):
    return fields_of(RESPONSES_PATH, {"input": given} | fields)


def refused(call, *args, **fields):
    with pytest.raises(RequestError) as caught:
        call(*args, **fields)
    assert caught.value.status == 400
    return caught.value


def text(*parts, kind="text"):
    return [{"type": kind, "text": part, "cache_control": {"type": "ephemeral"}} for part in parts]


# --- Messages -------------------------------------------------------------------------------------
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris", "n": None}}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris", "n": None}}


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_a_text_and_a_block_are_the_same(role):
    end = [] if role != "assistant" else [QUESTION]
    plain = messages(QUESTION, {"role": role, "content": "One."}, *end)
    assert messages(QUESTION, {"role": role, "content": text("One.")}, *end) == plain
    assert messages(QUESTION, {"role": role, "content": text("On", "e.")}, *end) == plain
    assert plain["messages"][1] == {"role": role, "content": "One."}


def test_a_system_prompt_without_what_changes():
    billing = "x-anthropic-billing-header: cc_version=2.1.332.93d; cc_entrypoint=sdk-cli;"
    plain = messages(system="Be brief.\nBe kind.")
    assert plain["messages"] == [{"role": "system", "content": "Be brief.\nBe kind."}, QUESTION]
    assert messages(system=text("Be brief.", "\nBe kind.")) == plain
    for line in (billing, billing.replace("93d", "12a")):
        assert messages(system=text(line, "Be brief.", "\nBe kind.")) == plain
        assert messages(system=f"{line}\nBe brief.\nBe kind.") == plain
    said = f"Say {billing}"  # somebody speaks of it
    assert messages(system=said)["messages"][0]["content"] == said
    assert messages(system=text(billing)) == messages(system="") == messages()


def test_a_loop_of_tools():
    asked = {"role": "assistant", "content": [*text("Let me see."), USE]}
    asked["content"].insert(0, {"type": "thinking", "thinking": "Hm.", "signature": "s"})
    asked["content"].insert(0, {"type": "redacted_thinking", "data": "x"})
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": text("sun", "ny")},
        {"type": "tool_result", "tool_use_id": "t2", "content": "rain", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
        *text("Go ", "on."),
    ]
    got = messages(QUESTION, asked, {"role": "user", "content": results})["messages"]
    call = {"type": "function", "id": "t1", "function": FUNCTION}
    assert got[1] == {
        **{"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm."},
        "tool_calls": [call],
    }
    assert [(m["role"], m["content"]) for m in got[2:]] == [
        *(("tool", "sunny"), ("tool", "rain"), ("tool", "")),
        ("user", "Go on."),
    ]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}


def test_images_do_not_end_a_conversation():
    left_out = "[Left out: image. This model reads only text.]"
    document = {"type": "document", "source": {"type": "text", "data": "A page."}}
    blocks = [*text("Seen: "), IMAGE, document]
    seen = f"Seen: {left_out}A page."
    result = {"type": "tool_result", "tool_use_id": "t1", "content": blocks}
    answered = [QUESTION, {"role": "assistant", "content": [USE]}]
    got = messages(*answered, {"role": "user", "content": [result]})["messages"]
    assert got[2] == {"role": "tool", "tool_call_id": "t1", "content": seen}
    assert messages({"role": "user", "content": blocks})["messages"][0]["content"] == seen
    image = {"type": "input_image", "image_url": "data:image/png;base64,x"}
    parts = [*text("Seen: ", kind="input_text"), image]
    output = {"type": "function_call_output", "call_id": "c1", "output": parts}
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    for given in ([QUESTION, call, output], [{"role": "user", "content": parts}]):
        assert responses(given)["messages"][-1]["content"] == f"Seen: {left_out}"


def test_the_options_of_messages():
    fields = messages(max_tokens=5, stop_sequences=["a", "b"], temperature=1, top_p=0.5, top_k=3)
    assert (fields["max_tokens"], fields["stop"], fields["top_k"]) == (5, ["a", "b"], 3)
    assert (fields["temperature"], fields["top_p"]) == (1.0, 0.5)
    hints = {"metadata": {"user_id": "x"}, "output_config": {"effort": "high"}}
    hints |= {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}
    hints |= {"thinking": {"type": "adaptive", "display": "omitted"}, "service_tier": "auto"}
    assert messages(**hints) == messages()
    for kind, is_on in (("enabled", True), ("disabled", False)):
        got = messages(thinking={"type": kind, "budget_tokens": 1024})
        assert got["chat_template_kwargs"] == {"enable_thinking": is_on}
    going_on = messages(QUESTION, {"role": "assistant", "content": "Well,"})
    assert going_on["chat_template_kwargs"] == {"continue_final_message": True}


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        (
            {"type": "tool", "name": "weather"},
            {"type": "function", "function": {"name": "weather"}},
        ),
    ],
)
def test_the_choice_of_tools_in_messages(choice, forced):
    tools = [{"name": "weather", "description": "d", "input_schema": SCHEMA, "defer_loading": True}]
    got = messages(tools=tools, tool_choice=choice)
    assert (got["tool_choice"], got["parallel_tool_calls"]) == (forced, True)
    function = {"name": "weather", "description": "d", "parameters": SCHEMA}
    assert got["tools"] == [{"type": "function", "function": function}]
    one = choice | {"disable_parallel_tool_use": True}
    assert messages(tools=tools, tool_choice=one)["parallel_tool_calls"] is False
    assert "tools" not in messages(tools=tools, tool_choice={"type": "none"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [QUESTION, {"role": "assistant", "content": [USE | {"name": ""}]}]}, "messa"),
        ({"messages": [QUESTION, {"role": "assistant", "content": [USE | {"input": 5}]}]}, "messa"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"input_schema": SCHEMA}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [{"name": "y"}]}, "tool_choice"),
        ({"tool_choice": {"type": "best"}}, "tool_choice.type"),
        ({"thinking": {"type": "x"}}, "thinking.type"),
        ({"stop_sequences": [5]}, "stop_sequences"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_format": {"type": "json"}}, "output_format.type"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"compaction": {"type": "enabled"}}, "compaction"),
    ],
)
def test_what_messages_cannot_be(fields, param):
    body = {"messages": [QUESTION]} | fields
    error = refused(fields_of, MESSAGES_PATH, body)
    assert error.param.startswith(param)
    assert param.split(".")[0] in str(error)


# --- Responses ------------------------------------------------------------------------------------
def item(role, *parts):
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": text(*parts, kind=kind)}


def test_a_text_and_an_item_are_the_same():
    plain = responses("Hi")
    assert plain["messages"] == [QUESTION]
    assert responses([QUESTION]) == responses([item("user", "H", "i")]) == plain
    assert responses([{"role": "user", "content": "Hi"}], instructions=None) == plain
    system = responses([item("developer", "Be."), item("user", "Hi")])
    assert responses("Hi", instructions="Be.") == system
    assert system["messages"][0] == {"role": "system", "content": "Be."}


def test_the_items_of_an_answer_are_one_message():
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"n": 1}'}
    output = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
    thought = {"type": "reasoning", "summary": [], "content": text("Hm.", kind="reasoning_text")}
    said = item("assistant", "Let me see.")
    asked = [item("user", "Hi"), thought, said, call, call | {"namespace": "n"}, output]
    got = responses(asked)["messages"]
    names = [call["function"]["name"] for call in got[1].pop("tool_calls")]
    assert names == ["weather", "n.weather"]
    assert got[1:] == [
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    blocks = [*asked[:-1], output | {"output": text("sun", "ny", kind="input_text")}]
    assert responses(blocks) == responses(asked)
    assert responses([*asked[:2], call, call | {"namespace": "n"}, said, output]) == responses(
        asked
    )


def test_the_tools_of_responses():
    function = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}
    space = {"type": "namespace", "name": "n", "tools": [function | {"name": "g"}]}
    hosted = [{"type": "web_search"}, {"type": "local_shell"}]
    got = responses(tools=[function, space, *hosted], tool_choice="required")
    assert [tool["function"]["name"] for tool in got["tools"]] == ["f", "n.g"]
    assert got["tools"][0]["function"]["parameters"] == SCHEMA
    named = responses(tools=[function], tool_choice={"type": "function", "name": "f"})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_custom_tools_are_functions_of_one_text():
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: X"}
    patch = {"type": "custom", "name": "patch", "description": "Edits.", "format": grammar}
    plain = {"type": "custom", "name": "note", "format": {"type": "text"}}
    space = {"type": "namespace", "name": "n", "tools": [plain]}
    choice = {"type": "custom", "name": "patch"}
    got = responses(tools=[patch, plain, space], tool_choice=choice)
    functions = [tool["function"] for tool in got["tools"]]
    assert [function["name"] for function in functions] == ["patch", "note", "n.note"]
    assert all(function["parameters"]["required"] == ["input"] for function in functions)
    assert functions[0]["description"].startswith("Edits.\n\n")
    assert functions[0]["description"].endswith("lark grammar:\nstart: X")
    assert got["tool_choice"] == {"type": "function", "function": {"name": "patch"}}
    call = {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": 'a "b"\n'}
    output = {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}
    asked, answered = responses([QUESTION, call, output])["messages"][1:]
    assert asked["tool_calls"][0]["function"] == {
        **{"name": "patch", "arguments": {"input": 'a "b"\n'}}
    }
    assert answered == {"role": "tool", "tool_call_id": "c", "content": "done"}


def test_the_options_of_responses():
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    assert responses(**wanted).items() >= {"logprobs": True, "top_logprobs": 2}.items()
    got = responses(max_output_tokens=1, parallel_tool_calls=False, temperature=0.5)
    assert (got["max_tokens"], got["parallel_tool_calls"], got["temperature"]) == (1, False, 0.5)
    assert responses("")["messages"] == [{"role": "user", "content": ""}]
    hints = {"truncation": "auto", "prompt_cache_key": "x", "client_metadata": {"a": "b"}}
    hints |= {"reasoning": {"summary": "auto", "effort": "high"}, "text": {"verbosity": "low"}}
    hints |= {"include": ["reasoning.encrypted_content"], "store": False, "background": False}
    assert responses(**hints) == responses()
    off = responses(reasoning={"effort": "none"})
    assert off["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_video"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "custom_tool_call", "name": "f", "input": 5}]}, "input[0].input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json"}}}, "text.format.type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name"),
        ({"tools": [{"type": "custom", "name": "f", "format": 5}]}, "tools[0].format"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]},
            "tools[0].tools[0].type",
        ),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 99}, "top_logprobs"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": 5}, "store"),
    ],
)
def test_what_responses_cannot_be(fields, param):
    error = refused(fields_of, RESPONSES_PATH, {"input": "Hi"} | fields)
    assert error.param.startswith(param)


# --- spoiled bodies -------------------------------------------------------------------------------
_OPTIONS = {"model": "default_model", "stream": False, "temperature": 0.5, "top_p": 0.9, "seed": 7}
VALID = {
    MESSAGES_PATH: _OPTIONS
    | {
        "system": [{"type": "text", "text": "x-anthropic-billing-header: 5"}, *text("Be.")],
        "messages": [
            {"role": "user", "content": [*text("What is the weather?")]},
            {"role": "system", "content": "Now."},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, USE],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": text("sunny")}],
            },
            {"role": "user", "content": [IMAGE]},
        ],
        **{"max_tokens": 5, "stop_sequences": ["a"], "thinking": {"type": "adaptive"}, "top_k": 5},
        "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "output_config": {"effort": "high"},
    },
    RESPONSES_PATH: _OPTIONS
    | {
        "input": [
            item("developer", "Be."),
            {"role": "user", "content": "What is the weather?"},
            {"type": "reasoning", "summary": [], "encrypted_content": "cmVhc29uaW5nOkhtLg=="},
            item("assistant", "Let me see."),
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": text("x", kind="input_text"),
            },
            {"type": "custom_tool_call", "call_id": "d", "name": "patch", "input": "x"},
            {
                "type": "custom_tool_call_output",
                "call_id": "d",
                "output": [{"type": "input_image"}],
            },
            {"type": "item_reference", "id": "known"},
        ],
        "tools": [
            {"type": "function", "name": "weather", "parameters": SCHEMA},
            {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]},
            {"type": "web_search"},
            {
                **{"type": "custom", "name": "patch", "description": "d"},
                "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
            },
        ],
        **{"tool_choice": {"type": "function", "name": "weather"}, "instructions": "Be kind."},
        **{"text": {"format": {"type": "text"}}, "reasoning": {"effort": "none"}, "store": True},
        **{"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]},
        **{"parallel_tool_calls": True, "top_logprobs": 2},
        **{"previous_response_id": "resp_1", "max_output_tokens": 5},
    },
}


@pytest.mark.parametrize("path", list(FORMS))
def test_spoiled_bodies_are_refused_or_fit(path):
    stored, taken, count = Stored(), 0, 2000
    known = item("assistant", "One.") | {"id": "known"}
    stored.put(Kept([item("user", "Hi"), known], {"id": "resp_1"}))
    assert fields_of(path, copy.deepcopy(VALID[path]), stored)["messages"]
    for _, raw in bodies(seed=2, count=count, valid={path: VALID[path]}):
        try:
            fields = fields_of(path, raw, stored)
        except RequestError as error:
            assert 400 <= error.status < 500
            json.dumps(FORMS[path].error(error), ensure_ascii=False).encode()
            continue
        taken += 1
        json.dumps(fields, allow_nan=False)
        assert all(isinstance(message["content"], str) for message in fields["messages"])
    assert count / 8 < taken < count * 7 / 8
