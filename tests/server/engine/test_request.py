"""The reading of requests: the chat template and its options, and the room that a prompt leaves."""

import copy
import json
import shutil
from queue import Queue

import pytest
from helpers_generate import bundled, narrow
from helpers_server import Fake, ask, serving
from helpers_serving import TOOLS, arguments, assistant, chat, running, served, user
from mlx_lm.server import convert_chat
from mlx_lm.tokenizer_utils import load

from mlx_qwen3next import stream_generate
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.errors import ContextLengthError
from mlx_qwen3next.server import flags
from mlx_qwen3next.server.engine.metrics import Metrics
from mlx_qwen3next.server.engine.request import read_request
from mlx_qwen3next.server.requests.prompt import Chat

QUESTION = user("What does math.sqrt do?")
THINKING = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.role == "assistant" and message.reasoning_content %}
        {{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" }}
    {%- endif %}
    {{- message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n<think>\\n" }}{%- endif %}"""


def read(*messages, tools=None, tokenizer=None, **options):
    """The request to answer messages, with options of the chat template."""
    return read_prompt(Chat(list(messages), tools), tokenizer, template=options)


def read_prompt(prompt, tokenizer=None, **fields):
    model, own = bundled()
    return read_request(prompt, arguments(**fields), Queue(), model, tokenizer or own, Metrics())


def text(request):
    return bundled()[1].decode(request.tokens)


# --- the message that is continued --------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
    ],
)
@pytest.mark.parametrize("begun", ["It returns", "It returns the ", "```python\n", ""])
def test_the_assistant_s_last_message_is_continued(options, begun):
    begins = bundled()[1].decode(chat(QUESTION))
    assert begins.endswith("<|im_start|>assistant\n")
    assert text(read(QUESTION, assistant(begun), **options)) == begins + begun


@pytest.mark.parametrize("options", [{}, {"continue_final_message": False}])
def test_otherwise_a_new_answer_begins(options):
    messages = QUESTION, assistant("It returns")
    assert read(*messages, **options).tokens == chat(*messages)


def test_without_the_generation_prompt_other_messages_end_the_prompt():
    assert text(read(QUESTION, add_generation_prompt=False)).endswith("do?<|im_end|>\n")
    closed = {"add_generation_prompt": False, "continue_final_message": False}
    assert text(read(QUESTION, assistant("It"), **closed)).endswith("It<|im_end|>\n")


@pytest.mark.parametrize(
    ("last", "options"),
    [
        (user("And?"), {}),
        (assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {}),
        (assistant("It"), {"add_generation_prompt": True}),
    ],
)
def test_what_cannot_be_continued_is_refused(last, options):
    with pytest.raises(ValueError, match=r"^continue_final_message "):
        read(QUESTION, last, continue_final_message=True, **options)


def test_an_answer_that_is_still_thinking_thinks_on():
    tokenizer = with_templates(THINKING)
    begins = text(read(QUESTION, tokenizer=tokenizer))
    thought = assistant("") | {"reasoning_content": "The square"}
    options = {"tokenizer": tokenizer, "continue_final_message": True}
    assert text(read(QUESTION, thought, **options)) == f"{begins}The square"
    said = assistant("It") | {"reasoning_content": "The square"}
    expected = f"{begins}The square\n</think>\n\nIt"
    assert text(read(QUESTION, said, **options)) == expected


def test_without_a_template_no_message_can_be_continued():
    tokenizer = with_templates(None)
    assert text(read(QUESTION, tokenizer=tokenizer)).endswith("ASSISTANT:")
    with pytest.raises(ValueError, match="without a chat template"):
        read(QUESTION, assistant("It"), tokenizer=tokenizer, continue_final_message=True)


@pytest.mark.parametrize("roles", [None, {"user": "Q ", "assistant": "A\n", "stop": ";"}])
def test_without_a_template_a_chat_is_written_as_by_mlx_lm_s_server(roles):
    messages = [{"role": "system", "content": "Be brief."}, QUESTION, assistant("It is"), user("x")]
    request = read_prompt(Chat(messages, None, roles), with_templates(None))
    assert text(request) == convert_chat(messages, roles)


def test_each_stop_token_ends_an_answer():
    tokenizer = bundled()[1]
    stop = read(QUESTION).stop
    assert len(tokenizer.eos_token_ids) == 2
    assert all(stop.matcher().advance(token) for token in tokenizer.eos_token_ids)
    assert not stop.matcher().advance(5)


# --- several templates --------------------------------------------------------------------------
def with_templates(templates):
    """The bundled tokenizer with other chat templates."""
    tokenizer = copy.deepcopy(bundled()[1])
    tokenizer.chat_template = templates
    tokenizer.has_chat_template = templates is not None
    return tokenizer


def named(name):
    return f"{name}: {{{{ messages[0].content }}}}"


@pytest.fixture(params=["listed", "files"])
def checkpoint(request, tmp_path):
    """A function that makes a tokenizer with named templates, from either kind of files."""

    def make(*names):
        for file in BUNDLED.glob("tokenizer*"):
            shutil.copy(file, tmp_path)
        if request.param == "listed":
            config = json.loads((BUNDLED / "tokenizer_config.json").read_text())
            config["chat_template"] = [{"name": x, "template": named(x)} for x in names]
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        else:
            folder = tmp_path / "additional_chat_templates"
            folder.mkdir()
            for name in names:
                default = tmp_path / "chat_template.jinja"
                file = default if name == "default" else folder / f"{name}.jinja"
                file.write_text(named(name))
        return load(tmp_path)

    return make


@pytest.mark.parametrize(
    ("names", "tools", "asked", "taken"),
    [
        (["default", "rag"], None, None, "default"),
        (["default", "rag"], TOOLS, None, "default"),
        (["default", "tool_use"], None, None, "default"),
        (["default", "tool_use"], TOOLS, None, "tool_use"),
        (["default", "tool_use", "rag"], TOOLS, "rag", "rag"),
        (["default", "tool_use"], TOOLS, "default", "default"),
        (["tool_use", "rag"], TOOLS, None, "tool_use"),
        (["tool_use", "rag"], None, "rag", "rag"),
    ],
)
def test_a_template_is_chosen_by_its_name(checkpoint, names, tools, asked, taken):
    options = {} if asked is None else {"chat_template": asked}
    request = read(user("Hi"), tools=tools, tokenizer=checkpoint(*names), **options)
    assert text(request) == f"{taken}: Hi"


def test_the_form_of_calls_is_that_of_the_chosen_template(checkpoint):
    tokenizer = checkpoint("default", "tool_use", "rag")
    tokenizer.chat_template["tool_use"] = "<tool_call>\n<function=name>"

    def form(name=None, tools=TOOLS, tokenizer=tokenizer):
        options = {} if name is None else {"chat_template": name}
        return read(user("Hi"), tools=tools, tokenizer=tokenizer, **options).context.format

    assert form() == form("tool_use", None) == "xml"
    assert form("default") == form("rag") == form(None, None) == "json"
    assert form(tokenizer=bundled()[1]) == "xml"
    assert form(tokenizer=with_templates(None)) == "json"


@pytest.mark.parametrize(("name", "is_call"), [(None, True), ("default", False)])
@pytest.mark.parametrize("place", ["chat_template_kwargs", "flag"])
def test_answers_are_read_in_the_form_of_the_chosen_template(name, is_call, place):
    """A call without <tool_call> is one in the form of XML alone."""
    options = {} if name is None else {"chat_template": name}
    flags = {"chat_template_args": options} if place == "flag" else {}
    generator = Fake(f"<function={TOOLS[0]['function']['name']}>\n</function>", **flags)
    own = generator.tokenizer.chat_template
    generator.tokenizer = with_templates({"default": "none", "tool_use": own})
    with serving(generator) as server:
        fields = {"chat_template_kwargs": options} if place != "flag" else {}
        status, answer = ask(server, tools=TOOLS, **fields)
    assert status == 200
    assert bool(answer["choices"][0]["message"].get("tool_calls")) == is_call


def test_without_a_default_the_templates_are_listed(checkpoint):
    with pytest.raises(ValueError, match=r"no chat template 'default'.*: (tool_use, rag|rag, too)"):
        read(user("Hi"), tokenizer=checkpoint("tool_use", "rag"))


def test_only_names_of_templates_are_taken():
    with pytest.raises(ValueError, match=r"no chat template '\{\{ 5 \}\}'.*: default$"):
        read(user("Hi"), chat_template="{{ 5 }}")
    assert read(user("Hi"), chat_template="default").tokens == chat(user("Hi"))


# --- the context --------------------------------------------------------------------------------
@pytest.mark.parametrize("max_tokens", [2**31 - 1, 9000])
def test_an_answer_has_at_most_the_rest_of_the_context(max_tokens):
    limit = bundled()[0].args.max_position_embeddings
    assert read_prompt([5] * 100, max_tokens=max_tokens).max_tokens == limit - 100
    assert read_prompt([5] * limit, max_tokens=max_tokens).max_tokens == 1


def test_a_prompt_beyond_the_context_is_refused_in_openai_s_words():
    limit = bundled()[0].args.max_position_embeddings
    words = f"^This model's maximum context length is {limit} tokens. However, your "
    with pytest.raises(ContextLengthError, match=rf"{words}prompt resulted in {limit + 1} tokens"):
        read_prompt([5] * (limit + 1))
    with pytest.raises(ContextLengthError, match=rf"{words}messages resulted in \d+ tokens"):
        read(user("x " * limit))


@pytest.mark.parametrize(("given", "length"), [((), 2**31 - 1), (("--max-tokens", "7"), 7)])
def test_without_a_limit_an_answer_may_fill_the_context(given, length):
    generator = Fake(max_tokens=flags.parser().parse_args(given).max_tokens)
    with serving(generator) as listening:
        ask(listening)
        ask(listening, max_tokens=2**31 - 1)
    default, asked = (arguments.max_tokens for _, arguments in generator.requests)
    assert (default, asked) == (length, 2**31 - 1)


# --- over HTTP ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def listening():
    with running() as engine, served(engine) as server:
        yield server


@pytest.mark.parametrize("place", ["the request", "chat_template_kwargs"])
def test_a_message_is_continued_over_http(listening, place):
    model, tokenizer = narrow()
    begun = "The function "
    tokens = [*chat(QUESTION), *tokenizer.encode(begun, add_special_tokens=False)]
    want = "".join(r.text for r in stream_generate(model, tokenizer, tokens, 12, mtp="off"))
    ending = {"continue_final_message": True, "add_generation_prompt": False}
    fields = {"messages": [QUESTION, assistant(begun)], "temperature": 0, "max_tokens": 12}
    fields |= ending if place == "the request" else {place: ending}
    status, answer = ask(listening, **fields)
    assert (status, answer["usage"]["prompt_tokens"]) == (200, len(tokens))
    assert answer["choices"][0]["message"]["content"].strip() == want.strip()


def test_an_overflow_has_openai_s_code(listening):
    status, answer = ask(listening, messages=[user("word " * 9000)])
    error = answer["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 8192 tokens" in error["message"]
