"""How many GPU launches a step queues, counted in its graph."""

import launches
import mlx.core as mx
import prefill_passes
import pytest

from mlx_qwen3next.bench.graph import count
from mlx_qwen3next.bench.on_metal import CONFIG, as_on_metal
from mlx_qwen3next.model.packed import widening


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Launches do not depend on widths, and a CPU is slow at bfloat16."""
    widths = ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    for name in widths:
        monkeypatch.setitem(CONFIG, name, 64)
    monkeypatch.setitem(CONFIG, "num_experts", 8)


@pytest.mark.parametrize("rows, speculating", [(1, False), (4, True), (9, True), (16, True)])
def test_a_period_with_kernels(rows, speculating):
    counted = launches.per_period(launches.ours, rows, kernels=True, speculating=speculating)
    assert counted.total() == 40


MIXES = {
    "experts 3, else 8": ({"switch_mlp": 3, "": 8}, 40),  # a shared expert of more bits costs none
    "as mixed_4_6": ({"v_proj": 6, "down_proj": 6, "": 4}, 43),
    "gate not as up": ({"switch_mlp.gate_proj": 3, "": 6}, 104),
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_period_of_mixed_bits(mix, monkeypatch):
    monkeypatch.setattr(widening, "FEW", 0)  # as if the matrices were large
    bits, expected = MIXES[mix]

    def make(layers):
        return launches.ours(
            layers, lambda path: next(n for part, n in bits.items() if part in path)
        )

    assert launches.per_period(make, 1, kernels=True).total() == expected


def test_a_period_without_kernels():
    """MLX's own operations alone: fewer launches than mlx-lm's."""
    assert launches.per_period(launches.ours, 1).total() == 142


@pytest.mark.parametrize(
    "make, kernels, expected",
    [(launches.mlx_lm, False, 186), (launches.ours, False, 166), (launches.ours, True, 68)],
)
def test_a_period_of_a_prompt(make, kernels, expected):
    assert launches.per_period(make, 512, kernels=kernels).total() == expected


def test_a_period_of_mlx_lm():
    """The count that the others stand beside."""
    assert launches.per_period(launches.mlx_lm, 1).total() == 160


def test_each_launch_is_counted_once():
    """A layer's launches as they are documented: nine, and thirteen with attention."""
    counted = launches.per_period(launches.ours, 1, kernels=True)
    assert counted["QuantizedMatmul"] == 4 * 3  # two projections and the router
    assert counted["SliceUpdate"] == 2  # keys and values
    kernels_and_attention = 3 * (2 + 1 + 3) + (2 + 1 + 1 + 1 + 3)
    assert counted["Erf"] == kernels_and_attention == 26


@pytest.mark.parametrize("form", prefill_passes.COUNTED)
def test_the_passes_of_a_prompts_experts_are_its_launches(form):
    """The table's, beside those in the graph of one layer's experts."""
    make, kernels = prefill_passes.COUNTED[form]
    model, stock = make(1), make is launches.mlx_lm
    x = mx.zeros((1, 512, CONFIG["hidden_size"]), mx.bfloat16)
    mx.eval(model.layers[0].parameters())
    with as_on_metal(launches.one_launch, kernels=kernels):
        y = x + model.layers[0].mlp(x) if stock else model.layers[0].mlp(x, x)
        assert count([y]).total() == len(prefill_passes.FORMS[form])
