"""The command ``python -m mlx_qwen3next.bench``: its options and its exit status."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import metal_kernels
from ..cli import LineParser, add_group_options, amounts, count, counts, guarded, positive_seconds
from ..metal_kernels.experts import BITS
from . import shapes
from .comparison.agreement import Disagreement
from .comparison.run import run_bench
from .tables.host import host_table
from .tables.kernels import kernel_lines
from .tables.memory import memory_lines
from .tables.variants import variants_table

EPILOG = """examples:
  python -m mlx_qwen3next.bench
      measure the bundled demo model, in a few minutes
  python -m mlx_qwen3next.bench --model DIR_OR_REPO
      measure a model
  python -m mlx_qwen3next.bench --shape 80b
      measure random weights in the shapes of the 80B model, without a download
  python -m mlx_qwen3next.bench --kernels --shape 80b
      prove the Metal kernels in the shapes of the 80B model
  python -m mlx_qwen3next.bench --shape small --growth 32768 --plots figures
      also measure how the cost grows with the text, and draw the figures

This package and mlx-lm each run in a process of their own and take turns; the figures are medians.
Nothing else should run on the machine meanwhile. The bench first checks that logits and greedy
tokens agree; if they do not, it gives no figures, and its exit status is 1. The limit of decoding
is the bandwidth at which MLX copies or reads a large array, divided by the bytes that a token has
to move.
"""


def parser() -> LineParser:
    """Makes the command's parser."""
    result = LineParser(
        prog="python -m mlx_qwen3next.bench",
        description="Measure the speed of this package on this machine: beside stock mlx-lm in the "
        "same run,\nas a share of the machine's limit, and by kernel and draft depth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject = result.add_argument_group("the model and the measurements")
    model = subject.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="Local directory or Hugging Face repository of the model (default: the bundled demo "
        "model).",
    )
    model.add_argument(
        "--shape",
        choices=list(shapes.SHAPES),
        help="Measure random 4-bit weights instead, which are written to a temporary directory: "
        "in the shapes of the 80B model, or in those of a small one with 64 experts and a hidden "
        "size of 512.",
    )
    subject.add_argument(
        "--layers",
        type=count,
        metavar="N",
        help="With --shape: number of layers (default: for 80b as many as fit this machine, up to "
        "48; for small 8).",
    )
    subject.add_argument(
        "--expert-bits",
        type=int,
        choices=BITS,
        help="With --shape: bits of the experts (default: 4, as all else but the routers).",
    )
    subject.add_argument(
        "--contexts",
        type=counts,
        default=(128, 512, 2048, 8192),
        metavar="N,N,…",
        help="Lengths of the prompt in tokens. Measurements at a single length use the second one "
        "(default: 128,512,2048,8192).",
    )
    subject.add_argument(
        "--tokens",
        type=count,
        default=32,
        metavar="N",
        help="Number of tokens to decode after a prompt, at least 2 (default: %(default)s).",
    )
    subject.add_argument(
        "--dtype",
        choices=["default", "float32", "both"],
        help="Data type of the model. 'default' leaves each package its own, which for mlx-lm is "
        "that of the files; 'float32' forces float32 on both packages; 'both' measures both "
        "choices (default: 'both' on a CPU, 'default' on a GPU).",
    )
    subject.add_argument(
        "--without-mlx-lm", action="store_true", help="Measure this package alone."
    )
    subject.add_argument(
        "--growth",
        type=count,
        metavar="N",
        help="Also measure how time and memory grow while N tokens are read, such as 32768.",
    )
    alone = subject.add_mutually_exclusive_group()
    alone.add_argument(
        "--kernels",
        action="store_true",
        help="Measure nothing else than the model's Metal kernels: prove each of them anew for all "
        "kinds of call, and list its time, that of MLX's own operations, and whether it is used. "
        "This is the table for a bug report. With --shape, 4 layers are enough.",
    )
    alone.add_argument(
        "--host",
        action="store_true",
        help="Measure nothing else than the host's time for a step of 48 layers: how long Python "
        "takes to queue it, by part, as on an Apple GPU. Needs no GPU. On an Apple GPU also the "
        "time of a step with other settings of command buffers, in some minutes.",
    )
    alone.add_argument(
        "--experts-in-memory",
        type=amounts,
        metavar="GB,GB,…",
        help="Measure nothing else than plain decoding with these GB of experts in memory, the "
        "others on disk, beside what is expected; --plots draws it.",
    )
    effort = result.add_argument_group("effort")
    effort.add_argument(
        "--repeats",
        type=count,
        default=3,
        metavar="N",
        help="Number of repeats of each measurement (default: %(default)s).",
    )
    effort.add_argument(
        "--limit",
        type=positive_seconds,
        default=120.0,
        metavar="SECONDS",
        help="Time for one package at one length. A slow measurement is repeated less often, and "
        "one that would exceed the limit at once is left out (default: %(default)g).",
    )
    add_group_options(result)
    output = result.add_argument_group("output, besides the tables")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="Write all samples and medians to a JSON file."
    )
    output.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="Draw the figures as PNG files in a directory (needs matplotlib).",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 if the results disagree, 2 for bad input."""
    args = parser().parse_args(argv)

    def terminated(*_: object) -> None:
        raise KeyboardInterrupt("terminated")  # which removes the large temporary files

    def command() -> int:
        try:
            if args.host:
                print(host_table())
                if metal_kernels.available():
                    print(variants_table())
            elif args.experts_in_memory is not None:
                print("\n".join(memory_lines(args)))
            elif args.kernels:
                print("\n".join(kernel_lines(args)))
            else:
                run_bench(args)
            return 0
        except Disagreement as error:
            print(f"error: {error}; no figures are given", file=sys.stderr)
            return 1

    previous = signal.signal(signal.SIGTERM, terminated)
    try:
        return guarded(command)
    finally:
        signal.signal(signal.SIGTERM, previous)
