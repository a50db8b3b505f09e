"""The fields of a request: their checks, and the form in which mlx-lm's handler reads them."""

import itertools
import json

import pytest
from helpers_server import CHAT, MESSAGES, bodies

from mlx_qwen3next.server.requests.checks import RequestError
from mlx_qwen3next.server.requests.fields import normalise, parse, served_name

NAMES = ("demo", "org/demo")
FUNCTION = {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}


def chat(**fields):
    return normalise({"messages": MESSAGES} | fields, chat=True, names=NAMES, adapter="lora")


def text(**fields):
    return normalise({"prompt": "Hi"} | fields, chat=False, names=NAMES)


def refused(check, *args, **fields):
    """The error that a check raises."""
    with pytest.raises(RequestError) as caught:
        check(*args, **fields)
    return caught.value


def assert_refused(field, values, *checks):
    """Each of the checks refuses each of the values and names the field."""
    for check, value in itertools.product(checks, values):
        error = refused(check, **{field: value})
        assert error.status == 400, value
        assert field in str(error)
        assert error.param.startswith(field)


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": "\xff"}', "can't decode"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"\\udc00": 1}', "surrogates"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": %s}' % nested(100).encode(), "nested"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b"[1, 2]", "object"),
        (b'"text"', "object"),
        (b"null", "object"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(raw, reason):
    error = refused(parse, raw)
    assert error.status == 400
    assert reason in str(error)
    assert len(str(error)) < 300


def test_valid_json_is_parsed():
    raw = b'{"a": 1, "a": 2, "b": "\\ud83d\\ude42", "c": 1e400, "d": %s}' % nested(99).encode()
    assert parse(raw) == {"a": 2, "b": "🙂", "c": float("inf"), "d": json.loads(nested(99))}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("stream", [1, 0, "true", []]),
        ("stream_options", [True, [], {"include_usage": 1}, {"continuous_usage_stats": 1}]),
        ("max_tokens", [0, -2, -1.0, True, 1.0, "5"]),
        ("max_completion_tokens", [0, 2.5]),
        ("num_draft_tokens", [-1, True]),
        ("temperature", [-0.1, 2.1, 3, True, "1", [1], float("inf"), 10**400]),
        ("top_p", [-0.1, 1.1, False]),
        ("min_p", [-0.1, 1.1]),
        ("top_k", [-2, -1.0, 1.5, True, 2**31]),
        ("xtc_probability", [-0.1, 1.1]),
        ("xtc_threshold", [-0.1, 0.6]),
        ("repetition_penalty", [-0.1, "x"]),
        ("presence_penalty", [1e7, True]),
        ("frequency_penalty", [-1e7, {}]),
        ("repetition_context_size", [-1, 0.5, 2**40]),
        ("presence_context_size", [-1, 2**40]),
        ("frequency_context_size", [-1, 2**40]),
        ("logit_bias", [[], {"x": 1}, {"-1": 1}, {"²": 1}, {"9" * 5000: 1}, {str(2**31): 1}]),
        ("logit_bias", [{"1": 101}, {"1": -100.5}, {"1": True}, {"1": "1"}, {"1": float("inf")}]),
        ("top_logprobs", [-1, 12, True, 1.0]),
        ("seed", [-(2**63) - 1, 2**64, 1.5, True]),
        ("stop", [1, [1], ["a"] * 17, "x" * 1001, {}]),
        ("n", [0, 2, True, 1.0]),
        ("best_of", [2]),
        ("model", [5, ["demo"], True]),
        ("draft_model", ["other", 1]),
        ("adapters", ["other", 1]),
    ],
)
def test_wrong_values_are_refused_by_name(field, values):
    assert_refused(field, values, chat, text)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("messages", [[], {}, "Hi", [1], [None], [[]]]),
        ("logprobs", [1, 0, "true"]),
        ("tools", [{}, "x", [1], [{}], [{"type": "other", "function": FUNCTION}]]),
        ("tools", [[{"type": "function"}], [{"type": "function", "function": {"name": ""}}]]),
        ("tool_choice", ["required", "any", True, {"type": "function"}]),
        ("functions", [[FUNCTION]]),
        ("function_call", ["required", {"name": "f"}]),
        ("modalities", [["text", "audio"], ["audio"], [], "text"]),
        ("audio", [{"voice": "alloy", "format": "wav"}, {}]),
        ("response_format", ["text", {}, {"type": "xml"}, {"type": "json_schema"}]),
        ("response_format", [{"type": "json_schema", "json_schema": {"schema": "x"}}]),
        ("response_format", [{"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}]),
        ("chat_template_kwargs", [[], "x", {"tools": []}, {"messages": []}, {"tokenize": False}]),
        ("chat_template_kwargs", [{"chat_template": ""}, {"self": 1}, {"conversations": []}]),
        ("chat_template_kwargs", [{"continue_final_message": "x"}, {"add_generation_prompt": 1}]),
        ("continue_final_message", [1, "content", []]),
        ("add_generation_prompt", [0, "false"]),
        ("role_mapping", [[], {"user": 1}]),
    ],
)
def test_wrong_values_of_a_chat_are_refused_by_name(field, values):
    assert_refused(field, values, chat)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", ["", [], [""], [[]], 1, {}, ["a", "b"], [[1], [2]], [["a"]], [[[1]]]]),
        ("prompt", [[-1], [True], [1.0], [1, "a"], [2**31]]),
        ("logprobs", [-1, 12, 1.5, "1"]),
        ("echo", [True, 0]),
        ("suffix", ["x", 1]),
    ],
)
def test_wrong_values_of_a_completion_are_refused_by_name(field, values):
    assert_refused(field, values, text)


