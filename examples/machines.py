"""Computes memory, messages and time a token of the 80B model at 4 bits on several machines.

    python examples/machines.py [--context N] [--link GB/S] [--latency µS] [--bandwidth GB/S]

Nothing here is measured. A token takes

    bytes read / memory bandwidth + bytes sent / link + messages x latency

Messages go around a ring of n machines. A sum of N bytes takes 2 (n - 1) messages of N / n, one
after the other. A gathering of P bytes from each machine takes n - 1 messages of P. Kernel
launches are not counted (docs/figures.md has them).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.bench.traffic import traffic
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.sharding import Mode, Shard, split_layers
from mlx_qwen3next.storage.safetensors import Tensor

MACHINES = (1, 2, 4, 8)
MODES: tuple[Mode, ...] = ("tensor", "pipeline")
BFLOAT16, TOKEN = 2, 4  # bytes of an activation, and of the chosen token that rank 0 sends


@dataclass(frozen=True)
class Division:
    """The cost of one way to divide a model; lists have one entry for each rank."""

    held: list[int]  # bytes of weights and cache
    sent: list[int]  # bytes a token, the chosen token included
    messages: int  # messages a token that go one after the other
    read: int  # bytes a token that are read one after the other


def divide(
    config: Config, tensors: Mapping[str, Tensor], size: int, mode: Mode, context: int
) -> Division:
    """Divides a model evenly among ``size`` machines, with ``context`` tokens in the cache.

    Raises:
        ValueError: the model does not divide that way.
    """
    layers = split_layers(config.num_hidden_layers, [1] * size)
    parts = [Shard(config, rank, size, mode, layers[rank]) for rank in range(size)]
    weights = [own(tensors, part) for part in parts]
    held = [
        sum(tensor.nbytes for tensor in some.values())
        + capacity.cache_bytes(part.own_config(), context, mtp=True, itemsize=BFLOAT16)
        for part, some in zip(parts, weights, strict=True)
    ]
    # In a pipeline the machines read one after the other, in the other modes at the same time.
    at_once = (weights[0], parts[0].own_config()) if mode != "pipeline" else (tensors, config)
    read = traffic(*at_once, BFLOAT16).plain(context)
    sent = [n + _sum(size, TOKEN) for n in sent_a_step(config, size, mode, itemsize=BFLOAT16)]
    return Division(held, sent, messages_a_step(config, size, mode) + 2 * (size - 1), read)


def own(tensors: Mapping[str, Tensor], part: Shard) -> dict[str, Tensor]:
    """The tensors of one rank, by their paths in the whole model."""
    result = {}
    for path, tensor in tensors.items():
        if part.has(path):
            index = part.index(path, tensor.shape)
            whole = np.broadcast_to(np.empty((), np.bool_), tensor.shape)  # takes no memory
            shape = tensor.shape if index is None else whole[index].shape
            result[path] = replace(tensor, shape=shape)
    return result


def sent_a_step(
    config: Config, size: int, mode: Mode, *, itemsize: int, rows: int = 1
) -> list[int]:
    """The bytes that each rank sends for one forward of ``rows`` tokens with logits.

    The true number differs by a few bytes if the ranks do not divide a sum evenly.

    Args:
        itemsize: bytes of an activation.
    """
    hidden = rows * config.hidden_size * itemsize
    total = _sum(size, hidden)
    if mode == "pipeline":
        return [total + hidden] * (size - 1) + [total]
    logits = rows * (config.vocab_size // size) * itemsize
    return [(1 + 2 * config.num_hidden_layers) * total + (size - 1) * logits] * size


def messages_a_step(config: Config, size: int, mode: Mode) -> int:
    """The messages of one forward with logits that go one after the other."""
    if mode == "pipeline":
        return 3 * (size - 1)  # size - 1 sends and one sum
    return (1 + 2 * config.num_hidden_layers) * 2 * (size - 1) + size - 1


def _sum(size: int, nbytes: int) -> int:
    """The bytes that each rank sends for a sum of ``nbytes``."""
    return 2 * (size - 1) * nbytes // size


def seconds(division: Division, bandwidth: float, link: float, latency: float) -> float:
    """The seconds a token.

    Args:
        bandwidth: of memory, in bytes a second.
        link: between two machines, in bytes a second.
        latency: of a message, in seconds.
    """
    # All ranks wait while one rank sends more bytes than the last rank does.
    last = division.sent[-1]
    wire = last + sum(n - last for n in division.sent)
    return division.read / bandwidth + wire / link + division.messages * latency


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--context", type=int, default=32768, metavar="N", help="tokens in the cache (%(default)s)")
    add("--link", type=float, default=5, metavar="GB/S", help="of a link, each way (%(default)s)")
    add("--latency", type=float, default=50, metavar="µS", help="of a message (%(default)s)")
    add("--bandwidth", type=float, default=800, metavar="GB/S", help="of memory (%(default)s)")
    args = parser.parse_args()
    if not math.inf > min(args.link, args.bandwidth) > 0 <= args.latency or args.context < 1:
        parser.error("--context, --link and --bandwidth must be positive, --latency at least 0")

    config = Config.from_dict(shapes.config("80b", shapes.FULL))
    tensors = shapes.headers("80b", shapes.FULL)
    print(f"the 80B model at 4 bits, {args.context} tokens of context; computed, not measured")
    print(f"{'machines':>8} {'mode':9} {'GB on the fullest':>17} {'KB sent':>8}", end="")
    print(f" {'messages':>8} {'ms a token':>10}")
    for size in MACHINES:
        for mode in MODES if size > 1 else MODES[:1]:
            d = divide(config, tensors, size, mode, args.context)
            time = seconds(d, args.bandwidth * 1e9, args.link * 1e9, args.latency / 1e6)
            print(f"{size:8} {mode:9} {max(d.held) / 1e9:17.1f} {max(d.sent) / 1e3:8.1f}", end="")
            print(f" {d.messages:8} {1e3 * time:10.2f}")


if __name__ == "__main__":
    main()
