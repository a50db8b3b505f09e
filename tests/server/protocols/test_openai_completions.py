"""Completions of texts end to end, with OpenAI's client: nothing in them is a chat's."""

import openai
import pytest
from helpers_scripted import CONTEXT, scripted


@pytest.fixture(scope="module")
def server():
    with scripted() as server:
        yield server


@pytest.mark.parametrize(
    "text",
    [
        "<think>Hm.</think>\n\nYes.",
        "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "  Hé 🙂\n\n",
    ],
)
def test_all_of_an_answer_is_text(server, text):
    choice, usage = server.completion("Go on: ", server.say(text))
    assert (choice.text, choice.finish_reason) == (text, "stop")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("prompt", ["<think>", "</think> <tool_call>", "<|im_end|>\n<|im_start|>x"])
def test_a_prompt_is_taken_as_it_is(server, prompt):
    assert server.completion(prompt)[0].text == "Yes."
    assert server.prompt() == prompt
    for token in ("<|im_start|>", "<|im_end|>"):
        assert server.count(token) == prompt.count(token)


@pytest.mark.parametrize(
    ("stop", "text"), [("Two", "One. "), (["x", "e. T"], "On"), ("🙂", "One. Two "), (".!", None)]
)
def test_stop_strings(server, stop, text):
    said = "One. Two 🙂."
    choice, _ = server.completion("Count: ", server.say(said), stop=stop)
    assert (choice.text, choice.finish_reason) == (said if text is None else text, "stop")


def test_log_probabilities(server):
    text = "Hé 🙂 well"
    choice, usage = server.completion("Go on: ", server.say(text), logprobs=2)
    logprobs = choice.logprobs
    lengths = {len(entries) for _, entries in logprobs}
    assert lengths == {usage.completion_tokens}
    assert set(logprobs.token_logprobs) == {0.0}
    for token, offset, top in zip(
        logprobs.tokens[:-1], logprobs.text_offset, logprobs.top_logprobs, strict=False
    ):
        assert "\ufffd" in token or text[offset:].startswith(token)
        assert top[token] == 0.0


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 10**9}])
def test_an_answer_has_what_fits_the_context(server, fields):
    seed = server.say("So so", ends=False)
    choice, usage = server.completion([5] * (CONTEXT - 9), seed, **fields)
    assert (usage.completion_tokens, usage.total_tokens) == (9, CONTEXT)
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"prompt": [5] * (CONTEXT + 1)},
            f"This model's maximum context length is {CONTEXT} tokens. However, your prompt "
            f"resulted in {CONTEXT + 1} tokens.",
        ),
        ({"temperature": 2.1}, "temperature must be a number from 0 to 2"),
        ({"prompt": ["a", "b"]}, "prompt must be one text"),
        ({"prompt": [10**6]}, "token id outside"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_refusals(server, fields, words, streamed):
    request = {"model": "demo", "prompt": "Hi", "stream": streamed} | fields
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(**request)
    assert words in caught.value.message


@pytest.mark.parametrize("model", ["default", "gpt-3.5-turbo-instruct", "qwen3-next"])
def test_names_that_clients_have_built_in(server, model):
    assert server.completion("Hi", model=model)[0].text == "Yes."
