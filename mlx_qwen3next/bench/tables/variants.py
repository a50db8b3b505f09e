"""The time of a step with other settings of queueing, which an Apple GPU alone can tell apart.

The model has 48 layers in the shapes of the 80B model, as far as time goes: one period of four
layers, in random weights, is run twelve times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx_lm.generate import wired_limit

from ...checkpoint.loading import load_model
from ...decoding import queueing
from ...decoding.generation import generate_step
from ...decoding.queueing import COMMAND_BUFFERS
from ...errors import first_line
from ...model.capacity import GB
from .. import shapes
from . import NONE, table

LAYERS = (4, 8, 16, shapes.FULL)  # handed over at a time
# MLX's limits of a command buffer; without an entry MLX's own hold.
UNLIMITED = str(2**20)
BUFFERS: tuple[dict[str, str], ...] = (
    COMMAND_BUFFERS,
    {},
    {"MLX_MAX_MB_PER_BUFFER": UNLIMITED, "MLX_MAX_OPS_PER_BUFFER": "200"},
    {"MLX_MAX_MB_PER_BUFFER": UNLIMITED, "MLX_MAX_OPS_PER_BUFFER": "400"},
)
PROMPT, STEPS, REPEATS = 2048, 32, 3

# Layers at a time -> "step" and "prompt" in seconds, "peak" in bytes.
Times = Mapping[str, Mapping[str, float]]
# Measures one model with MLX's limits of a command buffer; a ValueError tells why it cannot.
Runner = Callable[[Path, Mapping[str, str]], Times]


def in_another_process(directory: Path, buffers: Mapping[str, str]) -> Times:
    """Runs :func:`times` in a process of its own, since MLX reads its limits once.

    Raises:
        ValueError: the process failed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in COMMAND_BUFFERS} | {**buffers}
    code = "from mlx_qwen3next.bench.tables.variants import main; main()"
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(said[-1] if said else f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def variants_table(run: Runner = in_another_process) -> str:
    """Measures all variants and returns the table.

    Args:
        run: measures those of one pair of limits.

    Raises:
        ValueError: the memory or the disk has no room for four layers.
    """
    shapes.layers_that_fit("80b", 1)
    rows = [["MB, operations a buffer; layers at a time", "step ms", "prompt s", "peak GB"]]
    failed = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shapes.write(Path(folder), "80b", shapes.PERIOD)
        for buffers in BUFFERS:
            name = _named(buffers)
            try:
                measured = run(Path(folder), buffers)
            except ValueError as error:
                failed.append(f"  {name}: {first_line(error)}")
                measured = {}
            rows += [[f"  {name}; {n}", *_cells(measured.get(str(n)))] for n in LAYERS]
    about = f"steps of {shapes.FULL} layers in the shapes of the 80B model, and {PROMPT:,} tokens"
    return "\n".join([f"{about} of a prompt", *table(rows), *failed])


def _named(buffers: Mapping[str, str]) -> str:
    """The two limits, with a mark at those that the commands set."""
    if not buffers:
        return "MLX's own"
    size, operations = (buffers[name] for name in COMMAND_BUFFERS)
    set_here = " (set here)" if buffers == COMMAND_BUFFERS else ""
    return f"{'no limit' if size == UNLIMITED else size}, {operations}{set_here}"


def _cells(of: Mapping[str, float] | None) -> list[str]:
    if of is None:
        return [NONE] * 3
    return [f"{1e3 * of['step']:.2f}", f"{of['prompt']:.2f}", f"{of['peak'] / GB:.2f}"]


def times(
    directory: Path,
    layers: Sequence[int] = LAYERS,
    *,
    prompt: int = PROMPT,
    steps: int = STEPS,
    repeats: int = REPEATS,
) -> dict[str, dict[str, float]]:
    """Measures a model, whose layers are repeated until there are 48, in this process.

    Args:
        directory: a model of one period of layers.
        layers: the numbers of layers at a time, which take turns.
        prompt, steps: tokens to read and to generate.
        repeats: of each number, after one that does not count; the results are medians.
    """
    model = load_model(directory, context=prompt + steps)
    queueing.limit_cache()
    samples: dict[int, list[dict[str, float]]] = {n: [] for n in layers}
    with wired_limit(model):
        model.model.layers = model.layers * (shapes.FULL // len(model.layers))
        for _ in range(repeats + 1):
            for n in layers:
                with patch.object(queueing, "LAYERS_ON_GPU", n):
                    samples[n].append(_sample(model, prompt, steps))
    return {
        str(n): {what: statistics.median([s[what] for s in some[1:]]) for what in some[0]}
        for n, some in samples.items()
    }


def _sample(model: Any, prompt: int, steps: int) -> dict[str, float]:
    mx.clear_cache()
    mx.reset_peak_memory()
    tokens = [i % model.args.vocab_size for i in range(prompt)]
    at = [time.perf_counter()]
    for _ in generate_step(tokens, model, max_tokens=steps, mtp="off"):
        at.append(time.perf_counter())
    between = [b - a for a, b in pairwise(at[1:])]
    peak = mx.get_peak_memory()
    return {"step": statistics.median(between), "prompt": at[1] - at[0], "peak": peak}


def main() -> None:
    """Measures the model in the directory that is the process's argument, and prints JSON."""
    print(json.dumps(times(Path(sys.argv[1]))))
