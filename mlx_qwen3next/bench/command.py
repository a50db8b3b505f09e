"""The command: ``python -m mlx_qwen3next.bench``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import LineParser, add_group_options, count, counts, guarded, positive_seconds
from . import shapes
from .agreement import Disagreement
from .run import run

EXAMPLES = """examples:
  python -m mlx_qwen3next.bench                             the demo model, a few minutes
  python -m mlx_qwen3next.bench --model DIR_OR_REPO         a model of yours
  python -m mlx_qwen3next.bench --shape 80b                 the 80B model's shapes, no download
  python -m mlx_qwen3next.bench --shape small --growth 32768 --plots figures

Each side has a process of its own, and they take turns; figures are medians. Nothing else should
run meanwhile. That logits and greedy tokens agree is checked first: if not, no figure is given,
and the exit status is 1. "The limit" of decoding is the bandwidth at which MLX copies or reads a
large array, over the bytes that a token has to move.
"""


def parser() -> LineParser:
    """The command's options."""
    result = LineParser(
        prog="python -m mlx_qwen3next.bench",
        description="Measures this machine: how fast each path is beside stock mlx-lm in the same "
        "run, how far from the machine's limit, and which kernels and depths were chosen and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("what is measured")
    model = what.add_mutually_exclusive_group()
    model.add_argument(
        "--model", metavar="DIR_OR_REPO", help="a model; default: the bundled demo model"
    )
    model.add_argument(
        "--shape",
        choices=list(shapes.SHAPES),
        help="random 4-bit weights instead: in the shapes of the 80B model, or of one with 64 "
        "experts and a hidden size of 512; written to a temporary directory",
    )
    what.add_argument(
        "--layers",
        type=count,
        metavar="N",
        help="of --shape (default: for 80b as many as fit this machine, up to 48; for small 8)",
    )
    what.add_argument(
        "--contexts",
        type=counts,
        default=(128, 512, 2048, 8192),
        metavar="N,N,…",
        help="prompt tokens (default: 128,512,2048,8192); what is measured at one length alone is "
        "measured at the second",
    )
    what.add_argument(
        "--tokens",
        type=count,
        default=32,
        metavar="N",
        help="decoded after a prompt, 2 or more (default: %(default)s)",
    )
    what.add_argument(
        "--dtype",
        choices=["default", "float32", "both"],
        help="'default': each side's own, which is the files' for mlx-lm; 'float32': forced on "
        "both (default: both on a CPU, default on a GPU)",
    )
    what.add_argument("--without-mlx-lm", action="store_true", help="this package alone")
    what.add_argument(
        "--growth",
        type=count,
        metavar="N",
        help="also how cost and memory grow while N tokens are read, 32768 say",
    )
    how = result.add_argument_group("how")
    how.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="turns (default: %(default)s)"
    )
    how.add_argument(
        "--limit",
        type=positive_seconds,
        default=120.0,
        metavar="SECONDS",
        help="what one side may take at one length: fewer turns are made of what takes long, and "
        "what one turn exceeds it with is left out (default: %(default)g)",
    )
    add_group_options(result)
    output = result.add_argument_group("output, beside the tables")
    output.add_argument("--json", type=Path, metavar="FILE", help="all samples and medians")
    output.add_argument("--plots", type=Path, metavar="DIR", help="PNG files (needs matplotlib)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parser().parse_args(argv)

    def terminated(*_: object) -> None:
        raise KeyboardInterrupt("terminated")  # large temporary files must not stay

    def command() -> int:
        try:
            run(args)
            return 0
        except Disagreement as error:
            print(f"error: {error}; no figures are given", file=sys.stderr)
            return 1

    previous = signal.signal(signal.SIGTERM, terminated)
    try:
        return guarded(command)
    finally:
        signal.signal(signal.SIGTERM, previous)
