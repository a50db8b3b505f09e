"""A run of the command: what is to be measured, the measurement, and what is written of it."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint import files
from ..checkpoint.hub import resolve
from ..cli import division
from ..model import capacity, layouts
from ..model.config import Config
from ..storage.replacing import write_text
from ..storage.safetensors import Tensor
from . import machine, plots, prompts, report, shapes
from .measure import Plan, measure
from .sides import Kinds, Side, rank, sides_of
from .summary import medians
from .traffic import Traffic, traffic
from .worker import follow

HELD = 1.5  # times its files' size that a model may take in memory, caches included


def run(args: argparse.Namespace) -> None:
    """Measures and reports, as the command's options say.

    Raises:
        ValueError: an option or the model is no good, or a worker failed.
        Disagreement: the sides do not compute the same.
    """
    _check(args)
    divided = division(args, 1 if rank() is None else 2)
    kinds: Kinds = args.dtype or ("both" if mx.default_device() == mx.cpu else "default")
    with ExitStack() as stack:
        directory, model = stack.enter_context(_model(args, kinds))
        config = Config.from_file(directory / "config.json")
        tensors = files.read_headers(files.find_files(directory))
        sides = sides_of(kinds, tensors, stock=not args.without_mlx_lm and rank() is None)
        sides = sides if rank() is None else sides[:1]
        view = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        view = as_mlx_lm_would(directory, view)
        if rank():
            follow(view, sides[0].dtype, divided)
            return
        plan = _plan(args, config, tensors, view, sides)
        plan.divided = divided
        longest = max(*plan.contexts, plan.growth)
        plan.prompt, kind = prompts.tokens(directory, longest, config.vocab_size)
        moved = {side.label: traffic(tensors, config, side.itemsize) for side in sides}
        raw = measure(plan)
        ranks = raw["loads"][sides[0].label][0]["ranks"]
        if ranks > 1:
            plan.notes.append(
                f"{ranks} processes ran one model; the limit is that of one which reads all of it"
            )
        model |= {"config": machine.digest(directory), "prompts": kind}
    figures = medians(raw, plan.sides, moved)
    where = machine.describe()
    print("\n".join(_lines(plan, figures, moved, model, where)))
    if args.json is not None:
        content = {
            "machine": where,
            "model": model,
            "options": {key: value for key, value in vars(args).items() if value is not None},
            "contexts": plan.contexts,
            "notes": plan.notes,
            "bytes_a_token": {
                label: {n: t.plain(n) for n in plan.contexts} for label, t in moved.items()
            },
            "medians": figures,
            "samples": raw,
        }
        write_text(args.json, json.dumps(content, indent=1, default=str))
    if args.plots is not None:
        plots.draw(args.plots, figures, raw.get("growth", []))


def _check(args: argparse.Namespace) -> None:
    if args.tokens < 2:
        raise ValueError("--tokens must be at least 2: the first one belongs to the prompt")
    if args.layers is not None and args.shape is None:
        raise ValueError("--layers is for --shape alone; a model has the layers it has")
    if args.layers is not None and (args.layers % shapes.PERIOD or args.layers > shapes.FULL):
        raise ValueError(
            f"--layers must be a multiple of {shapes.PERIOD} (three linear layers, one of "
            f"attention), at most {shapes.FULL}, got {args.layers}"
        )
    if rank() is not None and args.shape == "80b" and args.layers is None:
        raise ValueError("--layers is needed with mlx.launch: the machines' memories may differ")
    if args.plots is not None:
        plots.check_available()
    for file in (args.json, args.plots):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no directory {file.parent}")


@contextmanager
def _model(args: argparse.Namespace, kinds: Kinds) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The model's directory, and what it is called."""
    if args.shape is None:
        directory = resolve(args.model)
        name = args.model or "the bundled demo model"
        yield directory, {"name": name, "revision": _revision(directory), "shape": None}
        return
    models = 1 if args.without_mlx_lm else 2 + (kinds == "both")
    layers = args.layers or shapes.layers_that_fit(args.shape, models)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shapes.write(Path(folder), args.shape, layers)
        name = f"random weights in the shapes of --shape {args.shape}, {layers} layers"
        yield (
            Path(folder),
            {"name": name, "revision": None, "shape": args.shape, "layers": layers},
        )


def _revision(directory: Path) -> str | None:
    """The commit of a model in the hub's cache."""
    return directory.name if directory.parent.name == "snapshots" else None


def as_mlx_lm_would(directory: Path, view: Path) -> Path:
    """Fills ``view`` with links to a model's files, those apart that mlx-lm does not read.

    Both sides then have the same weights: norms.safetensors holds more exact ones, for us alone.
    """
    for file in directory.iterdir():
        if file.name != files.NORMS_FILE:
            os.symlink(file.absolute(), view / file.name)
    return view


def _plan(
    args: argparse.Namespace,
    config: Config,
    tensors: Mapping[str, Tensor],
    directory: Path,
    sides: list[Side],
) -> Plan:
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
            "the models do not fit the memory together: one was measured after the other, not in "
            "turns"
        )
    return Plan(
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
    """Lengths in ascending order, none twice and none beyond ``most``; and what is to be said.

    Raises:
        ValueError: the model takes no length at all.
    """
    if most < 1:
        raise ValueError(f"{flag}: the model's context takes no prompt beside what is decoded")
    fitting = sorted({min(n, most) for n in lengths})
    longer = sorted({n for n in lengths if n > most})
    if not longer:
        return fitting, []
    names = ", ".join(map(str, longer))
    return fitting, [f"{flag} {names} became {most}: the model's context takes no more"]


def _lines(
    plan: Plan,
    figures: Mapping[str, Any],
    moved: Mapping[str, Traffic],
    model: Mapping[str, Any],
    where: Mapping[str, Any],
) -> list[str]:
    turns = "1 turn" if plan.repeats == 1 else f"{plan.repeats} turns, fewer where they take long"
    revision = f", revision {model['revision']}" if model["revision"] else ""
    about = [
        f"{model['name']}{revision}; config.json {model['config']}",
        f"prompts: {model['prompts']}; greedy, {plan.tokens} tokens; medians of {turns}",
    ]
    return [*machine.heading(where), *about, *report.lines(plan, figures, moved, model)]
