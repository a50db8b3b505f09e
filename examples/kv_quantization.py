"""Compares quantized keys and values with plain ones: the error of logits, and memory.

    python examples/kv_quantization.py [--length 32768] [--bits 8 6 4 3 2]

A tiny model of one period reads a text of noise with needles, which its attention must find
afterwards (see long_prompts.py), and 100 tokens more. The relative error is that of their logits
against plain keys and values, in float32. The memory is that of the attention layer's cache.
What the 80B model takes is computed from its shapes, in bfloat16.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import long_text
from float64 import relative_error

from mlx_qwen3next import load_model
from mlx_qwen3next.bench import shapes
from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.sequence import TokenSequence
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.quantized_kv import KVQuantization
from mlx_qwen3next.model.qwen3_next import Model

MORE = 100  # tokens after the text
GROUP, START = 64, 5000  # the flags' defaults


def read(model: Model, tokens: mx.array, quantization: KVQuantization) -> tuple[mx.array, int]:
    """Returns the logits of a text's last tokens, and the bytes of its keys and values."""
    ids, cache = tokens.tolist(), model.make_cache()
    sequence = TokenSequence(
        *(model, cache, [], [ids[:-MORE], ids[-MORE : -MORE + 1]]),
        depth=FixedDepth(0),
        quantization=quantization,
    )
    while sequence.is_reading:
        sequence.read()
    logits = model(tokens[None, -MORE:], cache)[0]
    mx.eval(logits)
    return logits, sum(entry.nbytes for entry in cache if hasattr(entry, "offset"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        long_text.write(Path(directory))
        model = load_model(Path(directory), dtype=mx.float32)
    full = Config.from_dict(shapes.config("80b", shapes.FULL))
    tokens = mx.array(long_text.text(args.length, MORE))
    expected = None
    print(
        "| bits | error of logits | same token | cache MB | 80B: GB | at 262,144 | with the head |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for bits in [None, *args.bits]:
        quantization = KVQuantization(bits, GROUP, START)
        logits, held = read(model, tokens, quantization)
        expected = logits if expected is None else expected
        same = mx.mean(logits.argmax(axis=-1) == expected.argmax(axis=-1)).item()
        sizes = (
            capacity.cache_bytes(full, n, mtp=mtp, itemsize=2, quantization=quantization) / 1e9
            for n, mtp in ((args.length, False), (262_144, False), (262_144, True))
        )
        print(
            f"| {bits or 'none'} | {relative_error(logits, expected):.1e} | {same:.0%} | "
            f"{held / 1e6:.1f} | {' | '.join(f'{size:.2f}' for size in sizes)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
