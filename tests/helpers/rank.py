"""The program of a rank in the tests: loads models with its group, runs them, reports.

Argument: a JSON file with a list of cases; the report, ``rank<N>.json``, is written beside it, with
logits in ``<case>-<N>.npy``.
"""

import faulthandler
import gc
import json
import os
import socket
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers_speculative import Cycle
from mlx.utils import tree_flatten

from mlx_qwen3next.checkpoint.loading import load_model
from mlx_qwen3next.decoding.drafters.speculation import Speculation
from mlx_qwen3next.decoding.generation import generate_step
from mlx_qwen3next.group import ALONE, join

HANGS = 180  # seconds; then it says where
WISHES = (0, 2, 0, 0, 3, 1), (1, 0, 4)  # the depths that rank 0 would draft to; the others
SENT, SENT_AGAIN = 200, 208  # where TCP_INFO has them


def sent(group):
    """Bytes that this process has sent to its neighbours, as the kernel counts them."""
    total, decisions = 0, {peer.fileno() for peer in group.control.peers.values()}
    for name in map(int, os.listdir("/proc/self/fd")):
        try:
            if name in decisions or not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(name)) as peer:
                info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # no TCP, or closed by now
            continue
        else:
            total += struct.unpack_from("Q", info, SENT)[0]
            total -= struct.unpack_from("Q", info, SENT_AGAIN)[0]
    return total


def traffic(group, model, rows):
    """Bytes that this rank sends for one forward of so many tokens."""
    cache, tokens = model.make_cache(), mx.ones((1, rows), mx.int32)
    mx.eval(model(tokens, cache))  # with all that was left to be sent
    group.gather("all have received what came before", None)
    before = sent(group)
    mx.eval(model(tokens, cache), [c.state for c in cache])
    group.gather("all have received it", None)
    return sent(group) - before


def logits(model, prompt):
    """Reads a prompt in one piece, except its last two tokens."""
    cache = model.make_cache()
    rows = [
        model(mx.array([tokens]), cache) for tokens in (prompt[:-2], prompt[-2:-1], prompt[-1:])
    ]
    return np.array(mx.concatenate(rows, axis=1)[0])


def generate(model, prompt, tokens, depth, temp, rank=0):
    """[tokens, which were drafts]; each rank has chance and wishes of its own."""
    mx.random.seed(rank)
    if depth == "auto":
        Speculation.of(model).measured = Cycle(*WISHES[min(rank, 1)])
    steps = list(generate_step(prompt, model, max_tokens=tokens, mtp=depth, temp=temp))
    return [[step.token for step in steps], [step.from_draft for step in steps]]


def run(case, group=ALONE):
    """(report, logits) of a case; without a group, what it has to be."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    division = {name: case.get(name) for name in ("mode", "layers")} if group.size > 1 else {}
    model = load_model(case["model"], dtype=mx.float32, pack=case["pack"], group=group, **division)
    gc.collect()
    report = {
        "memory": mx.get_active_memory() - before,
        "peak": mx.get_peak_memory() - before,
        "parameters": sum(x.nbytes for _, x in tree_flatten(model.parameters())),
        "generated": [
            generate(model, case["prompt"], case["tokens"], *kind, group.rank)
            for kind in case["kinds"]
        ],
    }
    if group.size > 1:
        report["sent"] = [traffic(group, model, rows) for rows in case["traffic"]]
    return report, logits(model, case["prompt"])


def main():
    file = Path(sys.argv[1])
    faulthandler.dump_traceback_later(HANGS, exit=True)
    reports = {}
    with join() as group:
        for case in json.loads(file.read_text()):
            reports[case["name"]], values = run(case, group)
            np.save(file.parent / f"{case['name']}-{group.rank}.npy", values)
        (file.parent / f"rank{group.rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
