"""The cost of quantization on text the model has not seen: bits per byte and tokens a round.

    python examples/quantizations.py CHECKPOINT

CHECKPOINT is an unquantized model (``build/demo_model/hf`` after ``examples/demo_model/``). The
program converts it in every way below, measures each result as ``heldout.py`` does, and prints the
table line by line. It dequantizes the weights before it measures: the results are the same, and the
CPU is faster.
"""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from heldout import accept_length, acceptance, bits_per_byte
from mlx_lm.utils import dequantize_model

from mlx_qwen3next import load
from mlx_qwen3next.convert import convert

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


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the unquantized model")
    args = parser.parse_args()
    print("| conversion | MB | bits per byte | tokens a round | accepted at depth 1, 2, 3 |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    known: dict[str, float] = {}
    for name, options in WAYS.items():
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
            known[trunk] = bits_per_byte(model, tokenizer)
        rates = acceptance(model, tokenizer)
        depths = ", ".join(f"{rate:.3f}" for rate in rates)
        print(
            f"| {name} | {size:.1f} | {known[trunk]:.4f} | {accept_length(rates):.3f} | {depths} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
