"""Log-probabilities of sampled tokens in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..answers.tokens import SampledToken

# The characters that stand for bytes in the vocabulary of a byte-level tokenizer, such as GPT-2's.
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_LEAST = -9999.0  # OpenAI's number for minus infinity, which JSON lacks


def chat_form(tokenizer: TokenizerWrapper, sampled: Sequence[SampledToken]) -> dict[str, Any]:
    """Log-probabilities in the form of a chat completion.

    Every token also has its ``id``, as in mlx-lm.
    """
    content = []
    for token in sampled:
        entry = _entry(tokenizer, token.token, token.logprob)
        content.append(entry | {"top_logprobs": _top_entries(tokenizer, token)})
    return {"content": content}


def text_form(
    tokenizer: TokenizerWrapper, sampled: Sequence[SampledToken], offset: int
) -> dict[str, Any]:
    """Log-probabilities in the form of a completion.

    Args:
        offset: the number of characters of the text before these tokens.
    """
    entries = [_entry(tokenizer, token.token, token.logprob) for token in sampled]
    offsets, tops = [], []
    for token in sampled:
        offsets.append(offset)
        offset += len(token.text)
        # The most probable token comes last, so that it wins among tokens of the same text.
        entries_at = reversed(_top_entries(tokenizer, token))
        tops.append({entry["token"]: entry["logprob"] for entry in entries_at} or None)
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def split(
    sampled: Sequence[SampledToken], text: str
) -> tuple[list[SampledToken], list[SampledToken]]:
    """Finds the tokens of a part of an answer.

    Args:
        sampled: tokens, of which the first may be of what comes before the part.
        text: of the part.

    Returns:
        The tokens that have a share in it, and those after them.
    """
    start = "".join(token.text for token in sampled).find(text)
    if start < 0:
        return [], [*sampled]
    end, at = start + len(text), 0
    own: list[SampledToken] = []
    for i, token in enumerate(sampled):
        if at >= end:
            return own, [*sampled[i:]]
        at += len(token.text)
        # A token that is a part of a character has no text.
        if at > start or (at == start and not token.text):
            own.append(token)
    return own, []


def _top_entries(tokenizer: TokenizerWrapper, token: SampledToken) -> list[dict[str, Any]]:
    """The entries of the most probable tokens at a position, in descending order."""
    entries = [_entry(tokenizer, other, logprob) for other, logprob in token.top_tokens]
    return sorted(entries, key=lambda entry: -entry["logprob"])


def _entry(tokenizer: TokenizerWrapper, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {
        "id": token,
        "token": text,
        "logprob": max(_LEAST, logprob),  # in this order it replaces NaN as well
        "bytes": _bytes(tokenizer, token, text),
    }


def _bytes(tokenizer: TokenizerWrapper, token: int, text: str) -> list[int] | None:
    """The bytes of a token, or None if the tokenizer does not tell them.

    A token that is a part of a character has no text of its own, but its name in the vocabulary
    spells its bytes.
    """
    if "\ufffd" not in text:
        return list(text.encode())
    name = tokenizer.convert_ids_to_tokens(token)
    spelled = bytes(_BYTES[character] for character in name if character in _BYTES)
    return list(spelled) if spelled.decode(errors="replace") == text else None
