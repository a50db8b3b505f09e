"""Memory and time of a conversion to 4 bits beside mlx_lm.convert, on layers of the 80B model.

    python examples/conversion.py [--folder DIR] [--repeats 3]

The program makes a checkpoint in the hub's layout with the published shapes: the whole vocabulary,
one layer of each kind and the MTP layer (512 experts each; 5.6 billion random weights, 11 GB). Both
converters take turns on it, each in its own process. mlx-lm drops the MTP head, so this project's
converter runs without the head for the comparison, and a second time with it. The program prints
medians, and whether the trunks' files hold the same tensors bit for bit. It needs 18 GB in DIR
(default: a temporary folder).
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_qwen3next.bench.shapes import SHAPES
from mlx_qwen3next.checkpoint.files import INDEX_FILE
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model import layouts, mtp_head
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.storage import safetensors

# Qwen/Qwen3-Next-80B-A3B-Instruct, except for the number of layers and the attention interval.
CONFIG = SHAPES["80b"] | {"num_hidden_layers": 2, "full_attention_interval": 2}
BLOCK = 2**24  # random numbers; all tensors are cut from them


def make(folder: Path) -> Path:
    """Writes the checkpoint, one shard a layer, with the published names and shapes."""
    model = Model(Config.from_dict(CONFIG))
    mtp_head.attach(model)
    origins = layouts.origins(model.parameter_shapes(), "hub").values()
    groups: dict[str, dict[str, tuple[mx.Dtype, tuple[int, ...]]]] = {}
    for origin in origins:
        for name in origin.names:
            layer = next((i for i in range(2) if f"model.layers.{i}." in name), 2)
            group = "4" if layouts.is_mtp(name) else str(layer + 1)
            groups.setdefault(group, {})[name] = (mx.bfloat16, origin.shape)
    random = np.random.default_rng(0)
    numbers = random.standard_normal(BLOCK, np.float32) * 0.02
    numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)  # as bfloat16
    weight_map = {}
    for group, contents in tqdm(groups.items(), "making the checkpoint", unit="shard"):
        file = folder / f"model-0000{group}-of-0000{len(groups)}.safetensors"
        header, _ = safetensors.lay_out(file, contents, {"format": "pt"})
        with file.open("wb") as stream:
            stream.write(header)
            for name, (_, shape) in contents.items():
                weight_map[name] = file.name
                left = math.prod(shape)
                while left:
                    start = random.integers(BLOCK // 2)
                    part = numbers[start : start + left]
                    stream.write(part.data)
                    left -= part.size
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a module; returns its seconds and its peak resident bytes."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", script, sys.executable, "-m", *command],
        check=True,
        capture_output=True,
        text=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, int(result.stdout) * unit


def same(a: Path, b: Path) -> bool:
    """Whether the files ``model.safetensors`` of two folders hold the same tensors."""
    left, right = (mx.load(str(folder / "model.safetensors")) for folder in (a, b))
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and mx.array_equal(left[name], right[name]).item()
        for name in left
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="folder for the files")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        source = folder / "source"
        source.mkdir()
        make(source)
        ways = {
            "mlx_lm.convert (no head)": ["mlx_lm", "convert"],
            "this one, without the head": ["mlx_qwen3next.convert", "--mtp", "drop"],
            "this one, with the head": ["mlx_qwen3next.convert"],
        }
        outputs = [folder / str(i) for i in range(len(ways))]
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for (name, command), output in zip(ways.items(), outputs, strict=True):
                shutil.rmtree(output, ignore_errors=True)
                command = [*command, "--hf-path", str(source), "--mlx-path", str(output), "-q"]
                results[name].append(measure(command))
        for name, runs in results.items():
            seconds, peaks = (statistics.median(values) for values in zip(*runs, strict=True))
            print(f"{name:28} {seconds:6.1f} s {peaks / 1e9:6.2f} GB at most")
        verdict = "the same" if same(outputs[0], outputs[1]) else "NOT the same"
        print(f"the trunks' files hold {verdict}")


if __name__ == "__main__":
    main()
