"""Measures the full 48 layers without our kernels beside mlx-lm, such as on MLX's CUDA backend.

    pip install 'mlx[cuda12]'
    python examples/full_size.py [--layers N] [--shape small]

Both packages get the same random 4-bit weights (48 layers: 45 GB, drawn in memory, one package
after the other). Each decodes and reads a prompt with mx.compile and without. "building" is the
host's time to make a step's graph, "handing over" that to give it to the device, both in
milliseconds a step; where their sum is near the step's own time, the host is the limit.

To try the script on a CPU: --shape small --layers 4 --prompt 64 --tokens 8.
"""

import argparse
import gc
import statistics
import time

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_next as stock

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.compute import proof
from mlx_qwen3next.model import qwen3_next
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.packed import packing

ROW = "{:18}{:>18}{:>18}{:>12}{:>12}{:>16}"


def make(package: str, shape: str, layers: int):
    """Makes a package's model, with weights that depend on their names alone."""
    config = shapes.config(shape, layers)
    if package == "here":
        model = qwen3_next.Model(Config.from_dict(config))
    else:
        model = stock.Model(stock.ModelArgs.from_dict(config))
    shapes.quantize(model)
    for i, (path, array) in enumerate(sorted(tree_flatten(model.parameters()))):
        ((_, value),) = shapes.drawn({path: array}, np.random.default_rng(i))
        if package == "here" and value.dtype != mx.uint32 and not model.cast_predicate(path):
            value = value.astype(mx.float32)  # as our loading does; mlx-lm keeps the files' dtype
        model.load_weights([(path, value)], strict=False)
    mx.eval(model.parameters())
    return packing.pack(model) if package == "here" else model


def read(model, prompt: mx.array) -> tuple[list, float]:
    """Reads a prompt ``[1, L]``; returns the cache, and the seconds."""
    cache = model.make_cache()
    start = time.perf_counter()
    hidden = model.model(prompt, cache=cache)
    mx.eval(hidden, [c.state for c in cache])
    return cache, time.perf_counter() - start


def decode(model, cache: list, tokens: int) -> np.ndarray:
    """Decodes greedily, a step ahead; returns seconds a step: in all, building, handing over."""
    token, parts = mx.array([5]), []
    last = time.perf_counter()
    for _ in range(tokens):
        start = time.perf_counter()
        following = mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1)
        built = time.perf_counter()
        mx.async_eval(following)
        handed = time.perf_counter()
        token.item()
        token, now = following, time.perf_counter()
        parts.append((now - last, built - start, handed - built))
        last = now
    mx.eval(token)
    return np.median(parts[2:], axis=0)


def measure(model, prompt: mx.array, tokens: int, repeats: int) -> list[str]:
    """The cells of a row of the table; the first repeat is not timed."""
    reading, steps = [], []
    for _ in range(repeats + 1):
        cache, seconds = read(model, prompt)
        reading.append(prompt.size / seconds)
        steps.append(decode(model, cache, tokens))
    step, built, handed = np.median(steps[1:], axis=0)
    speed = statistics.median(reading[1:])
    figures = [f"{speed:.0f}", f"{1 / step:.1f}"]
    return figures + [f"{1e3 * seconds:.2f}" for seconds in (step, built, handed)]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, default="80b")
    parser.add_argument(
        "--layers", type=int, default=shapes.FULL, metavar="N", help="a multiple of 4"
    )
    parser.add_argument("--prompt", type=int, default=2048, metavar="N", help="tokens")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="to decode, above 2")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    args = parser.parse_args()

    proof.set_kernels("off")
    prompt = mx.array(np.random.default_rng(0).integers(0, 8192, (1, args.prompt)))
    print(f"{mx.default_device()}, {args.layers} layers, prompt of {args.prompt} tokens")
    print(
        ROW.format(
            "", "prompt, tokens/s", "decode, tokens/s", "ms a step", "building", "handing over"
        )
    )
    logits = []
    for package in ("here", "mlx-lm"):
        model = make(package, args.shape, args.layers)
        for kind, switch in (("compiled", mx.enable_compile), ("not", mx.disable_compile)):
            switch()
            cells = measure(model, prompt, args.tokens, args.repeats)
            print(ROW.format(f"{package}, {kind}", *cells), flush=True)
        logits.append(np.array(model(prompt[:, :32])[0].astype(mx.float32)))
        del model
        gc.collect()
        mx.clear_cache()
    here, there = logits
    error = np.linalg.norm(here - there) / np.linalg.norm(there)
    print(f"logits after 32 tokens differ by {error:.1e} of their size; bfloat16 has 8 bits")


if __name__ == "__main__":
    main()
