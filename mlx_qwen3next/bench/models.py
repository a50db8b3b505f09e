"""The model that the options name: from disk or the hub, or made of random weights."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.hub import resolve
from . import plots, shapes

DtypeChoice = Literal["default", "float32", "both"]


def rank() -> int | None:
    """The rank that ``mlx.launch`` gave this process, or None.

    Only the worker of this process joins the group of ranks.
    """
    given = os.environ.get("MLX_RANK")
    return None if given is None else int(given)


def check(args: argparse.Namespace) -> None:
    """Checks the options.

    Raises:
        ValueError: an option is not usable, or not with the others.
    """
    if args.tokens < 2:
        raise ValueError(
            "--tokens must be at least 2: the time of the first token is that of the prompt"
        )
    for name in ("layers", "expert_bits"):
        if getattr(args, name) is not None and args.shape is None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for --shape alone: other models have theirs")
    if args.layers is not None and (args.layers % shapes.PERIOD or args.layers > shapes.FULL):
        raise ValueError(
            f"--layers must be a multiple of {shapes.PERIOD} (three linear layers, one of "
            f"attention), at most {shapes.FULL}, got {args.layers}"
        )
    if rank() is not None and args.shape == "80b" and args.layers is None:
        raise ValueError(
            "--layers is needed with mlx.launch, because the machines' memories may differ"
        )
    if args.plots is not None:
        plots.check_available()
    for file in (args.json, args.plots):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no directory {file.parent}")


@contextmanager
def model_directory(
    args: argparse.Namespace, choice: DtypeChoice
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the directory of the model, and its description for the JSON file."""
    if args.shape is None:
        directory = resolve(args.model)
        name = args.model or "the bundled demo model"
        yield directory, {"name": name, "revision": _revision(directory), "shape": None}
        return
    models = 1 if args.without_mlx_lm else 2 + (choice == "both")
    layers, experts = args.layers, args.expert_bits or shapes.BITS
    bits = partial(shapes.bits_of, experts=experts)
    if layers is None:  # a period has all kinds of layer that there are kernels for
        layers = shapes.PERIOD if args.kernels else shapes.layers_that_fit(args.shape, models, bits)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shapes.write(Path(folder), args.shape, layers, bits)
        name = f"random weights in the shapes of --shape {args.shape}, {layers} layers"
        name += f", experts of {experts} bits" * (experts != shapes.BITS)
        yield (
            Path(folder),
            {"name": name, "revision": None, "shape": args.shape, "layers": layers},
        )


def _revision(directory: Path) -> str | None:
    """The commit of a model in the hub's cache, or None."""
    return directory.name if directory.parent.name == "snapshots" else None
