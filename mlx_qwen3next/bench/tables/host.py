"""The host's time for a step: how long it takes to build the graph of 48 layers.

Graphs are built as on an Apple GPU, and every launch is one opaque primitive, here and for mlx-lm,
so that any machine can measure it. The text of custom kernels, which MLX writes anew for each
launch outside of a trace, is not part of the time; its launches are counted instead.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from ...decoding.drafters.mtp import MTPDrafter
from ...decoding.sampling import Chooser
from ...model.cache import Cache, Round
from ..on_metal import as_on_metal, mlx_lm, ours

LAYERS = 48
# Steps of a kind in a row, as in decoding, after some that are not timed: traces are made in the
# first two, and then caches of the processor hold what the next step needs.
WARM, IN_A_ROW = 4, 4
DRAFTS = 3

launched = 0  # opaque primitives made by Python calls, not by a trace


def host_table(repeats: int = 20, layers: int = LAYERS) -> str:
    """Measures steps of both packages, in turns, and returns the table.

    Args:
        repeats: turns of each kind of step; the table has the medians.
        layers: of the models, a multiple of 4.
    """
    model, stock = ours(layers), mlx_lm(layers)
    caches = [_prompted(model), _prompted(stock)]
    chooser = Chooser(greedy_sampler, [], mx.array([1], mx.uint32))
    kinds: dict[str, tuple[bool, Callable[[], dict[str, float]]]] = {
        "here": (True, lambda: _plain(model, _copied(caches[0]), chooser)),
        "round": (True, lambda: _round(model, _copied(caches[0]), chooser)),
        "mlx-lm": (False, lambda: _stock(stock, _copied(caches[1]))),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    anew = 0
    for _ in range(repeats):
        for name, (kernels, step) in kinds.items():
            with as_on_metal(opaque, kernels=kernels):
                for i in range(WARM + IN_A_ROW):
                    before = launched
                    parts = step()
                    if i >= WARM:
                        times[name].append(parts)
                        if name == "here":
                            anew = max(anew, launched - before - _attentions(model))
    rows = {
        name: {part: statistics.median([one[part] for one in samples]) for part in samples[0]}
        for name, samples in times.items()
    }
    return "\n".join(_lines(rows, anew, layers))


def _lines(rows: dict[str, dict[str, float]], anew: int, layers: int) -> list[str]:
    here, stock, drafted = (rows[name] for name in ("here", "mlx-lm", "round"))
    total, other = sum(here.values()), sum(stock.values())
    return [
        f"host time of a step of {layers} layers in milliseconds, launches apart",
        *(f"  {part:24}{ms:8.3f}" for part, ms in here.items()),
        f"  {'plain step':24}{total:8.3f}   mlx-lm {other:.3f}, {other / total:.1f} times as much",
        *(f"  {part:24}{ms:8.3f}" for part, ms in drafted.items()),
        f"  {'round of three drafts':24}{sum(drafted.values()):8.3f}",
        f"kernels whose text is written anew in a step: {anew}",
    ]


def opaque(
    inputs: Sequence[Any], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]
) -> list[mx.array]:
    """Makes arrays that depend on ``inputs`` through one primitive."""
    global launched
    launched += 1
    blank = [_blank(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    result: Any = mx.depends(blank, [x for x in inputs if isinstance(x, mx.array)])
    return result


@cache
def _blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    blank = mx.zeros(shape, dtype)
    mx.eval(blank)
    return blank


def _attentions(model: Any) -> int:
    """The launches of MLX's own attention in a step, which are opaque as well."""
    return sum(not layer.is_linear for layer in model.layers)


def _prompted(model: Any) -> Cache:
    """Makes a model's cache after a short prompt."""
    model.eval()
    cache = model.make_cache()
    mx.eval(model.parameters(), model(mx.array([[1, 2, 3]]), cache=cache))
    mx.eval([c.state for c in cache])
    return cache


def _copied(cache: Cache) -> Cache:
    """Copies a cache's entries, whose arrays share their memory."""
    copies = [copy.copy(entry) for entry in cache]
    for entry in copies:
        for name, value in vars(entry).items():
            if isinstance(value, mx.array):
                vars(entry)[name] = copy.copy(value)
    return copies


class _Clock:
    """Measures the parts of a step, in milliseconds."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = (now - self._last) * 1e3
        self._last = time.perf_counter()


def _plain(model: Any, cache: Cache, chooser: Chooser) -> dict[str, float]:
    token, clock = mx.array([5]), _Clock()
    x = model.model.embed(token[None])
    clock("embedding")
    x = model.model.run_layers(x, cache)
    clock("layers")
    logits = model.logits(model.model.norm(x))
    clock("norm and logits")
    chosen = chooser.choose(logits[:, -1])
    clock("choice")
    del chosen
    return clock.parts


def _round(model: Any, cache: Cache, chooser: Chooser) -> dict[str, float]:
    """A round of drafts and their verification, after a token of which the head knows."""
    drafter, token = MTPDrafter(model), mx.array([5], mx.uint32)
    drafter.committed(token, _blank((1, 1, model.args.hidden_size), mx.bfloat16))

    def choose(logits: mx.array, drafts: list[mx.array]) -> mx.array:
        return chooser.choose(logits, drafts)[0]

    clock = _Clock()
    drafts = drafter.propose(token, DRAFTS, choose)
    clock("drafts")
    with Round(cache, DRAFTS + 1) as transaction:
        tokens = mx.concatenate([token, *drafts])
        hidden = model.model(tokens[None], cache)
        clock("verification")
        chosen = chooser.choose_all(model.logits(hidden)[0], drafts)
        clock("logits and choice")
        transaction.commit(2)
    drafter.committed(tokens[:2], hidden[:, :2])
    clock("bookkeeping")
    del chosen
    return clock.parts


def _stock(model: Any, cache: Cache) -> dict[str, float]:
    clock = _Clock()
    logits = model(mx.array([[5]]), cache=cache)
    clock("step")
    del logits
    return clock.parts
