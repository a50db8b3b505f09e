"""From tokens to text, as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper


class TextDecoder:
    """A sequence's text, token by token; no piece of it ends within a character."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens that end within a character

    def add(self, token: int, finish_reason: str | None = None) -> str:
        """Returns the text that one more token completes; a stop token has none.

        Args:
            finish_reason: mlx-lm's, if the token is the last.
        """
        if finish_reason != "stop":
            self._pending.append(token)
        # mlx-lm's detokenizer drops a leading space and garbles NUL bytes.
        text = self._tokenizer.decode(self._pending)
        if finish_reason is None and text.endswith("\ufffd"):
            return ""
        self._pending.clear()
        return text


class StopWords:
    """Holds back the end of a text while it may be the beginning of a stop word."""

    def __init__(self, words: Sequence[str]):
        self._words = words
        self._held = ""

    def add(self, text: str, finish_reason: str | None = None) -> tuple[str, str | None]:
        """Returns the text that is certain by now, and the stop word that has ended it, if any.

        Args:
            finish_reason: of the text, if it ends here anyway.
        """
        text = self._held + text
        found = [(i, word) for word in self._words if (i := text.find(word)) >= 0]
        if found:
            end, word = min(found)
            return text[:end], word
        hold = 0
        if finish_reason is None:
            longest = max(map(len, self._words), default=1)
            ends = range(1, min(longest, len(text) + 1))
            hold = max((n for n in ends if self._begins(text[-n:])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def _begins(self, end: str) -> bool:
        return any(word.startswith(end) for word in self._words)
