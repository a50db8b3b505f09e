"""The work and the memory of a chunk, counted, against the model's weights and MLX's memory."""

import math
import sys
from collections import Counter

import configs
import long_prompts
import pytest
from helpers_generate import bundled

from mlx_qwen3next import generate_step
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.model.reading import LEAST_ROOM, MOST, MOST_ROOM, Reading, capacity


def reading(room=math.inf, **changes):
    config = Config.from_dict(configs.INSTRUCT | changes)
    return Reading(config, 2, room, in_pieces=False)


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [1, 3]}], ids=["sparse", "dense"])
def test_a_token_multiplies_with_the_weights_that_it_uses(changes):
    small = {"num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 4, "vocab_size": 8}
    of = reading(**small, **changes)
    used = 0
    for path, shape in Model(of.config).parameter_shapes().items():
        if ".layers." in path:
            used += math.prod(shape) * (4 / 64 if ".switch_mlp." in path else 1)
    rule = 6 * 3 * 32 * 128 * 128  # of six layers: the state is read twice and written
    assert of.multiply_adds(1, 0) == pytest.approx(used + rule, rel=2e-3)
    assert of.multiply_adds(1000, 0) > 1000 * of.multiply_adds(1, 0)


def test_attention_meets_each_key_twice():
    of = reading()
    more = of.multiply_adds(3, 1000) - of.multiply_adds(3, 0)
    assert more == 3 * 1000 * 12 * 2 * 16 * 256
    parts = of.multiply_adds(700, 0) + of.multiply_adds(300, 700)
    assert parts == of.multiply_adds(1000, 0)


def test_a_chunk_takes_the_memory_of_the_formula():
    """As in docs/long_prompts.md, with a shorter text and smaller chunks."""
    (ratio,) = long_prompts.measure([16_384], room=3 * 2**23)
    assert 0.85 <= ratio <= 1.05


def test_scores_of_the_80b_model_limit_the_chunk():
    """Without a limit 2,048 tokens would need 17 GB for them at 262,144 tokens."""
    assert reading().scratch(2048, 262_144) > 17e9
    of = reading(room=2**32)
    chunks = [of.most(math.inf, held) for held in (0, 8192, 32_768, 131_072, 262_144)]
    assert chunks == sorted(chunks, reverse=True) and chunks[0] > 4096 and chunks[-1] < 512
    for chunk, held in zip(chunks, (0, 8192, 32_768, 131_072, 262_144), strict=True):
        assert of.scratch(chunk, held) <= 2**32 < of.scratch(chunk + 1, held) or chunk == MOST
    assert of.most(math.inf, 8192, prompts=4) < chunks[1] / 2


@pytest.mark.parametrize(
    ("spare", "room"), [(0, LEAST_ROOM), (8 * 10**9, 2 * 10**9), (10**12, MOST_ROOM)]
)
def test_a_chunk_may_take_a_quarter_of_what_is_left(monkeypatch, spare, room):
    monkeypatch.setattr(capacity, "spare", lambda: spare)
    assert Reading.here(reading().config, 2).room == room


def functions_called(model, length):
    """How often each function is called while a prompt of this length is read in chunks."""
    names = Counter()

    def count(frame, event, _):
        names.update([frame.f_code.co_qualname] * (event == "call"))

    sys.setprofile(count)
    try:
        list(generate_step([5] * length, model, max_tokens=1, mtp=1, prefill_step_size=64))
    finally:
        sys.setprofile(None)
    return names


def test_a_chunk_of_a_new_length_traces_nothing():
    """MLX never forgets a trace, and chunks have as many lengths as tokens: a server would grow."""
    model, _ = bundled()
    for length in (128, 100, 30):
        functions_called(model, length)
    for length in (101, 43, 17):
        assert functions_called(model, length) == functions_called(model, length)
