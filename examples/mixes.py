"""Computes memory, bytes and launches a token of the 80B model at several mixes of bits.

    python examples/mixes.py

Nothing here is measured. Bytes are those of the weights in the model's shapes, in groups of 64, and
of the caches (mlx_qwen3next/bench/traffic.py); launches are counted in the graph of a decoding step
with kernels (examples/launches.py). The routers have 8 bits everywhere.
"""

from functools import partial

import launches

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.bench.on_metal import ours
from mlx_qwen3next.bench.traffic import traffic
from mlx_qwen3next.model import layouts
from mlx_qwen3next.model.config import Config

CONTEXT = 1024
# Bits of the experts, and of all else.
MIXES = [
    *((n, n) for n in (2, 3, 4, 5, 6, 8)),
    *((n, dense) for dense in (6, 8) for n in (2, 3, 4)),
]


def bits_of(path: str, experts: int, dense: int) -> int:
    """The bits of a module in the mix."""
    if layouts.is_router(path):
        return shapes.ROUTER_BITS
    return experts if ".switch_mlp." in path else dense


def main() -> None:
    """Prints the table."""
    config = Config.from_dict(shapes.config("80b", shapes.FULL))
    print("| experts | all else | GB in memory | GB a token | launches a token |")
    print("| --- | --- | --- | --- | --- |")
    for experts, dense in MIXES:
        bits = partial(bits_of, experts=experts, dense=dense)
        tensors = shapes.headers("80b", shapes.FULL, bits)
        memory = sum(tensor.nbytes for tensor in tensors.values())
        moved = traffic(tensors, config, itemsize=2).plain(CONTEXT)
        make = partial(ours, bits=bits)
        first = launches.step(make(shapes.PERIOD), 1, kernels=True, speculating=False)
        more = launches.per_period(make, 1, kernels=True)
        queued = first.total() + (shapes.FULL // shapes.PERIOD - 1) * more.total()
        print(f"| {experts} | {dense} | {memory / 1e9:.1f} | {moved / 1e9:.2f} | {queued} |")


if __name__ == "__main__":
    main()
