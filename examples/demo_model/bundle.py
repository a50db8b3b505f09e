"""Quantizes the trained checkpoint and puts it where ``mlx_qwen3next`` looks for its demo model.

    python examples/demo_model/bundle.py build/demo_model/hf mlx_qwen3next/bundled

Needs only mlx_qwen3next. The result has mlx-lm's layout: the trunk in ``model.safetensors``, the
MTP head in ``mtp.safetensors`` beside it; 4 bits in groups of 64, routers 8 bits, norms float32.
"""

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlx_qwen3next import load_model

KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "heldout.txt",
)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Quantize and bundle the trained demo model.")
    parser.add_argument("checkpoint", type=Path, help="hub-layout directory that train.py exports")
    parser.add_argument("bundle", type=Path, help="directory to write")
    parser.add_argument("--bits", type=int, default=4, help="bits per weight (default: 4)")
    args = parser.parse_args()

    model = load_model(args.checkpoint, dtype=mx.bfloat16)
    config = json.loads((args.checkpoint / "config.json").read_text())
    model, config = quantize_model(model, config, group_size=64, bits=args.bits)
    weights = dict(tree_flatten(model.parameters()))
    heads = {name: w for name, w in weights.items() if name.startswith("mtp.")}
    trunk = {name: w for name, w in weights.items() if name not in heads}

    args.bundle.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(args.bundle / "model.safetensors"), trunk, {"format": "mlx"})
    mx.save_safetensors(str(args.bundle / "mtp.safetensors"), heads, {"format": "mlx"})
    (args.bundle / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in KEPT:
        shutil.copyfile(args.checkpoint / name, args.bundle / name)
    size = sum(file.stat().st_size for file in args.bundle.iterdir() if file.is_file())
    print(f"{args.bundle}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
