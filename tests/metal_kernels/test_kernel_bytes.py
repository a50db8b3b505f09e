"""What the kernels read and write at the 80B model's shapes, against formulas."""

from functools import cache

import kernel_bytes
import pytest
from kernel_bytes import HV, TOP, C, D, H, I, K, P

MOST = 1.3  # times the compulsory minimum, for weights and state
STATE = HV * D * D * 4
experts = cache(kernel_bytes.experts)


def assert_moved_once(counted, expected):
    """All of it and nothing else, and no line by two threadgroups."""
    assert kernel_bytes.least(counted) == expected
    assert kernel_bytes.ratio(counted) <= MOST


@pytest.mark.parametrize(("rows", "bits", "shared"), [(1, 4, None), (2, 4, None), (1, 3, 8)])
def test_an_experts_weights_are_read_once_a_step(rows, bits, shared):
    counted, distinct = experts(rows, bits, shared), kernel_bytes.chosen(rows)
    assert TOP < distinct <= rows * TOP + 1
    for kernel, values in (("expert_gate_up", 2 * I * H), ("expert_down", H * I)):
        buffers = counted[f"{kernel}_shared" if shared else kernel]
        stacks = {"": (distinct - bool(shared), bits)} | (
            {"shared_": (1, shared)} if shared else {}
        )
        for prefix, (number, of_bits) in stacks.items():
            assert_moved_once(buffers[f"{prefix}weight"], number * values * of_bits // 8)
            for name in ("scales", "biases"):
                assert_moved_once(buffers[prefix + name], number * values // 64 * 2)


def test_rows_share_what_they_can():
    """Two rows choose fewer experts than twice one row's."""
    one, two = (experts(rows, 4, None)["expert_gate_up"]["weight"].unique_read for rows in (1, 2))
    assert one < two < 2 * one
    assert kernel_bytes.chosen(2) * one == (TOP + 1) * two


@pytest.mark.parametrize(
    "rows, recording", [(1, False), (5, False), (1, True), (4, True), (9, True)]
)
def test_the_state_goes_in_and_out_once(rows, recording):
    (buffers,) = kernel_bytes.gated_delta(rows, recording).values()
    for name in ("state", "state_out"):
        assert_moved_once(buffers[name], STATE)
    assert buffers["state"].read == buffers["state_out"].written == STATE
    assert buffers["x"].unique_read == rows * P * 2
    assert buffers["before"].unique_read == (K - 1) * C * 2
    kept = K - 1 + rows if recording else K - 1
    assert buffers["rows_out"].unique_written == kept * C * 2
    small = sum(b.lines_read + b.lines_written for n, b in buffers.items() if "state" not in n)
    assert small < 0.3 * 2 * STATE  # up to nine rows, the state is what costs


@pytest.mark.parametrize("rows", [1, 4])
def test_activations_are_moved_once(rows):
    for kernel, buffers in (kernel_bytes.norms(rows) | kernel_bytes.attention(rows)).items():
        for name in buffers.keys() & {"x", "y", "o", "sum", "normed", "q", "k", "v"}:
            assert kernel_bytes.ratio(buffers[name]) == 1, (kernel, name)


def test_the_results_of_a_rows_experts_are_read_once():
    """In whatever order they lie; the places and weights are little beside them."""
    rows = 8
    buffers = kernel_bytes.of_prompts(rows)["combine"]
    for name, values in {"x": rows * (TOP + 1) * H, "residual": rows * H, "y": rows * H}.items():
        assert kernel_bytes.least(buffers[name]) == values * 2
        assert kernel_bytes.ratio(buffers[name]) == 1
    small = sum(buffers[name].lines_read for name in ("places", "weights"))
    assert small < 0.02 * buffers["x"].lines_read
