"""The command ``python -m mlx_qwen3next.generate``: mlx_lm.generate, for Qwen3-Next."""

from __future__ import annotations

import argparse
import sys

from .cli import (
    Parser,
    add_group_options,
    add_speed_options,
    guarded,
    refuse,
    set_command_buffers,
)

DEFAULT_MAX_TOKENS = 100
DEFAULT_PROMPT = "hello"
DEMO_PROMPT = "How do I use itertools.chain?"  # what the bundled model is asked instead

# Flags that have no meaning here, and why.
UNSUPPORTED = {
    "image": "Qwen3-Next takes no images",
    "draft_model": "the model drafts with its own MTP head: use --mtp",
    "num_draft_tokens": "use --mtp",
    "quantize_activations": "activations stay in floating point here",
    "max_kv_size": "keys and values are kept whole, so that long prompts stay exact",
}

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
    set_command_buffers()
    # Only here: MLX and transformers take a second to import, which --help and typos need not.
    from .terminal import run

    return run(args)


# --- mlx_lm.generate's flags --------------------------------------------------------------------
# Declared once more, since its own parser comes with all of MLX. Names, types and defaults are
# mlx-lm's, which a test compares one by one; the words are ours.
def add_essential_flags(group: argparse._ArgumentGroup) -> None:
    """Adds those of the flags that most people need."""
    group.add_argument(
        "--model",
        type=str,
        metavar="DIR_OR_REPO",
        help="A local directory or a Hugging Face repository, as published or converted to MLX. "
        "Without it, the small demo model that ships with this package runs.",
    )
    group.add_argument(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="The message; \\n and \\t stand for line break and tab, '-' reads it from stdin. "
        f"Default: {DEFAULT_PROMPT!r}, or for the demo model {DEMO_PROMPT!r}.",
    )
    group.add_argument(
        "--prompt-cache-file",
        type=str,
        metavar="FILE",
        help="Keep there what the model makes of the prompt: the next one is processed from where "
        "it differs. What a file of mlx_lm.cache_prompt holds is continued.",
    )
    group.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="Tokens to generate at most; -1 for as many as the context takes (default: "
        "%(default)s).",
    )


def other_flags() -> argparse.ArgumentParser:
    """A parser of the other flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run Python code that comes with the model.",
    )
    parser.add_argument(
        "--adapter-path",
        type=str,
        metavar="DIR",
        help="A fine-tune of the model made by mlx_lm.lora, to be applied to it.",
    )
    parser.add_argument(
        "--extra-eos-token",
        type=str,
        default=(),
        nargs="+",
        metavar="TOKEN",
        help="More tokens that end the answer, as text or by id.",
    )
    parser.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="What the model is told before the message, such as how to answer it.",
    )
    parser.add_argument("--image", type=str, default=(), nargs="+", help=_unsupported("image"))
    parser.add_argument(
        "--prefill-response",
        metavar="TEXT",
        help="How the answer begins; the model goes on from there.",
    )
    parser.add_argument(
        "--temp",
        type=float,
        default=0.0,
        metavar="T",
        help="Randomness: 0 always takes the likeliest token, 1 draws tokens as probable as the "
        "model finds them (default: %(default)s).",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="Draw from the likeliest tokens only, as many as have the probability P together "
        "(default: %(default)s, all).",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="Draw only tokens at least P times as probable as the likeliest one (default: "
        "%(default)s, all).",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="Draw from the K likeliest tokens only (default: %(default)s, all).",
    )
    parser.add_argument(
        "--xtc-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="How often XTC steps in, for less expected words: of the tokens that reach "
        "--xtc-threshold it leaves the least likely one (default: %(default)s, never).",
    )
    parser.add_argument(
        "--xtc-threshold",
        type=float,
        default=0.1,
        metavar="P",
        help="The probability from which on XTC drops tokens (default: %(default)s).",
    )
    parser.add_argument(
        "--min-tokens-to-keep",
        type=int,
        default=1,
        metavar="N",
        help="The likeliest N tokens stay, whatever --min-p says (default: %(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="Draw the same tokens again when the command is run again.",
    )
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Continue the prompt as raw text, instead of answering it.",
    )
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="Accepted for mlx_lm.generate's sake, where it changes nothing either.",
    )
    parser.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help="Variables of the chat template, such as '{\"tools\": []}'.",
    )
    parser.add_argument(
        "--verbose",
        type=_true,
        default=True,
        metavar="{T,F}",
        help="F prints the answer alone, without rules and statistics (default: T).",
    )
    parser.add_argument("--max-kv-size", type=int, help=_unsupported("max_kv_size"))
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        default=2048,
        metavar="N",
        help="Prompt tokens processed at a time; fewer take less memory (default: %(default)s).",
    )
    parser.add_argument(
        "--quantize-activations",
        "-qa",
        action="store_true",
        help=_unsupported("quantize_activations"),
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        metavar="BITS",
        help="Keep the text's keys and values in 2, 3, 4, 5, 6 or 8 bits, which takes less memory "
        "(default: unquantized).",
    )
    parser.add_argument(
        "--kv-group-size",
        type=int,
        default=64,
        metavar="N",
        help="With --kv-bits: numbers that share a scale, 32, 64 or 128 (default: %(default)s).",
    )
    parser.add_argument(
        "--quantized-kv-start",
        type=int,
        default=5000,
        metavar="N",
        help="With --kv-bits: quantize once the text has N tokens (default: %(default)s).",
    )
    parser.add_argument("--draft-model", type=str, help=_unsupported("draft_model"))
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
