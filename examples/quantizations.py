"""The cost of quantization on text the model has not seen: bits per byte and tokens a round.

    python examples/quantizations.py [--fit] CHECKPOINT

CHECKPOINT is an unquantized model: ``build/demo_model/hf`` after ``examples/demo_model/``, else
what ``examples/demo_model/off_grid.py`` makes. The program converts it in every way below, measures
each result as ``heldout.py`` does, and prints the table line by line. It dequantizes the weights
before it measures: the results are the same, and the CPU is faster. With ``--fit`` the ways are one
width throughout, and ``convert --fit`` to the same size, by expected and by measured errors.
"""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from heldout import CONTEXT, accept_length, acceptance, bits_per_byte
from mlx_lm.utils import dequantize_model

from mlx_qwen3next import load
from mlx_qwen3next.convert import convert
from mlx_qwen3next.convert.fit import NO_TEXT, memory_needed
from mlx_qwen3next.convert.plan import plan_conversion
from mlx_qwen3next.convert.quantize import base_quantization
from mlx_qwen3next.convert.source import Source

FOUR: dict[str, Any] = {"quantize": True, "q_bits": 4}
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "8 bits, groups of 64": {"quantize": True, "q_bits": 8, "mtp_bits": 8},
    "4 bits, groups of 64": FOUR,
    "4 bits, groups of 32": FOUR | {"q_group_size": 32},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    "mixed_4_6": {"quantize": True, "quant_predicate": "mixed_4_6"},
    "mixed_3_6": {"quantize": True, "quant_predicate": "mixed_3_6"},
    "mixed_3_4": {"quantize": True, "quant_predicate": "mixed_3_4"},
    "mixed_2_6": {"quantize": True, "quant_predicate": "mixed_2_6"},
    "4 bits, head 3 bits": FOUR | {"mtp_bits": 3},
    "4 bits, head 8 bits": FOUR | {"mtp_bits": 8},
    "4 bits, head bfloat16": FOUR | {"mtp_bits": 16},
}


def fitting_ways(checkpoint: Path) -> list[tuple[str, dict[str, Any]]]:
    """One width throughout, and --fit to the size of it, for 2 to 6 bits."""
    ways: list[tuple[str, dict[str, Any]]] = [("bfloat16", {})]
    for bits in (2, 3, 4, 5, 6):
        fit = {"fit": memory_for(checkpoint, bits)}
        ways += [
            (f"{bits} bits", {"quantize": True, "q_bits": bits}),
            ("`--fit` to that size, expected errors", fit | {"calibration": NO_TEXT}),
            ("`--fit` to that size, measured errors", fit),
        ]
    return ways


def memory_for(checkpoint: Path, bits: int) -> float:
    """The value of --fit that leaves room for the weights at so many bits."""
    conversion = plan_conversion(Source(checkpoint), base=base_quantization("affine", bits, None))
    return memory_needed(conversion, conversion.resident_bytes)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the unquantized model")
    parser.add_argument("--fit", action="store_true", help="compare --fit with single widths")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of each file (default: all, 512 for drafts)"
    )
    args = parser.parse_args()
    ways = fitting_ways(args.checkpoint) if args.fit else list(WAYS.items())
    print("| conversion | MB | bits per byte | tokens a round | accepted at depth 1, 2, 3 |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    known: dict[str, float] = {}
    for name, options in ways:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                convert(str(args.checkpoint), str(target), **options)
            size = sum(file.stat().st_size for file in target.glob("m*.safetensors")) / 1e6
            model, tokenizer = load(target)
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        trunk = str({key: value for key, value in options.items() if key != "mtp_bits"})
        if trunk not in known:
            known[trunk] = bits_per_byte(model, tokenizer, args.tokens)
        rates = acceptance(model, tokenizer, min(args.tokens or CONTEXT, CONTEXT))
        depths = ", ".join(f"{rate:.3f}" for rate in rates)
        print(
            f"| {name} | {size:.1f} | {known[trunk]:.4f} | {accept_length(rates):.3f} | {depths} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
