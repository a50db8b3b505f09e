"""The parts that all commands share: their parser, number types, options and exit statuses.

Importing this module imports neither MLX nor numpy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from .decoding.draft_depth import MAX_DEPTH, MOST_COPIED


class LineParser(argparse.ArgumentParser):
    """A parser that prints an error in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")


class Parser(LineParser):
    """The parser of an mlx-lm command, extended by this package's flags.

    A flag that is added replaces the stock flag of the same name.

    Args:
        stock: the parser of the mlx-lm command.
        options: those of :class:`argparse.ArgumentParser`.
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
        """Adds a group of flags, which ``--help`` lists before the stock flags."""
        group = super().add_argument_group(*args, **options)
        if hasattr(self, "_ours"):  # neither argparse's own groups nor those of the stock parser
            self._action_groups.insert(self._ours, self._action_groups.pop())
            self._ours += 1
        return group


def guarded(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status: 2 for bad input, 130 for Ctrl-C.

    Either is reported in one line on stderr.
    """
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
    """Refuses flags that are accepted for mlx-lm's sake but would have no effect.

    Args:
        args: the parsed arguments.
        parser: the parser, which knows the defaults.
        flags: the names of these flags, each with the reason.

    Raises:
        ValueError: one of them is not at its default.
    """
    for flag, reason in flags.items():
        if getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"--{flag.replace('_', '-')} is not supported: {reason}")


# --- number types, for argparse -----------------------------------------------------------------
def count(text: str) -> int:
    """Parses a whole number of at least 1."""
    return _number(text, int, lambda n: n >= 1, "a whole number of at least 1")


def counts(text: str) -> tuple[int, ...]:
    """Parses whole numbers of at least 1, separated by commas."""
    return tuple(count(part) for part in text.split(","))


def amounts(text: str) -> tuple[float, ...]:
    """Parses numbers of more than 0, separated by commas."""
    parts = text.split(",")
    return tuple(_number(part, float, lambda n: n > 0, "numbers of more than 0") for part in parts)


def layer_counts(text: str) -> tuple[int, ...]:
    """Parses numbers of layers, separated by commas."""
    try:
        return counts(text)
    except argparse.ArgumentTypeError:
        message = f"must be numbers of layers, such as 30,18, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def byte_count(text: str) -> int:
    """Parses a size of at least 1 byte, such as 1000, 500MB or 8GB."""
    from mlx_lm.utils import _parse_size

    return _number(text, _parse_size, lambda n: n >= 1, "a size of at least 1 byte, such as 8GB")


def seconds(text: str) -> float:
    """Parses a time of at least 0 seconds."""
    return _number(text, float, lambda s: s >= 0, "a number of seconds, at least 0")


def positive_seconds(text: str) -> float:
    """Parses a time of more than 0 seconds."""
    return _number(text, float, lambda s: s > 0, "a number of seconds, more than 0")


def draft_depth(text: str, most: int = MAX_DEPTH) -> str | int:
    """Parses "auto", "off" or the number of tokens to draft."""
    if text in ("auto", "off"):
        return text
    return _number(text, int, lambda n: 1 <= n <= most, f"'auto', 'off' or 1 to {most}")


def copied_tokens(text: str) -> str | int:
    """Parses "auto", "off" or the number of tokens to copy."""
    return draft_depth(text, MOST_COPIED)


def rope_scaling(text: str) -> dict[str, Any]:
    """Parses a scaling of positions such as yarn:4, into ``rope_scaling`` as in config files."""
    kind, _, factor = text.partition(":")
    if kind != "yarn":
        raise argparse.ArgumentTypeError(f"must be yarn:FACTOR, such as yarn:4, got {text!r}")
    expected = "yarn:FACTOR with a number of at least 1"
    return {"rope_type": kind, "factor": _number(factor, float, lambda f: f >= 1, expected)}


def experts_in_memory(text: str) -> str | float:
    """Parses "auto", "all" or a number of GB."""
    if text in ("auto", "all"):
        return text
    return _number(text, float, lambda gb: gb > 0, "'auto', 'all' or a number of GB")


