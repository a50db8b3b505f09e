"""The log-probabilities of an answer: the bytes of its tokens."""

from types import SimpleNamespace

import pytest
from helpers_server import tokenizer

from mlx_qwen3next.server.answers.tokens import SampledToken
from mlx_qwen3next.server.protocols import logprobs


def entries(words, tokens):
    sampled = [SampledToken("", token, -1.0, None, ((token, -1.0),)) for token in tokens]
    return logprobs.chat_form(words, sampled)["content"]


@pytest.mark.parametrize("text", ["é", "🙂", "a 🙂b\n", "\ufffd", "naïve 中文", "<|im_end|>"])
def test_the_bytes_of_the_tokens_are_those_of_the_text(text):
    words = tokenizer()
    seen = entries(words, words.encode(text, add_special_tokens=False))
    assert bytes(byte for entry in seen for byte in entry["bytes"]) == text.encode()
    for entry in seen:
        (top,) = entry["top_logprobs"]
        assert (top["bytes"], top["token"]) == (entry["bytes"], entry["token"])


def test_a_part_of_a_character_keeps_its_text():
    words = tokenizer()
    parts = entries(words, words.encode("🙂", add_special_tokens=False))
    assert len(parts) > 1 and all("\ufffd" in part["token"] for part in parts)


def test_bytes_that_the_vocabulary_does_not_spell_are_unknown():
    words = SimpleNamespace(decode=lambda _: "\ufffd", convert_ids_to_tokens=lambda _: "<0xE2>")
    assert entries(words, [5])[0]["bytes"] is None
