"""The proofs of a model's kernels on this machine, made anew, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import mlx.core as mx

from ... import metal_kernels
from ...checkpoint.loading import load_model
from ...compute import proof
from ...compute.proof import Finding
from ...decoding.draft_depth import MAX_DEPTH
from ...decoding.preparation import prove
from .. import machine
from ..models import check, model_directory, rank
from . import NONE, table


def kernel_lines(args: argparse.Namespace) -> list[str]:
    """Proves all kernels of the model that the options name, and keeps the findings for later.

    Returns:
        The lines of the report: machine, model, a table of the kinds of call, and what was wrong.

    Raises:
        ValueError: no kernel can run here, or an option or the model is not usable.
    """
    if rank() is not None:
        raise ValueError("--kernels is for one process, without mlx.launch")
    if not metal_kernels.available():
        device = "has no Metal GPU here" if not mx.metal.is_available() else "is told to use no GPU"
        raise ValueError(f"--kernels: no kernel can run, because MLX {device}")
    check(args)
    proof.set_kernels("auto")
    proof.forget()
    with model_directory(args, "default") as (directory, about):
        model = load_model(directory, dtype=mx.float32 if args.dtype == "float32" else None)
        found, seconds = prove(model, depth=0 if model.mtp is None else MAX_DEPTH)
        digest = machine.digest(directory)
    return [
        *machine.heading(machine.describe()),
        f"{about['name']}; config.json {digest}; kernels {metal_kernels.source_hash()}",
        *table(_rows(found)),
        *(f"{key}: {of.reason}" for key, of in found.items() if of.seconds is None),
        f"{sum(of.used for of in found.values())} of {len(found)} kinds of call use a kernel; "
        f"proved in {seconds:.1f} s and kept for later starts",
    ]


def _rows(found: Mapping[str, Finding]) -> list[list[str]]:
    """The rows of the table: what belongs to one kernel stands together."""
    rows = [["kernel and kind of call", "here µs", "MLX's own µs", "used"]]
    for key, of in sorted(found.items(), key=lambda item: item[0].split()[0]):
        times = [NONE if s is None else f"{1e6 * s:.1f}" for s in (of.seconds, of.plain_seconds)]
        used = "yes" if of.used else "no, wrong" if of.seconds is None else "no, slower"
        rows.append([key, *times, used])
    return rows