def test_tools_are_kept_unless_none_is_to_be_called():
    nulls = FUNCTION | {"description": None, "strict": None}
    assert chat(tools=[TOOL | {"function": nulls}])["tools"] == [TOOL]
    assert chat(tools=[TOOL], tool_choice="auto")["tools"] == [TOOL]
    assert "tools" not in chat(tools=[TOOL], tool_choice="none")
    name = {"name": TOOL["function"]["name"]}
    for choice in ("required", {"type": "function", "function": name}):
        assert chat(tools=[TOOL], tool_choice=choice)["tool_choice"] == choice
        assert refused(chat, tool_choice=choice).param == "tool_choice"
    other = {"type": "function", "function": {"name": "other"}}
    assert "one of" in str(refused(chat, tools=[TOOL], tool_choice=other))


def test_options_for_the_end_of_the_prompt_are_the_template_s():
    ending = {"continue_final_message": True, "add_generation_prompt": False}
    fields = chat(**ending, chat_template_kwargs={"enable_thinking": True})
    assert fields == chat(chat_template_kwargs=ending | {"enable_thinking": True})
    assert fields["chat_template_kwargs"] == ending | {"enable_thinking": True}
    assert chat(**ending)["chat_template_kwargs"] == ending
    assert "chat_template_kwargs" not in chat(continue_final_message=None)


@pytest.mark.parametrize("check", [chat, text])
def test_null_is_the_same_as_absent(check):
    names = "stream stream_options model draft_model adapters max_tokens temperature top_k stop n"
    names += " logit_bias logprobs top_logprobs seed tools tool_choice response_format suffix echo"
    assert check(**dict.fromkeys(names.split())) == check()


@pytest.mark.parametrize("check", [chat, text])
def test_hints_and_unknown_fields_are_ignored(check):
    hints = {"verbosity": "low", "reasoning_effort": "high"}
    hints |= {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"}
    hints |= {"prompt_cache_key": "x", "safety_identifier": "s"}
    hints |= {"prediction": {"type": "content", "content": "x"}, "web_search_options": {}}
    assert check(**hints) == check()


def test_options_may_have_the_value_of_the_default():
    for call in ("auto", "none"):
        chat(function_call=call, modalities=["text"], audio=None)


@pytest.mark.parametrize(("check", "field"), [(chat, "messages"), (text, "prompt")])
def test_a_prompt_or_messages_are_required(check, field):
    error = refused(check, **{field: None})
    assert (error.param, str(error)) == (field, f"{field} is missing: a request must have it")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("x", "x"),
        (["x"], "x"),
        ([5], [5]),
        ([1, 0, 2**31 - 1], [1, 0, 2**31 - 1]),
        ([[1, 2]], [1, 2]),
    ],
)
def test_prompts_are_one_text_or_tokens(given, taken):
    assert text(prompt=given)["prompt"] == taken


def test_limits_themselves_are_allowed():
    fields = {
        "seed": 2**64 - 1,
        "max_tokens": 2**31 - 1,
        "logit_bias": {"0": -100, "7": 100},
        "top_logprobs": 11,
    }
    assert chat(temperature=2)["temperature"] == 2.0
    fields |= {"temperature": 0, "top_p": 1, "stop": ["x" * 1000] * 16, "n": 1}
    assert chat(**fields).items() >= fields.items()
    assert text(suffix="", echo=False, best_of=1) == text() | {
        "suffix": "",
        "echo": False,
        "best_of": 1,
    }


