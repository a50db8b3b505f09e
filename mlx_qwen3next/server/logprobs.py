"""Log-probabilities of sampled tokens in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.server import Response
from mlx_lm.tokenizer_utils import TokenizerWrapper

_LEAST = -9999.0  # for minus infinity, which JSON does not have; OpenAI's number


def chat_form(tokenizer: TokenizerWrapper, sampled: Sequence[Response]) -> dict[str, Any]:
    """The form of a chat completion. Every token has mlx-lm's ``id`` as well."""
    content = []
    for response in sampled:
        entry = _entry(tokenizer, response.token, response.logprob)
        content.append(entry | {"top_logprobs": _likeliest(tokenizer, response)})
    return {"content": content}


def text_form(
    tokenizer: TokenizerWrapper, sampled: Sequence[Response], offset: int
) -> dict[str, Any]:
    """The form of a completion, for tokens before which the text had ``offset`` characters."""
    entries = [_entry(tokenizer, response.token, response.logprob) for response in sampled]
    offsets, tops = [], []
    for response in sampled:
        offsets.append(offset)
        offset += len(response.text)
        # The likeliest last: of tokens whose texts are equal it is the one that stays.
        entries_at = reversed(_likeliest(tokenizer, response))
        tops.append({entry["token"]: entry["logprob"] for entry in entries_at} or None)
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _likeliest(tokenizer: TokenizerWrapper, response: Response) -> list[dict[str, Any]]:
    entries = [_entry(tokenizer, top["id"], top["logprob"]) for top in response.top_tokens]
    return sorted(entries, key=lambda entry: -entry["logprob"])


def _entry(tokenizer: TokenizerWrapper, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {
        "id": token,
        "token": text,
        "logprob": max(_LEAST, logprob),  # in this order NaN is replaced too
        # A part of a character has no text, so none of its bytes.
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }
