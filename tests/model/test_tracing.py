"""Traced layers: the results of untraced ones, few traces, nothing held by them.

MLX cannot trace a kernel's launch here, so the compositions stand for the kernels.
"""

import gc

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers_streamed import reading_ahead
from mlx.utils import tree_flatten, tree_map

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.bench.on_metal import ours
from mlx_qwen3next.checkpoint.loading import load_model
from mlx_qwen3next.compute import gated_delta, proof
from mlx_qwen3next.model import gated_delta_net
from mlx_qwen3next.model.cache import Round, Undo, settle
from mlx_qwen3next.model.packed import tracing

CASES = ["base", "dense", "permutation", "eps"]


@pytest.fixture
def traces(monkeypatch):
    """While active, compositions count as kernels. Yields the names of the methods traced."""
    names = []

    def trace(run):
        def counted(*args, **options):
            names.append(run.__self__._method.__qualname__)
            return run(*args, **options)

        return mx.compile(counted)

    def call(operation, *args, **options):
        return operation.composition(*args, **options)

    monkeypatch.setattr(tracing, "trace", trace)
    monkeypatch.setattr(metal_kernels, "available", lambda: True)
    monkeypatch.setattr(proof, "_mode", "on")
    monkeypatch.setattr(proof.Operation, "__call__", call)
    monkeypatch.setattr(gated_delta_net, "replayed", replayed)
    monkeypatch.setattr(tracing, "_functions", {})
    return names


def replayed(before):
    """The state after a replay of ``keep`` tokens, where that is an array, as a kernel computes."""
    if not isinstance(before.keep, mx.array) or before.tape is None:
        return gated_delta.replayed(before)
    rows, state, tape, keep = before
    n = tape.g.shape[1]
    for t in range(n):
        one = [x[:, t : t + 1] for x in tape]
        state = mx.where(t < keep, gated_delta.gated_delta_replay(state, *one, 1), state)
    kept = keep + mx.arange(rows.shape[1] - n)
    return mx.take(rows, kept, axis=1), state


def run(model, seed=0):
    """The logits of a prompt, steps, rounds with other counts of kept tokens, and an undone step;
    then the cache."""
    numbers = np.random.default_rng(seed)
    cache, results = model.make_cache(), []

    def forward(rows):
        tokens = mx.array(numbers.integers(0, 80, (1, rows)))
        results.append(model(tokens, cache))
        mx.eval(results)

    forward(20 + seed)
    for _ in range(3):
        forward(1)
    for rows, keep in [(3, 2), (4, 4), (2, 1), (4, 0), (16, 9), (9, 8), (4, 1), (3, 3)]:
        with Round(cache, rows) as round:
            forward(rows)
            round.commit((keep + seed) % (rows + 1))
    with Undo(cache) as undo:
        forward(1)
    undo()
    forward(2)
    settle(cache)
    return results, [
        array for _, array in tree_flatten([c.state for c in cache]) if array is not None
    ]


@pytest.mark.parametrize("case", CASES)
def test_traced_layers_compute_the_same(case, request):
    model = load_model(checkpoints.GOLDENS / case, dtype=mx.float32)
    expected, state = run(model)
    names = request.getfixturevalue("traces")
    for _ in range(2):  # the second time all is traced
        results, after = run(model)
        for a, b in zip([*results, *after], [*expected, *state], strict=True):
            assert np.abs(np.array(a - b)).max() <= 2e-6 * np.abs(np.array(b)).max()
    assert set(names) == {"Stretch.run", "TracedRMSNorm.run"}


def test_a_kind_is_traced_once_for_all_layers_and_counts_of_kept_tokens(traces):
    model = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
    for seed in (1, 2, 1, 2):  # the first call of a kind runs as it is
        run(model, seed)
    known = len(traces)
    other = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
    for seed in (1, 2):
        run(model, seed)
        run(other, seed)
    assert len(traces) == known


def assigned(model):
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, mx.array):
                setattr(module, name, value * 1.02)


def in_place(model):
    for _, value in tree_flatten(model.parameters()):
        value *= 1.01
        value[...] = value * 1.01


def loaded(model):
    weights = tree_flatten(model.parameters())
    model.load_weights([(path, value * 1.02) for path, value in weights])


def rounded(model):
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)


CHANGES = [
    *(assigned, in_place, loaded, rounded),
    lambda model: model.apply(lambda value: value * 1.02),
    lambda model: model.update(tree_map(lambda value: value * 1.02, model.parameters())),
]


@pytest.mark.parametrize(
    "change", CHANGES, ids=["=", "[...] =", "load", "dtype", "apply", "update"]
)
def test_a_changed_weight_is_seen(change, traces, monkeypatch):
    """Every weight of the layers and of the head, however it was changed."""
    model = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)

    def step():
        cache, pairs = model.make_cache(), model.mtp.make_cache()
        for tokens in (mx.arange(20)[None], mx.array([[5, 6]])):
            hidden = model.model(tokens, cache)
            drafted = model.mtp(hidden, tokens, pairs)
        return np.array(mx.concatenate([hidden, drafted]))

    before = [step() for _ in range(2)][-1]  # the second time all is traced
    count = len(traces)
    change(model)
    after = step()
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "MOST_ROWS", 0)
        expected = step()
    assert count == len(traces) > 0 and np.abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def kind(module):
    return tracing.structure_of(module).kind


def test_stretches_of_the_same_layers_are_of_one_kind():
    first, *middle, last = (kind(stretch) for stretch in ours(16).model.stretches)
    assert len(middle) == 3 and len({first, *middle, last}) == 3


def test_a_part_put_in_another_s_place_is_of_another_kind():
    stretch = ours(8).model.stretches[1]
    before = tracing.structure_of(stretch)
    assert tracing.structure_of(stretch) is before
    stretch.linear[0].mlp.gate = nn.Linear(256, 17)
    after = tracing.structure_of(stretch)
    assert after.kind != before.kind
    owners = set(map(id, after.places[0]))
    assert id(stretch.linear[0].mlp.gate) in owners


def test_layers_that_differ_are_of_different_kinds():
    model = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
    first, second = model.layers[:2]
    assert kind(first) == kind(second) != kind(model.layers[3])
    second.mlp.top_k = 1
    vars(second).pop("_structures")
    assert kind(first) != kind(second)


def test_layers_of_other_positions_are_of_different_kinds():
    """The frequencies of YaRN are constants of a trace."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    base = checkpoints.GOLDENS / "base"
    plain, scaled = (load_model(base, rope_scaling=scaling) for scaling in (None, yarn))
    assert kind(plain.layers[3]) != kind(scaled.layers[3])
    assert kind(plain.layers[0]) == kind(scaled.layers[0])


def test_what_runs_as_a_composition_is_not_traced(traces, monkeypatch):
    def compose(operation, *args, **options):
        return operation._compose(*args, **options)

    model = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
    monkeypatch.setattr(proof.Operation, "__call__", compose)
    run(model)
    run(model)
    assert traces == []


def test_layers_with_experts_on_disk_are_traced_as_far_as_the_router(request, tmp_path):
    checkpoints.convert(tmp_path, group_size=32, bits=3)
    expected, state = run(load_model(tmp_path, dtype=mx.float32))
    model = reading_ahead(5, tmp_path)
    names = request.getfixturevalue("traces")
    for _ in range(2):
        results, after = run(model)
        for a, b in zip([*results, *after], [*expected, *state], strict=True):
            assert np.abs(np.array(a - b)).max() <= 2e-6 * np.abs(np.array(b)).max()
    known = len(names)
    run(reading_ahead(4, tmp_path))
    assert len(names) == known  # slots are no part of a trace
    methods = "linear_step", "attention_heads", "attention_step", "guess_step"
    assert {f"StreamedDecoderLayer.{name}" for name in methods} < set(names)


def test_nothing_is_traced_without_kernels():
    model = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_Traced", None)
        run(model)
        run(model)


def test_traces_hold_no_weights(traces):
    gc.collect()
    before = mx.get_active_memory()
    for seed in range(2):
        model = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
        size = mx.get_active_memory() - before
        run(model, seed)
        run(model, seed)
        del model
        gc.collect()
    assert traces and mx.get_active_memory() - before < size / 10


def test_an_error_within_a_trace_leaves_the_weights(traces):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.ones((4,))

        @tracing.traced()
        def run(self, numbers, x):
            calls.append(x)
            if len(calls) == 2:  # the trace
                raise ValueError("no luck")
            return x * self.weight

    layer, x, calls = Layer(), mx.ones((1, 2, 4)), []
    layer.run((), (), x)
    with pytest.raises(ValueError, match="no luck"):
        layer.run((), (), x)
    assert layer.weight.tolist() == [1, 1, 1, 1]
