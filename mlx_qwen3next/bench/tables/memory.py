"""The speed of decoding by the memory for experts, where the others are on disk."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...checkpoint.loading import load_model
from ...checkpoint.streaming import Plan
from ...decoding.generation import generate_step
from ...decoding.preparation import prepare
from ...decoding.queueing import limit_cache
from ...model.capacity import GB
from ...model.config import Config
from .. import machine, plots, prompts
from ..models import check, model_directory, rank
from . import table

Row = Mapping[str, float]


def memory_lines(args: argparse.Namespace) -> list[str]:
    """Measures plain decoding with each of the amounts of memory that the options give.

    Returns:
        The lines of the report: machine, model, and a row for each amount.

    Raises:
        ValueError: an option or the model is not usable, or all experts fit an amount.
    """
    if rank() is not None:
        raise ValueError("--experts-in-memory is for one process, without mlx.launch")
    check(args)
    with model_directory(args, "default") as (directory, about):
        context = args.contexts[min(1, len(args.contexts) - 1)]
        vocabulary = Config.from_file(directory / "config.json").vocab_size
        prompt, of = prompts.tokens(directory, context, vocabulary)
        rows = [
            _measured(directory, gb, args, prompt) for gb in sorted(set(args.experts_in_memory))
        ]
    if args.plots is not None:
        plots.draw_memory(args.plots, rows)
    return [
        *machine.heading(machine.describe()),
        f"{about['name']}; {context} tokens before ({of}), {args.tokens} decoded without drafts",
        *table(_table(rows)),
        "expected: 1 / (seconds apart from reading, as measured + GB by the formula / disk)",
    ]


def _measured(
    directory: Path, gb: float, args: argparse.Namespace, prompt: Sequence[int]
) -> dict[str, float]:
    dtype = mx.float32 if args.dtype == "float32" else None
    model = load_model(directory, dtype=dtype, experts_in_memory=gb)
    limit_cache()
    if model.streamed is None:
        raise ValueError(f"--experts-in-memory {gb:g}: all experts fit, nothing is read from disk")
    prepare(model, mtp="off", lookup="off")
    steps = generate_step(prompt, model, max_tokens=args.tokens, mtp="off", lookup="off")
    next(steps)
    model.streamed.news()
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    seconds, news = time.perf_counter() - start, model.streamed.news()
    plan: Plan = model.streamed.plan
    computing = (seconds - news.waited) / count
    return {
        "memory": plan.memory / GB,
        "held": plan.size,
        "of": plan.experts,
        "hits": news.hit_rate,
        "expected_hits": plan.hit_rate,
        "foreseen": news.foreseen_rate,
        "read": news.bytes / count / GB,
        "disk": plan.rate / GB,
        "speed": count / seconds,
        "expected": 1 / (computing + plan.bytes_a_token / plan.rate),
    }


def _table(rows: Sequence[Row]) -> list[list[Any]]:
    head = ["GB", "held a layer", "found there", "expected"]
    return [
        [*head, "on their way", "GB a token", "disk GB/s", "tokens a second", "expected"],
        *(
            [
                *(f"{row['memory']:.3g}", f"{row['held']:.0f} of {row['of']:.0f}"),
                *(f"{row['hits']:.0%}", f"{row['expected_hits']:.0%}"),
                *(f"{row['foreseen']:.0%}", f"{row['read']:.3g}"),
                *(f"{row['disk']:.2f}", f"{row['speed']:.2f}", f"{row['expected']:.2f}"),
            ]
            for row in rows
        ),
    ]
