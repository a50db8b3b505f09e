"""Draws the figures with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.replacing import replacing


def check_available() -> None:
    """Checks that matplotlib is installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plots needs matplotlib: pip install 'mlx-qwen3next[plots]'")


def draw(folder: Path, medians: Mapping[str, Any], growth: Sequence[Mapping[str, float]]) -> None:
    """Writes ``prefill.png``, ``decode.png`` and, if growth was measured, ``growth.png``.

    Args:
        medians: the result of :func:`mlx_qwen3next.bench.comparison.summary.medians`.
        growth: a row for each length; empty if growth was not measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, title in (("prefill", "Reading a prompt"), ("decode", "Decoding")):

        def by_context(figure: Any, name: str = name, title: str = title) -> None:
            axes = figure.subplots()
            for label, rates in medians[name].items():
                axes.plot(list(rates), list(rates.values()), marker="o", label=label)
            contexts = sorted({n for rates in medians[name].values() for n in rates})
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, list(map(str, contexts)))
            _label(axes, title, "prompt (tokens)", "tokens a second")

        _write(folder / f"{name}.png", by_context, (6.4, 4.2))
    if growth:
        _write(folder / "growth.png", lambda figure: _growth(figure, growth), (6.4, 10))


def draw_memory(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes ``memory.png``: the speed of decoding by the memory for experts.

    Args:
        rows: for each amount its ``memory`` in GB, the ``speed`` and the ``expected`` one.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def by_memory(figure: Any) -> None:
        axes, memory = figure.subplots(), [row["memory"] for row in rows]
        axes.plot(memory, [row["speed"] for row in rows], marker="o", label="measured")
        axes.plot(memory, [row["expected"] for row in rows], "k--", label="expected")
        _label(axes, "Decoding, experts on disk", "GB of experts in memory", "tokens a second")

    _write(folder / "memory.png", by_memory, (6.4, 4.2))


def _growth(figure: Any, rows: Sequence[Mapping[str, float]]) -> None:
    n = [row["tokens"] for row in rows]
    reading, step, memory = figure.subplots(3, 1)
    reading.plot(n, [row["seconds"] for row in rows], marker="o", label="here")
    _label(reading, "Reading a text, in all", "tokens", "seconds")
    for kind in ("linear", "attention"):
        if kind in rows[0]:
            step.plot(n, [1e3 * row[kind] for row in rows], marker="o", label=f"{kind} layer")
    _label(step, "One layer's part of a decoded token", "tokens before it", "ms")
    memory.plot(n, [row["cache"] / 1e6 for row in rows], marker="o", label="in use")
    memory.plot(n, [row["formula"] / 1e6 for row in rows], "k--", label="formula")
    _label(memory, "The cache's memory", "tokens", "MB")


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _write(file: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Writes a picture of that size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with replacing(file) as beside:
        FigureCanvasAgg(figure).print_png(str(beside))