def _number(
    text: str, convert: Callable[[str], Any], fits: Callable[[Any], bool], expected: str
) -> Any:
    """Converts the text of an argument to a number.

    Raises:
        argparse.ArgumentTypeError: the text is no number, or the number does not fit.
    """
    try:
        value = convert(text)
    except (ValueError, KeyError, ArithmeticError):  # the last two are _parse_size's
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value


# --- options that several commands have ---------------------------------------------------------
def add_speed_options(group: Any) -> None:
    """Adds the flags of drafting, and ``--kernels``, to a group of flags."""
    group.add_argument(
        "--mtp",
        type=draft_depth,
        default="auto",
        metavar=f"{{auto,off,1..{MAX_DEPTH}}}",
        help="Number of tokens that the model's own MTP head drafts ahead. 'auto' measures which "
        "number pays on this machine, none included; 'off' drafts nothing (default: "
        "%(default)s). This changes the speed, not the answer.",
    )
    group.add_argument(
        "--mtp-from",
        metavar="DIR_OR_REPO",
        help="Another checkpoint of the same shapes, whose MTP head drafts for a model that has "
        "none, such as Instruct's for Coder-Next; only the head's files are fetched. Its drafts "
        "are less often right than a head's that was trained with the model, the answer stays the "
        "same, and '--mtp auto' drafts nothing where it does not pay.",
    )
    group.add_argument(
        "--draft-model",
        type=str,
        metavar="DIR_OR_REPO",
        help="DFlash drafter trained for the model, such as z-lab/Qwen3-Coder-Next-DFlash. It "
        "drafts instead of an MTP head, as many tokens as --mtp says; the answer stays the same.",
    )
    group.add_argument(
        "--lookup",
        type=copied_tokens,
        metavar=f"{{auto,off,1..{MOST_COPIED}}}",
        help="Number of tokens to copy ahead from where the text, prompt included, was last as it "
        "is now; works with every model. 'auto' measures which number pays, 'off' copies nothing "
        "(default: 'auto' with --mtp auto, otherwise 'off'). This changes the speed, not the "
        "answer.",
    )
    group.add_argument(
        "--kernels",
        choices=("auto", "on", "off"),
        default="auto",
        help="Use of this package's Metal kernels: 'auto' uses each kernel that has proved right "
        "and fast on this machine, 'on' uses all of them, 'off' none (default: %(default)s).",
    )


def add_experts_in_memory(group: Any) -> None:
    """Adds ``--experts-in-memory`` to a group of flags."""
    group.add_argument(
        "--experts-in-memory",
        type=experts_in_memory,
        default="auto",
        metavar="{auto,all,GB}",
        help="Memory for the experts, which are most of the model: 'all', or a number of GB, where "
        "the others are read from disk when they are wanted. 'auto' holds all where they fit, and "
        "otherwise as many as do (default: %(default)s). This changes the speed, not the answer. "
        "The model must be converted to MLX.",
    )


def add_rope_scaling(group: Any) -> None:
    """Adds ``--rope-scaling`` to a group of flags."""
    group.add_argument(
        "--rope-scaling",
        type=rope_scaling,
        metavar="yarn:FACTOR",
        help="Stretch the model's positions by YaRN for texts of up to FACTOR times its length; "
        "Qwen recommends yarn:4 for more than 262,144 tokens, and none for less, since it may "
        "cost quality in short texts (default: as the checkpoint's config says).",
    )


def add_sampling_options(group: Any) -> None:
    """Adds ``--temp``, ``--top-p``, ``--min-p`` and ``--top-k`` to a group of flags.

    A flag that is not given is None: see :func:`take_recommendation`. Where the checkpoint
    recommends nothing, mlx-lm's defaults hold, which are those of
    :class:`mlx_qwen3next.decoding.sampling.Sampling`.
    """
    otherwise = "default: what the checkpoint's generation_config.json recommends, else"
    group.add_argument(
        "--temp",
        type=float,
        metavar="T",
        help="Sampling temperature: 0 always takes the most probable token, 1 samples from the "
        f"model's own probabilities ({otherwise} 0).",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="Sample only from the most probable tokens whose probabilities sum up to P "
        f"({otherwise} 1, all tokens).",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="Sample only from tokens at least P times as probable as the most probable one "
        f"({otherwise} 0, all tokens).",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"Sample only from the K most probable tokens ({otherwise} 0, all tokens).",
    )


