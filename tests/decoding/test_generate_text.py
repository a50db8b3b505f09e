"""stream_generate and generate: texts, responses and what is printed."""

import dataclasses
import re

import pytest
from helpers_generate import (
    GOLDENS,
    forced,
    forward_cache,
    golden_tokens,
    narrow,
    tokens_of,
)
from mlx_lm import generate as mlx_lm_generate
from mlx_lm.generate import GenerationResponse as MLXGenerationResponse
from mlx_lm.tokenizer_utils import _byte_decoder

from mlx_qwen3next import generate, load_model, stream_generate

FIELDS = [field.name for field in dataclasses.fields(MLXGenerationResponse)]


def byte_tokens(text):
    """The ids of the tokens that are one byte of the text each."""
    _, tokenizer = narrow()
    characters = {byte: character for character, byte in _byte_decoder().items()}
    return [tokenizer.convert_tokens_to_ids(characters[byte]) for byte in text.encode()]


def stream(script, prompt="def f(x):", max_tokens=100, **options):
    """Responses of the bundled model, made to say the token ids of ``script``."""
    model, tokenizer = narrow()
    processors = [forced(script, len(tokenizer.encode(prompt)))]
    return list(
        stream_generate(
            model, tokenizer, prompt, max_tokens, logits_processors=processors, **options
        )
    )


