"""Prefill and decoding speed beside stock mlx-lm: same files, same process, taking turns.

    python examples/beside_mlx_lm.py [--model DIR] [--prompt-tokens 512] [--repeats 5]

Prints tokens per second (medians) and the ratio, once with each side's own dtypes and once with
float32 forced on both. A pair is measured only after its logits were found to agree. DIR must load
in stock mlx-lm; the default is the bundled model, as mlx_lm.convert makes it (bfloat16).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_stock

from mlx_qwen3next import load_model
from mlx_qwen3next.load import BUNDLED

DECODED = 64


def as_mlx_lm_would(directory: Path) -> Path:
    """The bundled trunk as mlx_lm.convert makes it: without the exact norms beside it."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(BUNDLED / name, directory)
    return directory


def prefill(model: nn.Module, tokens: mx.array) -> tuple[float, mx.array, list]:
    """(seconds, last logits, the filled cache)."""
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    logits = model(tokens, cache=cache)[:, -1]
    mx.eval(logits, [c.state for c in cache])
    return time.perf_counter() - start, logits, cache


def decode(model: nn.Module, logits: mx.array, cache: list) -> float:
    """Seconds of DECODED greedy steps, the next one queued while one runs."""
    token = logits.argmax(axis=-1)
    mx.eval(token)
    start = time.perf_counter()
    for _ in range(DECODED):
        following = model(token[:, None], cache=cache)[:, -1].argmax(axis=-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return time.perf_counter() - start


def compare(ours: nn.Module, stock: nn.Module, tokens: mx.array, repeats: int, bound: float):
    """Medians of (our prefill, stock prefill, our decode, stock decode) in seconds."""
    a, b = prefill(ours, tokens)[1], prefill(stock, tokens)[1]
    error = (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()
    if error > bound:
        raise SystemExit(f"the two models disagree (relative error {error:.1e}): not measured")
    times: list[list[float]] = [[], [], [], []]
    for _ in range(repeats):
        for i, model in enumerate((ours, stock)):
            seconds, logits, cache = prefill(model, tokens)
            times[i].append(seconds)
            times[2 + i].append(decode(model, logits, cache))
    return [statistics.median(t) for t in times], error


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory that stock mlx-lm loads")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        directory = args.model or as_mlx_lm_would(Path(scratch))
        mx.random.seed(0)
        print("tokens per second: ours, mlx-lm's, ratio")
        for name in ("default dtypes", "float32"):
            ours, (stock, _) = load_model(directory), load_stock(directory)
            if name == "float32":
                ours = load_model(directory, dtype=mx.float32)
                stock.update(tree_map(as_float32, stock.parameters()))
            tokens = mx.random.randint(0, ours.args.vocab_size, (1, args.prompt_tokens))
            bound = 1e-4 if name == "float32" else 0.1  # bfloat16 has 8 bits
            medians, error = compare(ours, stock, tokens, args.repeats, bound)
            work = (args.prompt_tokens, args.prompt_tokens, DECODED, DECODED)
            rates = [n / seconds for n, seconds in zip(work, medians, strict=True)]
            for i, what in ((0, "prefill"), (2, "decode")):
                mine, theirs = rates[i], rates[i + 1]
                print(f"{what:8} {name:15} {mine:9.1f} {theirs:9.1f} {mine / theirs:7.2f}x")
            dtypes = sorted({str(p.dtype) for _, p in tree_flatten(stock.parameters())})
            print(f"         (logits agree to {error:.0e}; mlx-lm holds {', '.join(dtypes)})")


def as_float32(x: mx.array) -> mx.array:
    """Floating-point arrays as float32."""
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


if __name__ == "__main__":
    main()
