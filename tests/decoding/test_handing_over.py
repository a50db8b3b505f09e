"""A decoding that ends early, for somebody else to go on from there."""

import mlx.core as mx
import pytest
from helpers_caches import assert_holds
from helpers_generate import golden, golden_tokens
from helpers_speculative import Cycle, decoding

from mlx_qwen3next.decoding.drafters.speculation import Speculation


def model():
    return golden("permutation")[0]


@pytest.mark.parametrize("depths", [(0,), (4,), (0, 0, 3), (2, 0)], ids=str)
def test_handing_over_a_decoding(depths):
    """It tells what is chosen already; the cache then lacks the last token alone, the head none
    but what follows it; whoever goes on there tells what comes next."""
    prompt, expected = golden_tokens("permutation")
    for n in range(12):
        cache, head = model().make_cache(), model().mtp.make_cache()
        drafter = Speculation.of(model()).drafter(head)
        text = mx.array(prompt[:-1])
        drafter.committed(text, model().model(text[None], cache))
        first = decoding(model(), prompt, cache, Cycle(*depths), drafter)
        steps = first.tokens(30)
        told = [next(steps).token for _ in range(n)]
        first.hand_over()
        told += [step.token for step in steps]
        assert told == expected[: len(told)]
        assert len(told) - n <= max(*depths, 1)  # what a round leaves, or the plain step ahead
        held = (prompt + told)[:-1]
        assert_holds(model(), cache + head, held, head=True)
        again = decoding(model(), prompt + told, cache, Cycle(*depths), drafter)
        assert [step.token for step in again.tokens(5)] == expected[len(told) : len(told) + 5]
        assert_holds(model(), cache + head, prompt + expected[: len(told) + 5], head=True)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("depth", [0, 3])
def test_feeding_the_last_token_after_all(depth, n):
    """Where nobody goes on, or nothing was begun."""
    prompt, expected = golden_tokens("permutation")
    cache, head = model().make_cache(), model().mtp.make_cache()
    drafter = Speculation.of(model()).drafter(head)
    text = mx.array(prompt[:-1])
    drafter.committed(text, model().model(text[None], cache))
    first = decoding(model(), prompt, cache, Cycle(depth), drafter)
    steps = first.tokens(30)
    told = [next(steps).token for _ in range(n)]
    first.hand_over()
    told += [step.token for step in steps]
    for _ in range(2):  # the second time there is nothing left to do
        first.feed()
        assert_holds(model(), cache + head, prompt + expected[: len(told)], head=True)
