"""The command ``python -m mlx_qwen3next.convert``: mlx_lm.convert, for Qwen3-Next."""

from __future__ import annotations

import argparse
import sys

from mlx_lm.convert import configure_parser

from mlx_qwen3next.cli import Parser, guarded

from .conversion import convert
from .quantize import HEAD_BITS, MTP_BITS, UNQUANTIZED

EPILOG = """examples:
  %(prog)s --hf-path Qwen/Qwen3-Next-80B-A3B-Instruct --mlx-path qwen3-next-4bit -q
      a 4-bit model with its MTP head, which mlx-lm and LM Studio can load as well
  %(prog)s --hf-path Qwen/Qwen3-Next-80B-A3B-Instruct --mlx-path qwen3-next-48gb --fit 48
      the bits that a 48 GB Mac has room for, where they matter most
  %(prog)s --hf-path Qwen/Qwen3-Next-80B-A3B-Instruct --mlx-path qwen3-next-4bit -q --stream
      the same, without ever having all of the 163 GB source on disk
  %(prog)s --hf-path Qwen/Qwen3-Next-80B-A3B-Instruct --attach-mtp --mlx-path DIR
      the head alone (3.3 GB are fetched) beside a model that was converted without it
  %(prog)s --hf-path Qwen/Qwen3-Next-80B-A3B-Instruct --attach-mtp --any-trunk --mlx-path DIR
      the same head beside Coder-Next, which has none
  %(prog)s --hf-path Qwen/Qwen3-Coder-Next-FP8 -q --dry-run
      sizes, disk and memory needed, and which Macs it will run on

A conversion that was stopped, by Ctrl-C or otherwise, goes on with the same command.
"""


# In place of mlx_lm.convert's own help.
HELP = {
    "quantize": "Quantize; without it weights keep their precision. Routers always get 8 bits, "
    "norms, convolutions and decays stay as they are.",
    "q_bits": "Bits per weight (default: 4; 8 with mxfp8).",
    "q_group_size": "Weights that share a scale (default: 64; 32 with mxfp4 and mxfp8, 16 with "
    "nvfp4).",
    "quant_predicate": "Mixed-bit recipe: low bits, and high bits where it matters most.",
    "dtype": "Of what stays floating point (default: what config.json says).",
    "upload_repo": "Hugging Face repository to upload the result to.",
    "dequantize": "Dequantize a model in MLX's quantized form.",
    "trust_remote_code": "Accepted for mlx_lm.convert's sake; no code is ever run.",
}


def parser() -> argparse.ArgumentParser:
    """mlx_lm.convert's parser with this package's flags; every stock flag keeps its default."""
    stock = configure_parser()
    for action in stock._actions:
        action.help = HELP.get(action.dest, action.help)
    result = Parser(
        stock,
        prog="python -m mlx_qwen3next.convert",
        usage="%(prog)s --hf-path DIR_OR_REPO [--mlx-path DIR] [-q] [other options]",
        description="Convert Qwen3-Next (Instruct, Thinking, Coder-Next) to MLX, MTP head too.",
        epilog=EPILOG,
    )
    essential = result.add_argument_group("essential options")
    essential.add_argument(
        "--hf-path",
        "--model",
        required=True,
        metavar="DIR_OR_REPO",
        help="The checkpoint: a local directory or a Hugging Face repository, with float32, "
        "float16, bfloat16 or FP8 weights.",
    )
    essential.add_argument(
        "--mlx-path",
        default=stock.get_default("mlx_path"),
        metavar="DIR",
        help="The folder to make (default: %(default)s). With --attach-mtp, the converted model, "
        "or its repository in the hub's cache.",
    )
    extra = result.add_argument_group("beyond mlx_lm.convert")
    extra.add_argument("--revision", metavar="REV", help="Branch, tag or commit of a repository.")
    extra.add_argument(
        "--mtp",
        choices=["keep", "drop"],
        default="keep",
        help="Whether the MTP head is converted, into mtp.safetensors (default: %(default)s).",
    )
    extra.add_argument(
        "--mtp-bits",
        type=int,
        choices=HEAD_BITS,
        metavar="N",
        help=f"Bits of the MTP head's weights; {UNQUANTIZED} leaves them unquantized (default: "
        f"{MTP_BITS} with a quantized model, else {UNQUANTIZED}).",
    )
    extra.add_argument(
        "--attach-mtp",
        action="store_true",
        help="Fetch and convert only the MTP head, and put it beside the converted model at "
        "--mlx-path, after checking that they belong together.",
    )
    extra.add_argument(
        "--any-trunk",
        action="store_true",
        help="With --attach-mtp: take the head of another model of the same shapes, too, such as "
        "Instruct's for Coder-Next. Its drafts are less often right; the text stays the same.",
    )
    extra.add_argument(
        "--fit",
        type=float,
        metavar="GB",
        help="Choose the bits of each part so that the whole model stays in the memory of a Mac of "
        "GB (36, 48, 64, …), with 8,192 tokens of context, at the smallest loss. -q is implied; of "
        "the other quantization flags --q-group-size and --mtp-bits apply. The source is read "
        "twice, and a layer of it is in memory at a time.",
    )
    extra.add_argument(
        "--calibration",
        metavar="FILE",
        help="With --fit: a text like those that the model will be used for, on which the loss is "
        "measured; 8,192 tokens are used (default: Python's documentation and library). 'none' "
        "goes by what is expected of each part instead.",
    )
    extra.add_argument(
        "--stream",
        action="store_true",
        help="Keep each of a repository's weight files only until it is converted.",
    )
    extra.add_argument(
        "--dry-run",
        action="store_true",
        help="Print sizes, bits per weight, disk and memory needed, and do nothing.",
    )
    extra.add_argument(
        "--verify",
        action="store_true",
        help="Read the result again and print how far weights and logits are from the source.",
    )
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 for bad input, 130 for Ctrl-C)."""
    args = parser().parse_args(argv)
    return guarded(lambda: convert(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
