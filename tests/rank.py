"""What a rank does in the tests: loads models with its group, runs them, reports.

Argument: a JSON file with a list of cases; the report, ``rank<N>.json``, is written beside it.
"""

import faulthandler
import json
import os
import socket
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_qwen3next.generation import generate_step
from mlx_qwen3next.group import join
from mlx_qwen3next.load import load_model

HANGS = 15  # seconds


def sent():
    """Bytes that this process has sent over TCP to its neighbours, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as peer:
                info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        total += struct.unpack_from("Q", info, 200)[0]  # tcpi_bytes_sent
    return total


def run(group, case):
    model = load_model(
        case["model"],
        dtype=mx.float32,
        group=group,
        mode=case.get("mode"),
        layers=case.get("layers"),
        pack=case.get("pack", True),
    )
    leaves = tree_flatten(model.parameters())
    report = {"bytes": sum(array.nbytes for _, array in leaves)}
    prompt = case["prompt"]
    cache = model.make_cache()
    rows = [model(mx.array(prompt[:-2])[None], cache)]
    rows += [model(mx.array([[token]]), cache) for token in prompt[-2:]]
    logits = mx.concatenate(rows, axis=1)[0]
    mx.eval(logits)
    np.save(Path(sys.argv[1]).parent / f"{case['name']}-{group.rank}.npy", np.array(logits))
    report["generated"] = {}
    for depth in case.get("depths", ["off"]):
        steps = list(
            generate_step(prompt, model, max_tokens=case["tokens"], mtp=depth, **case["sampling"])
        )
        report["generated"][str(depth)] = [
            [step.token for step in steps],
            [step.from_draft for step in steps],
        ]
    if case.get("traffic"):
        cache = model.make_cache()
        token = mx.array([[1]])
        mx.eval(model(token, cache), [c.state for c in cache])
        group.gather("before", None)
        before = sent()
        mx.eval(model(token, cache), [c.state for c in cache])
        report["sent"] = sent() - before
        group.gather("after", None)
    return report


def main():
    file = Path(sys.argv[1])
    faulthandler.dump_traceback_later(HANGS, exit=True)
    with join() as group:
        reports = {case["name"]: run(group, case) for case in json.loads(file.read_text())}
        (file.parent / f"rank{group.rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