def take_recommendation(args: argparse.Namespace, recommended: Mapping[str, float]) -> str:
    """Fills the flags of :func:`add_sampling_options` that were not given.

    Args:
        args: the parsed arguments, which are changed.
        recommended: the result of
            :func:`mlx_qwen3next.decoding.recommended.recommended_sampling`.

    Returns:
        A line that says what was filled in, or nothing if nothing was.
    """
    taken = {name: x for name, x in recommended.items() if getattr(args, name) is None}
    vars(args).update(taken)
    if not taken:
        return ""
    names = {"temp": "temperature"}
    values = ", ".join(f"{names.get(n, n.replace('_', '-'))} {x:g}" for n, x in taken.items())
    greedy = " (--temp 0 for greedy)" if args.temp else ""
    return f"sampling as the checkpoint recommends: {values}{greedy}"


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Returns those of the arguments that are not None, by name."""
    return {name: x for name in names if (x := getattr(args, name)) is not None}


def add_kv_options(group: Any) -> None:
    """Adds the flags of the quantization of keys and values to a group of flags."""
    group.add_argument(
        "--kv-bits",
        type=int,
        metavar="BITS",
        help="Quantize the keys and values of the text to 2, 3, 4, 5, 6 or 8 bits, which saves "
        "memory (default: no quantization).",
    )
    group.add_argument(
        "--kv-group-size",
        type=int,
        default=64,
        metavar="N",
        help="With --kv-bits: how many numbers share a scale, 32, 64 or 128 (default: "
        "%(default)s).",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        default=5000,
        metavar="N",
        help="With --kv-bits: length of the text in tokens from which on keys and values are "
        "quantized (default: %(default)s).",
    )


def add_group_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--pipeline`` and ``--expert-parallel`` to a parser."""
    group = parser.add_argument_group("several machines (with mlx.launch)")
    group.add_argument(
        "--pipeline",
        type=layer_counts,
        nargs="?",
        const=(),
        default=False,  # as in mlx_lm.server
        metavar="N,N,…",
        help="Give each machine whole layers: N of them in the order of the ranks or, without "
        "numbers, as many as fit its memory. This takes the least traffic, but the machines work "
        "one after the other (default: divide every layer among the machines).",
    )
    group.add_argument(
        "--expert-parallel",
        action="store_true",
        help="Give each machine whole experts instead of a part of every expert (default: only "
        "if the width of an expert cannot be divided).",
    )


def division(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Translates the options of :func:`add_group_options` into those of
    :func:`mlx_qwen3next.load`, for a group of ``size`` processes.

    Raises:
        ValueError: the options exclude each other, or there is only one process.
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


def load_options(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Returns the options of :func:`mlx_qwen3next.load` that generate's and the server's flags set.

    Args:
        size: of the group of processes.

    Raises:
        ValueError: as for :func:`division`.
    """
    names = "adapter_path", "mtp_from", "draft_model", "rope_scaling", "experts_in_memory"
    return division(args, size) | {name: getattr(args, name) for name in names}


def fingerprint_of(args: argparse.Namespace) -> str:
    """Computes the fingerprint of a prompt cache, which is the same for arguments that make the
    same cache of a prompt.

    It covers the model, the adapter, the head of another checkpoint, the dtype, the scaling of
    positions and the quantization of keys and values.

    Raises:
        ValueError: the model, its adapter or the head cannot be read.
    """
    from .checkpoint.fingerprint import adapter_digest, fingerprint, head_digest
    from .checkpoint.heads import find_head
    from .checkpoint.hub import read_config, resolve
    from .checkpoint.loading import default_dtype

    options = [adapter_digest(args.adapter_path), str(default_dtype())]
    if args.kv_bits is not None:
        options.append(f"{args.kv_bits} {args.kv_group_size} {args.quantized_kv_start}")
    if args.rope_scaling is not None:
        options.append(str(args.rope_scaling))
    if args.mtp_from is not None:
        options.append(head_digest(find_head(args.mtp_from, read_config(args.model))))
    return fingerprint(resolve(args.model), *options)
