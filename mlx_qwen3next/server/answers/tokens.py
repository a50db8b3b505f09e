"""The answer to a request, as the engine hands it to the HTTP side: token by token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .calls import Format


@dataclass
class Context:
    """The facts of a request that both sides read.

    Args:
        tokenizer: the model's.
        prompt: the prompt's token ids.
        reasoning_open: whether the answer begins within reasoning that the template has opened.
        opening: the answer's beginning, if the prompt holds it already.
        format: the form of its calls; None if it goes on with a text, which is no chat.
        cached: how many of the prompt's tokens were in the prompt cache; None until that is known.
        accepted: the right drafts among the tokens of the answer so far, by their source.
        stopped: whether the client has gone.
    """

    tokenizer: TokenizerWrapper
    prompt: list[int]
    reasoning_open: bool = False
    opening: str = ""
    format: Format | None = None
    cached: int | None = None
    accepted: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    def stop(self) -> None:
        """Tells the engine to drop the request."""
        self.stopped = True


@dataclass(frozen=True)
class SampledToken:
    """A generated token.

    Args:
        text: what it adds to the answer's text.
        token: its id.
        logprob: its log-probability, or 0 if that was not asked for.
        finish_reason: "stop" or "length" with the last token, otherwise None.
        top_tokens: the most probable tokens at its place and their log-probabilities, as many as
            were asked for, in any order.
        stop_word: the one that has ended the answer, if one has.
    """

    text: str
    token: int
    logprob: float = 0.0
    finish_reason: str | None = None
    top_tokens: tuple[tuple[int, float], ...] = ()
    stop_word: str | None = None