SCRIPTS = {
    "plain": lambda encode: encode("def f(x):\n    return x\n"),
    "leading-spaces": lambda encode: encode("    return x"),
    "many-leading-spaces": lambda _: byte_tokens("   x"),
    "multi-byte": lambda _: byte_tokens("é漢字🙂 é"),
    "merged": lambda encode: encode("naïve “é漢字🙂”"),
    "nul": lambda _: byte_tokens("a\0b"),
    "replacement-character": lambda _: byte_tokens("a\ufffdb\ufffd"),
    "special-token": lambda encode: encode("a<|im_start|> b"),
    "special-token-within-a-character": lambda encode: (
        byte_tokens("漢")[:2] + encode("<|im_start|>") + byte_tokens("é")
    ),
    "invalid-byte": lambda _: byte_tokens("é")[:1] + byte_tokens("abc"),
    "incomplete": lambda _: byte_tokens("a漢")[:3],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("end", ["length", "stop"])
def test_texts_are_the_decoded_tokens(script, end):
    _, tokenizer = narrow()
    script = SCRIPTS[script](lambda text: tokenizer.encode(text, add_special_tokens=False))
    if end == "stop":
        responses = stream([*script, tokenizer.eos_token_id])
        assert tokens_of(responses) == [*script, tokenizer.eos_token_id]
    else:
        responses = stream(script, max_tokens=len(script))
        assert tokens_of(responses) == script
    assert "".join(r.text for r in responses) == tokenizer.decode(script)
    assert [r.finish_reason for r in responses] == [None] * (len(responses) - 1) + [end]


def test_no_text_ends_within_a_character():
    texts = [r.text for r in stream(byte_tokens("é漢字🙂") + byte_tokens("漢")[:2], max_tokens=14)]
    assert texts[:-1] == ["", "é", "", "", "漢", "", "", "字", "", "", "", "🙂", ""]
    assert texts[-1] == "\ufffd"


def test_every_stop_token_stops():
    _, tokenizer = narrow()
    assert len(tokenizer.eos_token_ids) == 2
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    for stop in tokenizer.eos_token_ids:
        responses = stream([a, b, stop, a])
        assert tokens_of(responses) == [a, b, stop]
        assert [r.text for r in responses] == ["a", "b", ""]
        assert responses[-1].finish_reason == "stop"


def test_stop_as_the_last_token_allowed_is_a_stop():
    _, tokenizer = narrow()
    responses = stream([tokenizer.encode("a")[0], tokenizer.eos_token_id], max_tokens=2)
    assert [r.finish_reason for r in responses] == [None, "stop"]


@pytest.mark.parametrize("max_tokens", [-1, 10**9])
def test_the_end_of_the_context_is_a_length(max_tokens):
    prompt, expected = golden_tokens("base")
    short_context = load_model(GOLDENS / "base")
    short_context.args = dataclasses.replace(short_context.args, max_position_embeddings=16)
    _, tokenizer = narrow()
    for held in (0, 4):
        cache = forward_cache(short_context, prompt[:held]) if held else None
        responses = list(
            stream_generate(short_context, tokenizer, prompt[held:], max_tokens, prompt_cache=cache)
        )
        assert tokens_of(responses) == expected[:6]
        assert [r.finish_reason for r in responses] == [None] * 5 + ["length"]


def test_responses_have_mlx_lms_fields():
    _, tokenizer = narrow()
    script = tokenizer.encode("a b c")
    responses = stream(script, prompt="def f(x):", max_tokens=len(script), mtp="off")
    for count, response in enumerate(responses, start=1):
        assert isinstance(response, MLXGenerationResponse)
        fields = dataclasses.asdict(response)
        drafts = ["rounds", "mean_accept_length", "acceptance", "drafted", "accepted"]
        assert list(fields) == [*FIELDS, *drafts, "cached_tokens", "experts"]
        assert response.logprobs.shape == (narrow()[0].args.vocab_size,)
        assert response.prompt_tokens == len(tokenizer.encode("def f(x):"))
        assert response.generation_tokens == count
        assert response.prompt_tps > 0 and response.generation_tps > 0
        assert response.peak_memory > 0
        assert (response.from_draft, response.rounds, response.acceptance) == (False, count, ())


def test_text_prompt_is_encoded():
    model, tokenizer = narrow()
    prompt = "import os\n"
    tokens = tokens_of(stream_generate(model, tokenizer, tokenizer.encode(prompt), 8))
    assert tokens_of(stream_generate(model, tokenizer, prompt, 8)) == tokens
    assert tokens_of(stream_generate(model, tokenizer._tokenizer, prompt, 8)) == tokens


@pytest.mark.parametrize("prompt", ["", []], ids=["text", "tokens"])
@pytest.mark.parametrize("function", [stream_generate, generate])
def test_empty_prompt_is_refused(function, prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        function(*narrow(), prompt)


@pytest.mark.parametrize("name", ["max_tokens", "mtp", "temp", "no_such_option"])
def test_bad_options_are_refused_at_the_call_of_stream_generate(name):
    with pytest.raises(ValueError, match=name):
        stream_generate(*narrow(), "def", **{name: -5})


def test_generate_returns_the_text():
    model, tokenizer = narrow()
    options = {"max_tokens": 12, "temp": 0.0}
    texts = [r.text for r in stream_generate(model, tokenizer, "import os\n", **options)]
    assert generate(model, tokenizer, "import os\n", **options) == "".join(texts)


def test_verbose_prints_what_mlx_lm_prints(capsys):
    model, tokenizer = narrow()
    script = tokenizer.encode("os.path")
    options = {
        "verbose": True,
        "max_tokens": len(script),
        "logits_processors": [forced(script, len(tokenizer.encode("import ")))],
    }
    printed = []
    for function in (mlx_lm_generate, generate):
        assert function(model, tokenizer, "import ", **options) == "os.path"
        printed.append(re.sub(r"\d+\.\d+", "0.0", capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert "Generation: " in printed[1]


def test_verbose_prints_the_statistics_of_an_interrupted_answer(capsys):
    model, tokenizer = narrow()

    def interrupt(tokens, logits):
        if len(tokens) > len(tokenizer.encode("import ")) + 4:
            raise KeyboardInterrupt
        return logits

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, "import ", verbose=True, logits_processors=[interrupt])
    assert re.search(r"Generation: 4 tokens, [\d.]+ tokens-per-sec", capsys.readouterr().out)
