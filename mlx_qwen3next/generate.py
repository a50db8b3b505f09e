"""The command ``python -m mlx_qwen3next.generate``: mlx_lm.generate for Qwen3-Next.

This module holds the command's parser and imports neither MLX nor numpy; generation itself is in
:mod:`mlx_qwen3next.terminal`.
"""

from __future__ import annotations

import argparse
import sys

from .cli import (
    Parser,
    add_experts_in_memory,
    add_group_options,
    add_kv_options,
    add_rope_scaling,
    add_sampling_options,
    add_speed_options,
    guarded,
    refuse,
)
from .decoding.queueing import set_command_buffers

DEFAULT_MAX_TOKENS = 100
DEFAULT_PROMPT = "hello"
DEMO_PROMPT = "How do I use itertools.chain?"  # the default for the bundled demo model

# Flags of mlx_lm.generate that would have no effect here, with the reasons.
UNSUPPORTED = {
    "image": "Qwen3-Next takes no images",
    "num_draft_tokens": "use --mtp",
    "quantize_activations": "activations stay in floating point here",
    "max_kv_size": "keys and values are kept whole, so that long prompts stay exact",
}

EPILOG = """examples:
  %(prog)s
      ask the bundled demo model
  %(prog)s --model Qwen/Qwen3-Next-80B-A3B-Instruct-MLX-4bit -p "Why is the sky blue?" -m 500
      ask a published model, which is downloaded at first use
  git diff | %(prog)s --model DIR --system-prompt "Review this change." -p -
      read the message from another command
  %(prog)s --ignore-chat-template -p "def fibonacci(n):" -m 60
      continue a text instead of answering a message
  mlx.launch -n 2 -- python -m mlx_qwen3next.generate --model DIR -p "Hello"
      share the model between two processes, or with --hostfile between machines
"""


def parser() -> argparse.ArgumentParser:
    """Makes the command's parser: all flags of mlx_lm.generate, with their defaults, and ours.

    The flags of sampling that a checkpoint may recommend are None by default.
    """
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
    add_rope_scaling(essential)
    add_experts_in_memory(essential)
    add_group_options(result)
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 2 for bad input, 130 for Ctrl-C."""
    # Text that the terminal's encoding lacks must not end the command.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")
    args = parser().parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    refuse(args, parser(), UNSUPPORTED)
    set_command_buffers()
    # Not at the top: importing MLX and transformers takes a second, which --help does not need.
    from .terminal import run

    return run(args, demo_prompt=DEMO_PROMPT, default_prompt=DEFAULT_PROMPT)


# --- mlx_lm.generate's flags --------------------------------------------------------------------
# Declared again here, because importing mlx-lm's own parser imports MLX. A test compares the names,
# types and defaults with mlx-lm's; the help texts are ours.
def add_essential_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that most users need to a group."""
    group.add_argument(
        "--model",
        type=str,
        metavar="DIR_OR_REPO",
        help="Local directory or Hugging Face repository of the model, as published or converted "
        "to MLX (default: the small demo model that ships with this package).",
    )
    group.add_argument(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="Message to the model. \\n and \\t stand for a line break and a tab; '-' reads the "
        f"message from stdin (default: {DEFAULT_PROMPT!r}, or {DEMO_PROMPT!r} for the demo model).",
    )
    group.add_argument(
        "--prompt-cache-file",
        type=str,
        metavar="FILE",
        help="File for the cache of the prompt and the answer. The next prompt is processed only "
        "from its first difference on. A file made by mlx_lm.cache_prompt holds the beginning of "
        "the prompt, which is then continued.",
    )
    group.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="Maximum number of tokens to generate; -1 generates until the model's context is "
        "full (default: %(default)s).",
    )


def other_flags() -> argparse.ArgumentParser:
    """Makes a parser of the remaining flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run Python code from the model's files.",
    )
    parser.add_argument(
        "--adapter-path",
        type=str,
        metavar="DIR",
        help="Directory of an adapter made by mlx_lm.lora, which is applied to the model.",
    )
    parser.add_argument(
        "--extra-eos-token",
        type=str,
        default=(),
        nargs="+",
        metavar="TOKEN",
        help="Additional tokens that end the answer, as text or as ids.",
    )
    parser.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="System prompt: instructions to the model that precede the message.",
    )
    parser.add_argument("--image", type=str, default=(), nargs="+", help=_unsupported("image"))
    parser.add_argument(
        "--prefill-response",
        metavar="TEXT",
        help="Beginning of the answer, which the model continues.",
    )
    add_sampling_options(parser)
    parser.add_argument(
        "--xtc-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="Probability of applying XTC to a token, for less expected words. XTC removes all "
        "tokens that reach --xtc-threshold except the least probable one (default: %(default)s, "
        "never).",
    )
    parser.add_argument(
        "--xtc-threshold",
        type=float,
        default=0.1,
        metavar="P",
        help="Probability from which on XTC removes tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--min-tokens-to-keep",
        type=int,
        default=1,
        metavar="N",
        help="Number of most probable tokens that --min-p never removes (default: %(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="Seed of the random numbers: the same seed gives the same answer again.",
    )
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Continue the prompt as plain text instead of answering it as a message.",
    )
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="Accepted for compatibility with mlx_lm.generate; it has no effect, as there.",
    )
    parser.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help="Variables for the chat template, as a JSON object such as '{\"tools\": []}'.",
    )
    parser.add_argument(
        "--verbose",
        type=_true,
        default=True,
        metavar="{T,F}",
        help="F prints only the answer, without separator lines and statistics (default: T).",
    )
    parser.add_argument("--max-kv-size", type=int, help=_unsupported("max_kv_size"))
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="Number of prompt tokens to process at a time (default: as many as take about 2 "
        "seconds and have the memory, at most 8192).",
    )
    parser.add_argument(
        "--quantize-activations",
        "-qa",
        action="store_true",
        help=_unsupported("quantize_activations"),
    )
    add_kv_options(parser)
    parser.add_argument(
        "--num-draft-tokens", type=int, default=3, help=_unsupported("num_draft_tokens")
    )
    return parser


def _unsupported(flag: str) -> str:
    return f"Not supported: {UNSUPPORTED[flag]}."


def _true(text: str) -> bool:
    return text.lower() not in ("false", "f")


if __name__ == "__main__":
    sys.exit(main())
