"""Runs a model of the 80B shape on a machine that cannot hold it: its experts stay on disk.

Random 4-bit weights in the published shapes are written to a folder, 45 GB for all 48 layers, and
deleted at the end. Random routers want all experts alike, which is the worst case: a trained
model's wants some of them far more often. Nothing else should run on the machine meanwhile::

    python examples/whole_model.py --experts-in-memory 12
    python examples/whole_model.py --layers 4 --experts-in-memory 1    # a trial
"""

import argparse
import math
import resource
import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen3next import generate_step, load_model
from mlx_qwen3next.bench import shapes
from mlx_qwen3next.cli import count, guarded
from mlx_qwen3next.decoding.queueing import limit_cache
from mlx_qwen3next.decoding.sequence import prefill
from mlx_qwen3next.model.streamed import read_ahead
from mlx_qwen3next.storage.replacing import PARTIAL

GB = 1e9
FEW = 8  # tokens before those that are decoded


def write(folder: Path, layers: int) -> None:
    """Writes the model beside the folder, and gives it the folder's name once it is whole."""
    if folder.exists():
        print(f"{folder} is there already")
        return
    beside = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    start = time.perf_counter()
    shapes.write(beside, "80b", layers)
    beside.rename(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"written: {size / GB:.1f} GB in {time.perf_counter() - start:.0f} s")


def measured(model, what: str, run) -> None:
    """Runs something, and prints its time and what was read for it."""
    model.streamed.news()
    start, working = time.perf_counter(), time.process_time()
    tokens = run()
    seconds, working = time.perf_counter() - start, time.process_time() - working
    print(
        f"{what}: {seconds:.1f} s, {seconds / tokens:.3f} s a token ({working / tokens:.3f} s of "
        f"processors); {model.streamed.news()}",
        flush=True,
    )


def run(args: argparse.Namespace) -> None:
    """Loads, reads a prompt, decodes, and prints the figures."""
    start, context = time.perf_counter(), max(args.prompt, args.tokens + FEW)
    model = load_model(args.folder, context=context, experts_in_memory=args.experts_in_memory)
    limit_cache()
    seconds, loading = time.perf_counter() - start, mx.get_peak_memory()
    mx.reset_peak_memory()
    if model.streamed is None:
        raise ValueError("all experts fit: give less memory")
    plan = model.streamed.plan
    print(f"loaded in {seconds:.1f} s: {plan}", flush=True)
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.args.vocab_size, max(args.prompt, FEW))

    def read() -> int:
        prefill(model, model.make_cache(), mx.array(tokens[: args.prompt]))
        return args.prompt

    def decode() -> int:
        options = {"mtp": "off", "lookup": "off"}
        for _ in generate_step(tokens[:FEW], model, max_tokens=args.tokens, **options):
            pass
        return args.tokens

    measured(model, f"prompt of {args.prompt} tokens", read)
    read_ahead.BLOCK = math.inf  # each way stays until it is changed here
    for is_on, way in ((False, "without"), (True, "with")):
        model.streamed.ahead.is_on = is_on
        measured(model, f"{args.tokens} tokens decoded after {FEW}, {way} reading ahead", decode)
    uniform = plan.layers * plan.wanted * plan.nbytes * (1 - plan.size / plan.experts)
    print(
        f"by the formula: {uniform / GB:.3f} GB a token where all experts are wanted alike, "
        f"{uniform / plan.rate:.2f} s to read; {plan.bytes_a_token / GB:.3f} GB of a trained model"
    )
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        f"memory: planned {plan.total / GB:.2f} GB; most of MLX {loading / GB:.2f} GB while "
        f"loading, {mx.get_peak_memory() / GB:.2f} GB since; most of the process {peak / GB:.2f} GB"
        f"{swapped()}"
    )


def swapped() -> str:
    """The process's swapped memory, where the system tells it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return "".join(f", swapped {line.split()[1]} kB" for line in lines if "VmSwap" in line)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=count, default=shapes.FULL, metavar="N")
    parser.add_argument("--experts-in-memory", type=float, default=12.0, metavar="GB")
    parser.add_argument("--prompt", type=count, default=512, metavar="TOKENS")
    parser.add_argument("--tokens", type=count, default=32, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path("build/whole_model"), metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="leave the folder at the end")
    args = parser.parse_args()

    def command() -> None:
        try:
            write(args.folder, args.layers)
            run(args)
        finally:
            if not args.keep:
                shutil.rmtree(args.folder, ignore_errors=True)
            shutil.rmtree(args.folder.with_name(args.folder.name + PARTIAL), ignore_errors=True)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