def test_numbers_get_the_types_that_mlx_lm_wants():
    fields = chat(xtc_probability=1, xtc_threshold=0, top_k=5, repetition_context_size=0)
    assert type(fields["xtc_probability"]) is type(fields["xtc_threshold"]) is float
    assert type(fields["top_k"]) is type(fields["repetition_context_size"]) is int


@pytest.mark.parametrize(
    ("field", "given", "taken"),
    [
        ("max_tokens", -1, 2**31 - 1),
        ("max_tokens", 2**53 - 1, 2**31 - 1),
        ("max_tokens", 10**400, 2**31 - 1),
        ("max_completion_tokens", -1, 2**31 - 1),
        ("top_k", -1, 0),
        ("seed", -1, 2**64 - 1),
        ("seed", -(2**63), 2**63),
        ("stop", "", []),
        ("stop", ["", "x", ""], ["x"]),
        ("stop", [*["x"] * 16, ""], ["x"] * 16),
    ],
)
def test_forms_of_other_servers_are_accepted(field, given, taken):
    for check in (chat, text):
        assert check(**{field: given})[field] == taken


def test_stops_and_stream_options_have_one_form():
    assert chat(stop="x")["stop"] == chat(stop=["x"])["stop"] == ["x"]
    names = ("include_usage", "continuous_usage_stats")
    for given in ((False, False), (True, False), (True, True)):
        options = dict(zip(names, given, strict=True))
        taken = chat(stream_options={name: True for name in names if options[name]} | {"x": 1})
        assert taken["stream_options"] == options


def test_log_probabilities_have_one_form():
    both = {"logprobs": True, "top_logprobs": 3}
    assert chat(top_logprobs=3).items() >= both.items()
    assert chat(top_logprobs=3, logprobs=True).items() >= both.items()
    assert text(logprobs=3).items() >= both.items()
    assert text(logprobs=0).items() >= {"logprobs": True, "top_logprobs": 0}.items()
    assert "logprobs" not in chat(top_logprobs=0)
    assert text(logprobs=False)["logprobs"] is False


@pytest.mark.parametrize("model", ["", "llama-3", "o1", "gpt", "org/other", "not-qwen", "demo2"])
def test_other_models_are_not_found(model):
    error = refused(chat, model=model)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert f'"{model}"' in str(error)
    assert "demo or org/demo" in str(error)


@pytest.mark.parametrize(
    "model",
    [
        *("default", "default_model", "local-model", "gpt-4o", "gpt-5-codex", "o3", "o3-mini"),
        *("o4-mini", "claude-sonnet-4-5", "qwen3-coder-plus", "Qwen/Qwen3-Next-80B-A3B-Instruct"),
    ],
)
def test_names_that_clients_have_built_in_are_the_served_model(model):
    assert chat(model=model) == chat()
    assert served_name(model, NAMES) == "demo"
    assert [served_name(name, NAMES) for name in NAMES] == [*NAMES]
    assert served_name(model, ("other", model)) == model


@pytest.mark.parametrize("check", [chat, text])
def test_the_names_of_model_and_adapter_are_not_handed_on(check):
    named = {"model": "org/demo", "draft_model": "default_model", "adapters": "default_model"}
    assert check(**named) == check(model="default_model") == check()


def test_the_adapter_goes_by_its_name():
    assert chat(adapters="lora") == chat()
    assert refused(text, adapters="lora").param == "adapters"


def test_errors_have_the_form_of_openai():
    error = RequestError("wrong", "field", code="word")
    expected = {"message": "wrong", "param": "field", "code": "word"}
    assert error.body == {"error": expected | {"type": "invalid_request_error"}}
    assert RequestError("wrong", status=503).body["error"]["type"] == "server_error"


def test_long_values_are_shortened_in_messages():
    assert len(str(refused(chat, model="x" * 10_000))) < 200
    assert len(str(refused(chat, messages="x" * 10_000))) < 200


def test_spoiled_bodies_are_refused_or_normal_already():
    taken = 0
    for path, raw in bodies(seed=1, count=3000):
        is_chat = path == CHAT
        try:
            fields = normalise(parse(raw), chat=is_chat, names=NAMES)
        except RequestError as error:
            assert 400 <= error.status < 500
            json.dumps(error.body, ensure_ascii=False).encode()
            continue
        taken += 1
        again = json.loads(json.dumps(fields, allow_nan=False))
        assert normalise(again, chat=is_chat, names=NAMES) == fields
    assert 400 < taken < 2600
