"""Runs a conversion again and again, each time killed at a random moment, until one finishes.

    python tests/killed.py SOURCE TARGET KILLS SECONDS SEED

Each run is a process of its own, killed (SIGKILL) within SECONDS of its start; after KILLS of them
one may finish. A run that finishes too early is made to start from nothing again. Prints, as JSON,
how many pieces were done at each kill. The pieces are small here, so that there are many.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx_qwen3next.convert.weights as weights
from mlx_qwen3next.convert import convert


def run(source: str, target: str) -> int:
    """A process that converts; forked before MLX has threads."""
    child = os.fork()
    if child == 0:
        weights._CHUNK, weights._BATCH, weights._RECORD_SECONDS = 2**10, 4, 0.0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        convert(source, target, quantize=True, q_group_size=32)
        os._exit(0)
    return child


def main() -> None:
    source, target, kills, seconds, seed = sys.argv[1:]
    moments = random.Random(int(seed))
    progress = Path(f"{target}.partial/progress.json")
    done: list[int | None] = []
    while len(done) < int(kills):
        child = run(source, target)
        time.sleep(moments.uniform(0, float(seconds)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            shutil.rmtree(target)
        else:
            done.append(json.loads(progress.read_text())["done"] if progress.exists() else None)
    _, status = os.waitpid(run(source, target), 0)
    print(json.dumps({"done": done, "status": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main()
