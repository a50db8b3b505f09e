"""What the commands have in common. Imports no MLX, so that --help is there at once."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .decoding.draft_depth import MAX_DEPTH

# MLX counts a whole expert tensor against its command buffer's size, so its defaults cut a decoding
# step into many buffers.
COMMAND_BUFFERS = {"MLX_MAX_MB_PER_BUFFER": "1024", "MLX_MAX_OPS_PER_BUFFER": "1000"}


def set_command_buffers() -> None:
    """Sets MLX's limits of a command buffer on a Mac, unless the user has set them.

    MLX reads these environment variables once, so a command calls this before it imports MLX.
    """
    if platform.system() == "Darwin":
        for name, value in COMMAND_BUFFERS.items():
            os.environ.setdefault(name, value)


class LineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")


class Parser(LineParser):
    """The parser of an mlx-lm command with flags of ours.

    Flags added to it replace stock ones of the same name.
    """

    def __init__(self, stock: argparse.ArgumentParser, **options: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[stock],
            conflict_handler="resolve",
            **options,
        )
        self._ours = 0

    def add_argument_group(self, *args: Any, **options: Any) -> Any:
        """A group of flags, which ``--help`` shows before the stock ones."""
        group = super().add_argument_group(*args, **options)
        if hasattr(self, "_ours"):  # not argparse's own groups, or those of the stock parser
            self._action_groups.insert(self._ours, self._action_groups.pop())
            self._ours += 1
        return group


def guarded(command: Callable[[], int | None]) -> int:
    """Runs a command; returns its exit status: 2, after one line, for bad input, 130 for Ctrl-C."""
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 130


def refuse(
    args: argparse.Namespace, parser: argparse.ArgumentParser, flags: Mapping[str, str]
) -> None:
    """Refuses flags that would have no effect.

    Args:
        parser: knows their defaults.
        flags: name to reason.

    Raises:
        ValueError: one is not at its default.
    """
    for flag, reason in flags.items():
        if getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"--{flag.replace('_', '-')} is not supported: {reason}")


def add_speed_options(group: Any) -> None:
    """Adds ``--mtp`` and ``--kernels``."""
    group.add_argument(
        "--mtp",
        type=_depth,
        default="auto",
        metavar=f"{{auto,off,1..{MAX_DEPTH}}}",
        help="Tokens the model's own MTP head drafts ahead: a depth, 'off', or 'auto', which "
        "measures what pays on this machine, drafting nothing included (default: %(default)s). "
        "Changes the speed, not the answer.",
    )
    group.add_argument(
        "--kernels",
        choices=("auto", "on", "off"),
        default="auto",
        help="Metal kernels of this package: 'auto' uses each where it proved right and fast on "
        "this machine, 'on' wherever there is one, 'off' nowhere (default: %(default)s).",
    )


def add_group_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--pipeline`` and ``--expert-parallel``."""
    group = parser.add_argument_group("several machines (with mlx.launch)")
    group.add_argument(
        "--pipeline",
        type=_counts,
        nargs="?",
        const=(),
        default=False,  # as in mlx_lm.server
        metavar="N,N,…",
        help="Give each machine whole layers: as many as fit its memory, or so many in order of "
        "rank. Takes the least traffic, but the machines work one after the other (default: "
        "divide every layer).",
    )
    group.add_argument(
        "--expert-parallel",
        action="store_true",
        help="Divide the experts by number, not each of them (default: where their width does not "
        "divide).",
    )


def division(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """What :func:`mlx_qwen3next.load` takes of these options, for a group of that size.

    Raises:
        ValueError: they contradict each other, or this process is alone.
    """
    given = {"--pipeline": args.pipeline is not False, "--expert-parallel": args.expert_parallel}
    asked = [flag for flag, is_given in given.items() if is_given]
    if len(asked) > 1:
        raise ValueError("--pipeline and --expert-parallel exclude each other")
    if asked and size == 1:
        raise ValueError(f"{asked[0]} is for several processes: start them with mlx.launch")
    if args.pipeline is not False:
        return {"mode": "pipeline", "layers": args.pipeline or None}
    return {"mode": "expert"} if args.expert_parallel else {}


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of layers, such as 30,18, got {text!r}")
    return counts


def _depth(text: str) -> str | int:
    if text in ("auto", "off"):
        return text
    if text.isdecimal() and 1 <= int(text) <= MAX_DEPTH:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be 'auto', 'off' or 1 to {MAX_DEPTH}, got {text!r}")


def fingerprint_of(args: argparse.Namespace) -> str:
    """Identifies what a prompt cache is good for: the model of these arguments, as they use it.

    Raises:
        ValueError: the model or its adapter cannot be read.
    """
    from .checkpoint.fingerprint import adapter_digest, fingerprint
    from .checkpoint.hub import resolve
    from .checkpoint.loading import default_dtype

    options = [adapter_digest(args.adapter_path), str(default_dtype())]
    if args.kv_bits is not None:
        options.append(f"{args.kv_bits} {args.kv_group_size} {args.quantized_kv_start}")
    return fingerprint(resolve(args.model), *options)
