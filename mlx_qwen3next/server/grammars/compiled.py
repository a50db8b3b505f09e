"""Grammars of answers on the logits, by llguidance, which is an extra of the package.

:mod:`.answer` writes the grammars; here they are compiled and followed.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...decoding.constraint import BITS, Constraint
from ...errors import FieldError
from ...model.qwen3_next import Model
from ..answers.json_schema import circle, find, standing_alone, subschemas
from .answer import AnswerGrammar, Schema
from .rules import Rules

MOST_BYTES = 2**18  # of a schema's JSON
KEPT = 32  # compiled grammars; agents send the same tools at every step
ALL = np.uint32(0xFFFFFFFF)
_DETAILS = re.compile(r"\n( +1 \| |<state>)")  # after a message of llguidance's


def is_available() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


class GrammarConstraint(Constraint):
    """An answer's grammar, and how far the answer has come in it.

    Args:
        matcher: llguidance's, at the beginning; nobody else's.
        begin: the number of tokens before the answer.
        known: the number of the tokenizer's tokens.
        vocab: the number of the model's logits, which may be more.
        ends: the tokens that end an answer.
    """

    def __init__(self, matcher: Any, begin: int, known: int, vocab: int, ends: Collection[int]):
        super().__init__(begin)
        self._matcher, self._ends = matcher, ends
        self._known, self._words = -(-known // BITS), -(-max(known, vocab) // BITS)
        self._ended = 0  # tokens from the answer's end on, of which the matcher does not know

    def masks(self, drafts: Sequence[int], start: int = 0) -> np.ndarray:
        masks = np.zeros((len(drafts) + 1 - start, self._words), np.uint32)
        taken = 0
        try:
            for i in range(len(drafts) + 1):
                if i > 0 and not self._goes_on(drafts[i - 1]):
                    masks[max(i - start, 0) :] = ALL
                    break
                taken = i
                if i >= start:
                    self._fill(masks[i - start])
        finally:
            self._take_back(taken)
        return masks

    def forced(self) -> list[int]:
        return [] if self._ended else self._matcher.compute_ff_tokens()

    def _accept(self, token: int) -> None:
        if not self._goes_on(token):
            raise RuntimeError(f"the grammar of the answer allows no token {token} here")

    def _take_back(self, count: int) -> None:
        after_end = min(count, self._ended)
        self._ended -= after_end
        self._matcher.rollback(count - after_end)

    def _goes_on(self, token: int) -> bool:
        """Goes on with a token if it is allowed."""
        if token in self._ends and (self._ended or self._matcher.is_accepting()):
            self._ended += 1
            return True
        return not self._ended and self._matcher.try_consume_tokens([token]) == 1

    def _fill(self, mask: np.ndarray) -> None:
        """Sets the bits of the tokens that are allowed next."""
        if self._ended:
            for token in self._ends:
                mask[token // BITS] |= 1 << token % BITS
            return
        mask = mask[: self._known]
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar of the answer: {_fault(self._matcher)}")
        if not mask.any():
            mask[:] = ALL


class Grammars:
    """The compiled grammars of a model.

    Args:
        tokenizer: the model's.
        vocab: the number of its logits.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab: int):
        self.tokenizer, self._vocab = tokenizer, vocab
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    @classmethod
    def of(cls, model: Model, tokenizer: TokenizerWrapper) -> Grammars:
        """The model's own, which are made at their first use."""
        known = vars(model).get("_grammars")
        if known is None or known.tokenizer is not tokenizer:
            known = vars(model)["_grammars"] = cls(tokenizer, model.args.vocab_size)
        return known

    def __deepcopy__(self, memo: Any) -> Grammars:
        return self  # llguidance's objects cannot be copied in Python's way, nor do they change

    def constraint(self, grammar: str, begin: int) -> Constraint:
        """A grammar at its beginning.

        Args:
            begin: the number of tokens before the answer.
        """
        matcher, ends = self._compile(grammar).deep_copy(), self.tokenizer.eos_token_ids
        known = self._llguidance[1].vocab_size
        return GrammarConstraint(matcher, begin, known, self._vocab, ends)

    def check(self, grammar: AnswerGrammar) -> None:
        """Checks that a grammar can be followed.

        Raises:
            FieldError: a schema is too large, or asks for what llguidance cannot do; the message
                names the place.
            ValueError: the grammar is too large, or llguidance cannot read the tokenizer.
        """
        for name, param, schema, _ in grammar.schemas:
            if (size := len(json.dumps(schema))) > MOST_BYTES:
                message = f"{name} must be at most {MOST_BYTES} bytes as JSON, got {size}"
                raise FieldError(message, param)
            if (pointer := circle(schema)) is not None:
                message = f"{name}: {pointer} needs itself, so that nothing can fit it"
                raise FieldError(message, param)
        try:
            self._compile(grammar.text)
        except ValueError:
            for schema in grammar.schemas:
                self._check_schema(schema)
            raise

    def is_token(self, tag: str) -> bool:
        """Whether a tag is a token of its own, which stands for no other text."""
        tokenizer = self._llguidance[1]
        tokens = tokenizer.tokenize_str(tag, parse_special=True)
        return len(tokens) == 1 and tokenizer.is_special_token(tokens[0])

    @cached_property
    def _llguidance(self) -> tuple[Any, Any]:
        """llguidance's matcher, and its form of the tokenizer, which takes a second to make."""
        import llguidance
        import llguidance.hf

        ends = list(self.tokenizer.eos_token_ids)
        tokenizer = llguidance.hf.from_tokenizer(self.tokenizer._tokenizer, eos_token=ends)
        return llguidance.LLMatcher, tokenizer

    def _compile(self, grammar: str) -> Any:
        if grammar not in self._compiled:
            matcher = self._matcher(grammar)
            if fault := _fault(matcher):
                raise ValueError(f"the grammar of the answer: {fault}")
            self._compiled[grammar] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar]

    def _matcher(self, grammar: str) -> Any:
        make, tokenizer = self._llguidance
        matcher = make(tokenizer, make.grammar_from_lark(grammar), log_level=0)
        matcher.compute_bitmask()  # finds whether there is a first token
        return matcher

    def _check_schema(self, schema: Schema) -> None:
        """Checks a schema alone.

        Raises:
            FieldError: it cannot be enforced; the message names the innermost such part of it.
        """
        pointer, fault = "#", self._fault_at(schema, "#")
        if not fault:
            return
        while True:
            ends = [end for end, _ in subschemas(find(schema.value, pointer))]
            found = ((pointer + end, self._fault_at(schema, pointer + end)) for end in ends)
            inner = next((each for each in found if each[1]), None)
            if inner is None:
                break
            pointer, fault = inner
        raise FieldError(f"{schema.name}: {pointer} cannot be enforced: {fault}", schema.param)

    def _fault_at(self, schema: Schema, pointer: str) -> str:
        """The fault of a part of a schema; empty if it can be enforced."""
        rules = Rules()
        part = schema.value if pointer == "#" else standing_alone(schema.value, pointer)
        return _fault(self._matcher(rules.text(rules.json(part, schema.is_strict))))


def _fault(matcher: Any) -> str:
    """Returns a matcher's fault in one line; empty if there is none."""
    if not matcher.is_error():
        return ""
    text = _DETAILS.split(matcher.get_error())[0]
    if text.startswith("NoExtension"):
        return "nothing can fit it"
    return " ".join(text.rpartition("failed to compile JSON schema: ")[2].split())
