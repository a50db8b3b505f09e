"""mlx-lm's learned quantizers on this package's model: mlx_lm.dynamic_quant and mlx_lm.dwq.

    python examples/learned_quantizers.py [--model DIR] [--rows N]

Both need the model as `load_model(…, pack=False)` gives it. dynamic_quant measures how sensitive
each matrix is and gives the sensitive ones more bits. dwq trains scales and biases so that the
quantized model says what the original says. The program runs their functions on a few rows of
held-out text, writes what they make, loads it as `generate` does, and prints the bits per weight
and the divergence (KL) from the original on other rows: that of quantization to 3 bits first.
"""

import argparse
import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from heldout import files, tokens_of
from mlx_lm.quant import dwq, dynamic_quant
from mlx_lm.tuner.losses import kl_div_loss
from mlx_lm.utils import (
    compute_bits_per_weight,
    dequantize_model,
    quantize_model,
    save_config,
    save_model,
)

from mlx_qwen3next import load, load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.qwen3_next import Model

LOW, HIGH, GROUP, TARGET = 3, 5, 64, 4.5  # bits, group size, bits per weight of dynamic_quant
LENGTH = 64  # tokens of a row


def original(path: Path | None) -> Model:
    """The model to be quantized, in float32, ready for training."""
    model = load_model(path, dtype=mx.float32, pack=False)
    return dequantize_model(model) if model.args.quantization else model


def uniform(model: Model, config: dict[str, Any], _: mx.array) -> tuple[Model, dict[str, Any]]:
    """Quantizes to LOW bits."""
    return quantize_model(model, config, GROUP, LOW)


def dynamic(model: Model, config: dict[str, Any], rows: mx.array) -> tuple[Model, dict[str, Any]]:
    """Quantizes as mlx_lm.dynamic_quant does."""
    bits = {"low_bits": LOW, "low_group_size": GROUP, "high_bits": HIGH, "high_group_size": GROUP}
    found = dict(dynamic_quant.estimate_sensitivities(model, rows, **bits, batch_size=2))
    threshold = dynamic_quant.estimate_threshold(model, found, target_bpw=TARGET, **bits)

    def chosen(path: str, module: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": HIGH, "group_size": GROUP} if found[path] > threshold else True

    return quantize_model(model, config, GROUP, LOW, quant_predicate=chosen)


def distilled(model: Model, config: dict[str, Any], rows: mx.array) -> tuple[Model, dict[str, Any]]:
    """Quantizes to LOW bits and trains as mlx_lm.dwq does."""
    student, config = quantize_model(copy.deepcopy(model), config, GROUP, LOW)
    data = [(row, 0) for row in rows.tolist()]

    def target(batch: mx.array, _: int, split: str) -> mx.array:
        return model(batch)

    adam = optimizers.Adam(learning_rate=1e-4, bias_correction=True)
    options = {"batch_size": 2, "max_seq_length": LENGTH, "seed": 0, "dtype": mx.float32}
    dwq.dwq_quantize(student, target, adam, data, data[:2], **options)
    return student, config


WAYS: dict[str, Callable[..., tuple[Model, dict[str, Any]]]] = {
    f"{LOW} bits": uniform,
    "dynamic_quant": dynamic,
    "dwq": distilled,
}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; the demo model by default")
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH} tokens, to learn from")
    args = parser.parse_args()

    mx.random.seed(0)
    _, tokenizer = load(args.model)
    config = json.loads((args.model or BUNDLED).joinpath("config.json").read_text())
    config = {key: config[key] for key in config if not key.startswith("quantization")}
    text = tokens_of(tokenizer, files()[0])[0, : (args.rows + 2) * LENGTH].reshape(-1, LENGTH)
    rows, other = text[: args.rows], text[args.rows :]
    expected = original(args.model)(other)
    print("| quantizer | bits per weight | KL from the original |")
    print("| --- | --- | --- |", flush=True)
    for name, quantize in WAYS.items():
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                model, made = quantize(original(args.model), config, rows)
            save_model(folder, model)
            save_config(made, Path(folder) / "config.json")
            loaded = load_model(folder, dtype=mx.float32)
            divergence = kl_div_loss(loaded(other), expected).mean().item()
        print(f"| {name} | {compute_bits_per_weight(model):.2f} | {divergence:.3f} |", flush=True)


if __name__ == "__main__":
    main()
