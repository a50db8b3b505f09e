"""Constraints: only allowed tokens, and the same ones with drafts and without."""

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import golden, golden_tokens, tokens_of

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.constraint import Constraint, allow
from mlx_qwen3next.decoding.drafters.forced import ForcedDrafter
from mlx_qwen3next.decoding.speculative import Acceptance

N = 16
VOCAB = 96
WAYS = ({"mtp": 3}, {"mtp": 2, "lookup": 7})


class Stub(Constraint):
    """Every sixth token decides alone about the next three; the others are even."""

    def __init__(self, begin):
        super().__init__(begin)
        self.tokens = []

    def _allowed(self, tokens):
        place = len(tokens) % 6
        if place < 3 and len(tokens) >= 6:
            return [(tokens[len(tokens) - place - 1] + 7 * place) % VOCAB]
        return range(0, VOCAB, 2)

    def masks(self, drafts, start=0):
        masks = np.full((len(drafts) + 1 - start, VOCAB // 32), 2**32 - 1, np.uint32)
        for i in range(len(drafts) + 1):
            if i > 0 and drafts[i - 1] not in self._allowed([*self.tokens, *drafts[: i - 1]]):
                break
            if i >= start:
                bits = np.isin(np.arange(VOCAB), self._allowed([*self.tokens, *drafts[:i]]))
                masks[i - start] = np.packbits(bits, bitorder="little").view(np.uint32)
        return masks

    def forced(self):
        tokens = [*self.tokens]
        while len(found := self._allowed(tokens)) == 1:
            tokens += found
        return tokens[len(self.tokens) :]

    def _accept(self, token):
        assert token in self._allowed(self.tokens)
        self.tokens.append(token)

    def _take_back(self, count):
        del self.tokens[len(self.tokens) - count :]


def said(n=N, **options):
    """The steps of an answer under the stub's rules, and the stub."""
    (model, _), (prompt, _) = golden("base"), golden_tokens("base")
    stub, sampling = Stub(len(prompt)), {"mtp": "off", "lookup": "off"} | options
    mx.random.seed(3)
    steps = generate_step(prompt, model, max_tokens=n, logits_processors=[stub], **sampling)
    return list(steps), stub


@pytest.mark.parametrize(
    "sampling", [{}, {"temp": 1.5}, {"temp": 1.0, "top_k": 20}, {"repetition_penalty": 1.3}]
)
def test_tokens_are_allowed_and_those_of_plain_decoding(sampling):
    steps, stub = said(**sampling)
    plain = tokens_of(steps)
    assert stub.tokens == plain  # each was checked
    free, _ = golden_tokens("base")
    assert plain != free
    for way in WAYS:
        steps, stub = said(**sampling, **way)
        assert stub.tokens == tokens_of(steps) == plain


def test_forced_tokens_are_drafts_that_are_all_right():
    drafts = Acceptance()
    steps, _ = said(mtp="off", lookup=3)
    for step in steps:
        drafts.add(step)
    assert drafts.drafted["grammar"] == drafts.accepted["grammar"]
    # The last of three is not known to be forced before the sixth token is known.
    assert drafts.accepted["grammar"] >= 2 * (N // 6 - 1)
    assert drafts.rounds + drafts.accepted["grammar"] == N
    steps, _ = said(lookup="off")
    assert {step.source for step in steps} == {None}
    stub = Stub(0)
    stub.follow(np.array([0, 2, 4, 6, 8, 10]))
    drafter = ForcedDrafter(stub)
    assert stub.forced() == [10, 17, 24]
    assert drafter.offer().shares == [1.0] * 3 and drafter.offer(ahead=True).shares == [1.0] * 2


@pytest.mark.parametrize("way", [{}, *WAYS])
def test_another_end_takes_the_constraint_back_to_it(way):
    """A sequence that stops and goes on, or begins again, has the same rules at each position."""
    (model, _), (prompt, _) = golden("base"), golden_tokens("base")
    plain = tokens_of(said()[0])
    cache, stub = model.make_cache(), Stub(len(prompt))
    options = {"mtp": "off", "lookup": "off", "prompt_cache": cache, "logits_processors": [stub]}
    steps = generate_step(prompt, model, max_tokens=N, **options | way)
    first = [next(steps).token for _ in range(9)]
    steps.close()
    assert stub.tokens == first == plain[:9]
    stub.follow(np.array([*prompt, *plain[:4]]))
    assert stub.tokens == plain[:4]
    stub.follow(mx.array([*prompt, *plain[:8]]))
    assert stub.tokens == plain[:8]


def test_masks_leave_the_other_logits_as_they_are():
    logits = mx.random.normal((2, 70)).astype(mx.bfloat16)
    masks = np.array([[5, 0, 1], [0, 2**31, 2**7]], np.uint32)  # of 96 tokens, of which 70 exist
    left = allow(logits, masks)
    assert left.dtype == logits.dtype and left.shape == logits.shape
    expected = np.full((2, 70), -np.inf)
    for row, token in ((0, 0), (0, 2), (0, 64), (1, 63)):
        expected[row, token] = logits[row, token].item()
    assert np.array_equal(np.array(left.astype(mx.float32)), expected)
