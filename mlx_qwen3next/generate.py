"""The command ``python -m mlx_qwen3next.generate``: mlx_lm.generate, for Qwen3-Next."""

from __future__ import annotations

import argparse
import sys

from .command import Parser, add_group_options, add_speed_options, guarded, refuse
from .flags import UNSUPPORTED, add_essential_flags, other_flags

EPILOG = """examples:
  %(prog)s
      the bundled demo model answers
  %(prog)s --model Qwen/Qwen3-Next-80B-A3B-Instruct-MLX-4bit -p "Why is the sky blue?" -m 500
      a published model, downloaded at first use
  git diff | %(prog)s --model DIR --system-prompt "Review this change." -p -
      the message comes from another command
  %(prog)s --ignore-chat-template -p "def fibonacci(n):" -m 60
      the text is continued, not answered
  mlx.launch -n 2 -- python -m mlx_qwen3next.generate --model DIR -p "Hello"
      two processes share the model, with --hostfile on as many machines
"""


def parser() -> argparse.ArgumentParser:
    """mlx_lm.generate's flags and ours; every stock flag keeps its default."""
    result = Parser(
        other_flags(),
        prog="python -m mlx_qwen3next.generate",
        usage="%(prog)s [--model DIR_OR_REPO] [--prompt TEXT] [--max-tokens N] [--mtp DEPTH] "
        "[other options]",
        description="Generate text with Qwen3-Next (Instruct, Thinking, Coder-Next).",
        epilog=EPILOG,
    )
    essential = result.add_argument_group("essential options")
    add_essential_flags(essential)
    add_speed_options(essential)
    add_group_options(result)
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 for bad input, 130 for Ctrl-C)."""
    # Whatever the terminal's encoding, text must not end in a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")
    args = parser().parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    refuse(args, parser(), UNSUPPORTED)
    # Only here: MLX and transformers take a second to import, which --help and typos need not.
    from .answer import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
