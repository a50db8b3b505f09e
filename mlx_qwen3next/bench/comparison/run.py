"""A run of the bench: its settings from the options, the measurements, and the output."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...checkpoint import files
from ...cli import division
from ...model import capacity, layouts
from ...model.config import Config
from ...storage.replacing import write_text
from ...storage.safetensors import Tensor
from .. import machine, plots, prompts
from ..models import DtypeChoice, check, model_directory, rank
from ..traffic import Traffic, traffic
from . import report
from .measure import Run, measure
from .sides import Side, sides_of
from .summary import medians
from .worker import follow

HELD = 1.5  # memory that a model and its caches may take, in sizes of its files


def run_bench(args: argparse.Namespace) -> None:
    """Measures and reports for the options of the command.

    Raises:
        ValueError: an option or the model is not usable, or a worker has failed.
        Disagreement: the sides do not compute the same.
    """
    check(args)
    divided = division(args, 1 if rank() is None else 2)
    choice: DtypeChoice = args.dtype or ("both" if mx.default_device() == mx.cpu else "default")
    with ExitStack() as stack:
        directory, model = stack.enter_context(model_directory(args, choice))
        config = Config.from_file(directory / "config.json")
        tensors = files.read_headers(files.find_files(directory))
        sides = sides_of(choice, tensors, stock=not args.without_mlx_lm and rank() is None)
        sides = sides if rank() is None else sides[:1]
        view = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        view = link_common_files(directory, view)
        if rank():
            follow(view, sides[0].dtype, divided)
            return
        run = _new_run(args, config, tensors, view, sides)
        run.divided = divided
        longest = max(*run.contexts, run.growth)
        run.prompt, description = prompts.tokens(directory, longest, config.vocab_size)
        moved = {side.label: traffic(tensors, config, side.itemsize) for side in sides}
        raw = measure(run)
        ranks = raw["loads"][sides[0].label][0]["ranks"]
        if ranks > 1:
            run.notes.append(
                f"{ranks} processes ran one model; the limit is that of one reading it all"
            )
        model |= {"config": machine.digest(directory), "prompts": description}
    figures = medians(raw, run.sides, moved)
    where = machine.describe()
    print("\n".join(_lines(run, figures, moved, model, where)))
    if args.json is not None:
        content = {
            "machine": where,
            "model": model,
            "options": {key: value for key, value in vars(args).items() if value is not None},
            "contexts": run.contexts,
            "notes": run.notes,
            "bytes_a_token": {
                label: {n: t.plain(n) for n in run.contexts} for label, t in moved.items()
            },
            "prompt": {
                label: {
                    n: {"bytes": t.prompt(n), "multiply_adds": t.multiply_adds(n)}
                    for n in run.contexts
                }
                for label, t in moved.items()
            },
            "medians": figures,
            "samples": raw,
        }
        write_text(args.json, json.dumps(content, indent=1, default=str))
    if args.plots is not None:
        plots.draw(args.plots, figures, raw.get("growth", []))


def link_common_files(directory: Path, view: Path) -> Path:
    """Fills ``view`` with links to the files of a model that both packages read.

    Both then have the same weights: norms.safetensors, which only this package reads, holds more
    exact ones.
    """
    for file in directory.iterdir():
        if file.name != files.NORMS_FILE:
            os.symlink(file.absolute(), view / file.name)
    return view


def _new_run(
    args: argparse.Namespace,
    config: Config,
    tensors: Mapping[str, Tensor],
    directory: Path,
    sides: list[Side],
) -> Run:
    size = sum(tensor.nbytes for tensor in tensors.values())
    room = config.max_position_embeddings
    contexts, notes = clipped(args.contexts, room - args.tokens, "--contexts")
    growth = args.growth or 0
    if growth:
        (growth,), more = clipped([growth], room - 1, "--growth")
        notes += more
    together = len(sides) == 1 or len(sides) * size * HELD < capacity.spare()
    if not together:
        notes.append(
            "the models do not fit the memory together, so one was measured after the other "
            "instead of in turns"
        )
    return Run(
        directory=directory,
        sides=sides,
        prompt=[],
        contexts=contexts,
        tokens=args.tokens,
        repeats=args.repeats,
        limit=args.limit,
        together=together,
        exact=layouts.detect_layout(tensors) == "converted",
        speculates=any(layouts.is_mtp(name) for name in tensors),
        random=args.shape is not None,
        model_bytes=size,
        growth=growth,
        room=room,
        notes=notes,
    )


def clipped(lengths: Sequence[int], most: int, flag: str) -> tuple[list[int], list[str]]:
    """Clips lengths to ``most``.

    Args:
        lengths: lengths in tokens.
        most: the largest length that the model's context takes.
        flag: the option, for messages.

    Returns:
        The lengths in ascending order without duplicates, and notes on those that were clipped.

    Raises:
        ValueError: the model's context takes no length at all.
    """
    if most < 1:
        raise ValueError(f"{flag}: the model's context takes no prompt besides the decoded tokens")
    fitting = sorted({min(n, most) for n in lengths})
    longer = sorted({n for n in lengths if n > most})
    if not longer:
        return fitting, []
    names = ", ".join(map(str, longer))
    return fitting, [f"{flag} {names} became {most}: the model's context takes no more"]


def _lines(
    run: Run,
    figures: Mapping[str, Any],
    moved: Mapping[str, Traffic],
    model: Mapping[str, Any],
    where: Mapping[str, Any],
) -> list[str]:
    repeats = "1 repeat" if run.repeats == 1 else f"{run.repeats} repeats, fewer of slow ones"
    revision = f", revision {model['revision']}" if model["revision"] else ""
    about = [
        f"{model['name']}{revision}; config.json {model['config']}",
        f"prompts: {model['prompts']}; greedy, {run.tokens} tokens; medians of {repeats}",
    ]
    return [*machine.heading(where), *about, *report.lines(run, figures, moved, model)]
