"""Rounds of up to 16 rows, as copied drafts make them, with every kernel executed from its text."""

import mlx.core as mx
import pytest
from helpers_metal import executed
from test_kernels_model import LINEAR, ROUTED, demo

from mlx_qwen3next import generate_step, load

pytestmark = pytest.mark.metal

TEXT = "a = [1, 2, 3, 4, 5, 6, 7, 8]\n" * 3


def test_copies_give_the_same_tokens():
    prompt = mx.array(load()[1].encode(TEXT))

    def steps(**speculation):
        return list(generate_step(prompt, demo(4), max_tokens=26, **speculation))

    plain = [step.token for step in steps(mtp="off")]
    with executed() as launches:
        copied = steps(mtp="off", lookup=15)
    assert [step.token for step in copied] == plain
    assert any(step.from_draft for step in copied)
    assert max(step.drafted for step in copied) == 15
    # All rows of a round share its launches.
    passes = [step.drafted for step in copied if not step.from_draft]
    rounds = launches["gated_delta_round"] + launches["gated_delta_round_after"]
    assert rounds == LINEAR * sum(drafted > 0 for drafted in passes)
    for name in ("router", "expert_gate_up", "expert_down"):
        assert launches[name] == ROUTED * (len(passes) + 1)  # the last token is fed at the end
