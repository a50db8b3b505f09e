"""Keys and values are quantized from a position on, however the text is read and continued."""

import functools
import itertools

import mlx.core as mx
import pytest
from float64 import relative_error
from helpers_generate import interleaved
from helpers_speculative import Cycle, Script
from mlx_lm.sample_utils import greedy_sampler

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.sampling import Chooser
from mlx_qwen3next.decoding.sequence import TokenSequence
from mlx_qwen3next.model.quantized_kv import KVQuantization
from mlx_qwen3next.prompt_cache.store import PromptCache

PROMPT = [(7 * i * i + 3) % 64 for i in range(20)]
COUNT = 10  # tokens after it
SAME, OTHER = 1e-5, 5e-3  # relative errors of probabilities


def steps(start, prompt=PROMPT, count=COUNT, **options):
    """Tokens and their probabilities, with two bits from a position on."""
    options = {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": start} | options
    found = [*generate_step(prompt, interleaved(), max_tokens=count, **options)]
    return [step.token for step in found], mx.stack([mx.exp(step.logprobs) for step in found])


@functools.cache
def one_by_one(start):
    return steps(start, mtp="off", prefill_step_size=1)


STARTS = [0, 10, 21, 25]  # before the prompt, within it, and after one and five more tokens


@pytest.mark.parametrize("start", STARTS)
def test_chunks_and_rounds_end_where_quantization_starts(start):
    tokens, expected = one_by_one(start)
    for options in ({"mtp": "off"}, {"mtp": 3}, {"mtp": 3, "prefill_step_size": 7}):
        again, probabilities = steps(start, **options)
        assert again == tokens and relative_error(probabilities, expected) <= SAME
    assert relative_error(one_by_one(start + 1)[1], expected) > OTHER


@pytest.mark.parametrize("start", [21, 25])
def test_right_drafts_beyond_the_start_wait(start):
    tokens, expected = one_by_one(start)
    sequence = TokenSequence(
        *(interleaved(), interleaved().make_cache(), [], [PROMPT[:-1], PROMPT[-1:]]),
        depth=Cycle(4),
        drafters=[Script([*PROMPT[1:], *tokens], itertools.repeat(4))],
        quantization=KVQuantization(2, 32, start),
    )
    sequence.read()
    found = [*sequence.generate(Chooser(greedy_sampler, [], mx.array(PROMPT)), COUNT)]
    assert sum(step.from_draft for step in found) >= 7
    probabilities = mx.stack([mx.exp(step.logprobs) for step in found])
    assert relative_error(probabilities, expected) <= SAME


@pytest.mark.parametrize("mtp", ["off", 3])
def test_an_answer_goes_on_after_a_stop_where_quantization_starts(mtp):
    """A step that was queued is taken back, and the cache is as if it had not been."""
    tokens, expected = one_by_one(25)
    for stop in (4, 5, 6):
        cache = interleaved().make_cache()
        assert steps(25, count=stop, mtp=mtp, prompt_cache=cache)[0] == tokens[:stop]
        rest = steps(25, tokens[stop : stop + 1], COUNT - stop - 1, mtp=mtp, prompt_cache=cache)
        assert relative_error(rest[1], expected[stop + 1 :]) <= SAME


@pytest.mark.parametrize("start", STARTS)
def test_going_on_from_a_kept_text(start):
    kept = PromptCache(max_bytes=2**30)
    for n in (8, 16):
        steps(start, [*PROMPT[:n], 1], count=1, mtp=3, prompt_cache=kept)
    tokens, expected = one_by_one(start)
    for mtp in ("off", 3):
        assert kept.fetch(PROMPT)[1] > 0
        again, probabilities = steps(start, mtp=mtp, prompt_cache=kept)
        assert again == tokens and relative_error(probabilities, expected) <= SAME
