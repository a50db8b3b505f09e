"""Reads long texts with tiny models of the true pattern, and checks results and memory.

    python examples/long_prompts.py [--lengths 8192 32768 131072 262144] [--sizes 0 512]
    python examples/long_prompts.py --computed

A text of noise has needles at 1 %, 50 % and 99 % of it; after it come tokens whose attention must
find them. A model of one period reads each text in chunks of each size (0: chosen by time and
memory), continues for 100 tokens, half of them together and half one by one, and all logits are
compared with a float64 oracle's.

Reading computes no output of that attention, since nothing needs it: it is the last layer. So the
memory is measured with a model of two periods, which reads the last chunk of a text, as large as
its memory allows. The peak over weights is compared with the formula that chooses the chunks.

With ``--computed`` it prints the largest chunks of the 80B model on Apple's machines, their work
and their memory. Nothing of that is measured.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import long_text

from mlx_qwen3next import load_model
from mlx_qwen3next.bench import shapes
from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.pace import MARGIN, MAX_STALL, PATIENCE, PromptPace
from mlx_qwen3next.decoding.sequence import TokenSequence, prefill
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.cache import AttentionCache, slots
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.packed.packing import pack
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.model.reading import MOST, MOST_ROOM, Reading

MORE = 100  # tokens after a text
ROOM = 2**29  # bytes of a chunk here, besides weights and cache
BOUND = 1e-4  # relative error of logits
# Multiply-adds a second of products in 16 bits, in 10^12: half of Apple's GPUs' peaks; of M5 Max
# what 2,227 tokens a second take, which mlx-lm's prefill reached (docs/figures.md).
RATES = {"M1 Max": 2.6, "M2 Max": 3.4, "M3 Max": 3.6, "M4 Max": 4.6, "M5 Max": 7.1}
LENGTHS = [8192, 32_768, 131_072, 262_144]


class Read:
    """A text that was read, the sizes of its chunks, and their times in seconds."""

    def __init__(self, model: Model, tokens: list[int], size: int):
        self.cache = model.make_cache()
        sequence = TokenSequence(
            *(model, self.cache, [], [tokens, tokens[:1]]),
            depth=FixedDepth(0),
            pace=None if size else PromptPace(Reading(model.args, 4, ROOM, in_pieces=True)),
            step_size=size or MOST,
        )
        self.chunks, self.longest = list[int](), 0.0
        start = time.perf_counter()
        while sequence.is_reading:
            held, begun = len(sequence.tokens), time.perf_counter()
            sequence.read()
            self.chunks.append(len(sequence.tokens) - held)
            self.longest = max(self.longest, time.perf_counter() - begun)
        self.seconds = time.perf_counter() - start

    def __str__(self) -> str:
        least = min(self.chunks[:-1] or self.chunks)
        chunks = f"{len(self.chunks):6} {least:5} {max(self.chunks):5}"
        return f"{chunks} {self.longest:9.2f} {self.seconds:8.1f}"


def check(directory: Path, lengths: list[int], sizes: list[int]) -> float:
    """Compares with the oracle; returns the largest relative error."""
    long_text.write(directory)
    model = load_model(directory, dtype=mx.float32)
    largest = 0.0
    print(" tokens  chunk  count least  most longest s   read s needles' share  error")
    for length in lengths:
        tokens = long_text.text(length, MORE)
        expected, attended = long_text.oracle(directory, tokens, MORE)
        places = [int(length * share) for share in long_text.NEEDLES.values()]
        found = min(attended[i, place] for i, place in enumerate(places))
        for size in sizes:
            mx.clear_cache()
            read = Read(model, tokens[:length].tolist(), size)
            more = mx.array(tokens[None, length:])
            halves = [more[:, : MORE // 2], *mx.split(more[:, MORE // 2 :], MORE // 2, axis=1)]
            logits = np.concatenate([model(half, read.cache)[0] for half in halves])
            errors = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
            largest = max(largest, errors.max())
            row = f"{length:7} {size or 'chosen':>6} {read}"
            print(f"{row} {found:15.6f} {errors.max():6.0e}", flush=True)
    return largest


def measure(lengths: list[int], room: int = ROOM) -> list[float]:
    """Compares the peak of memory with its formula; returns the ratio at each length."""
    config = Config.from_dict(long_text.CONFIG | {"num_hidden_layers": 8})
    mx.random.seed(0)
    model = pack(Model(config).eval())
    reading = Reading(config, 4, room, in_pieces=True)
    ratios = []
    print("\n tokens  chunk  cache MB  scratch MB  peak MB  formula MB")
    for length in lengths:
        cache, chunk = model.make_cache(), min(reading.most(math.inf, length), length - 16)
        held, tokens = length - chunk, mx.arange(chunk) % 50
        prefill(model, cache, tokens[:16])
        for entry in (entry for entry in cache if isinstance(entry, AttentionCache)):
            entry.keys, entry.values = (mx.zeros((1, 1, slots(length), 64)) for _ in range(2))
            entry.offset = held
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()
        mx.reset_peak_memory()
        taken = sum(entry.nbytes for entry in cache)
        weights = mx.get_active_memory() - taken
        prefill(model, cache, tokens)
        scratch = reading.scratch(chunk, held)
        formula = scratch + capacity.cache_bytes(config, length, mtp=False, itemsize=4)
        peak = mx.get_peak_memory() - weights
        ratios.append(peak / formula)
        print(
            f"{length:7} {chunk:6} {taken / 1e6:9.1f} {scratch / 1e6:11.1f} {peak / 1e6:8.1f} "
            f"{formula / 1e6:11.1f} {peak / formula:5.2f}",
            flush=True,
        )
    return ratios


def computed() -> None:
    """Prints the chunks of the 80B model, as computed."""
    config = Config.from_dict(shapes.config("80b", shapes.FULL))
    size = shapes.size_of("80b", shapes.FULL)
    print("the 80B model at 4 bits in bfloat16, a chunk alone (2 s) and beside streams (0.5 s)\n")
    head = f"{'':7} {'tokens':>7} {'alone':>6} {'beside':>6} {'10^12':>6} {'10^12 a layer':>13}"
    print(f"{head} {'scratch GB':>10} {'cache GB':>8}")
    for chip, rate in RATES.items():
        reading = Reading(config, 2, MOST_ROOM, in_pieces=False)
        for held in (0, *LENGTHS):
            alone, beside = (
                reading.most(MARGIN * seconds * rate * 1e12, held)
                for seconds in (PATIENCE, MAX_STALL)
            )
            work = reading.multiply_adds(alone, held)
            pairs = alone * (held + alone / 2) * 2 * config.num_attention_heads * config.head_dim
            layer = pairs + reading.multiply_adds(alone, 0) / shapes.FULL
            cache = capacity.cache_bytes(config, held + alone, mtp=False, itemsize=2)
            print(
                f"{chip:7} {held:7} {alone:6} {beside:6} {work / 1e12:6.2f} {layer / 1e12:13.3f} "
                f"{reading.scratch(alone, held) / 1e9:10.2f} {cache / 1e9:8.2f}"
            )
    print(
        f"\na chunk reads the weights once, {size / 1e9:.1f} GB, and the cache of the text so far"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 512])
    parser.add_argument("--computed", action="store_true")
    args = parser.parse_args()
    if args.computed:
        computed()
        return 0
    with tempfile.TemporaryDirectory() as directory:
        error = check(Path(directory), args.lengths, args.sizes)
    measure(args.lengths)
    return int(error > BOUND)


if __name__ == "__main__":
    sys.exit(main())
