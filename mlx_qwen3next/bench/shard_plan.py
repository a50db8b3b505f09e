"""What dividing a model among machines takes: computed from its config, nothing of it is run.

Messages go around a ring of n ranks: a sum of N bytes in 2 (n - 1) messages of N / n, one after the
other; n - 1 messages of P bytes, where everyone gets the P bytes of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import checkpoint, memory, mtp, shards
from ..config import Config
from ..model import Model
from ..sharding import Mode, Shard, split_layers
from .shapes import GROUP, ROUTER_BITS
from .traffic import traffic

MODES: tuple[Mode, ...] = get_args(Mode)
RATES = {"link": 5.0, "latency": 50.0, "memory_bandwidth": 800.0}  # GB/s, µs a message, GB/s
ITEM, TOKEN = 2, 4  # bytes of an activation (bfloat16) and of a chosen token, which rank 0 tells
MACS = (24, 36, 48, 64, 96, 128, 192, 256, 512)  # GB of memory as they are sold, 2**30 bytes
KEPT = 0.75  # of which macOS lets the GPU keep about so much

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

Tensors = Mapping[str, shards.Tensor]  # a model's parameters as they are held, by path
Quantization = Callable[[str, nn.Module], bool | dict[str, Any]]  # as nn.quantize takes it


@dataclass(frozen=True)
class Division:
    """What one way to divide a model takes; lists have an entry a rank."""

    layers: list[int]  # of a pipeline
    held: list[int]  # bytes of weights and cache
    sent: list[int]  # bytes a token, the chosen one included
    messages: int  # a token, one after the other
    read: float  # bytes a token, by those who are not at work at the same time
    seconds: list[float]  # a token: reading, the link's bandwidth, its latency


def quantized(quantization: Mapping[str, Any]) -> Quantization:
    """What config.json's ``quantization`` says; 8 bits for the routers it does not name."""
    router = {"group_size": GROUP, "bits": ROUTER_BITS}
    base = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        how = quantization.get(path, router if checkpoint.is_router(path) else base)
        how = base if how is True else how
        fits = hasattr(module, "to_quantized") and how
        return how if fits and module.weight.shape[-1] % how["group_size"] == 0 else False

    return choose


def parameters(config: Config, quantization: Quantization, head: bool = True) -> Tensors:
    """The parameters of a whole bfloat16 model, with an MTP head or without.

    Raises:
        ValueError: MLX knows no such arrays or quantization.
    """
    try:
        model = Model(config)
        if head:
            mtp.attach(model)
        nn.quantize(model, class_predicate=quantization)
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"MLX has no such arrays as the config asks for: {error}") from None
    leaves: Any = tree_flatten(model.parameters())  # never evaluated
    result = {}
    for path, array in leaves:
        dtype = mx.float32 if checkpoint.is_float32(path) else mx.bfloat16
        dtype = dtype if mx.issubdtype(array.dtype, mx.floating) else array.dtype
        result[path] = shards.Tensor(Path(), shards.NAMES[dtype], tuple(array.shape))
    return result


def own(tensors: Tensors, part: Shard) -> Tensors:
    """A rank's parameters, by the whole model's paths.

    Raises:
        ValueError: the model does not divide that way.
    """
    result = {}
    known: dict[Any, shards.Tensor] = {}  # layers are alike
    for path, tensor in tensors.items():
        layer = _LAYER.match(path)
        kind = path[layer.end() :] if layer else path, tensor.dtype, tensor.shape
        if not part.has(path):
            continue
        if kind not in known:
            index = part.index(path, tensor.shape)
            whole = np.broadcast_to(np.empty((), np.bool_), tensor.shape)  # takes no memory
            shape = tensor.shape if index is None else whole[index].shape
            known[kind] = replace(tensor, shape=shape)
        result[path] = known[kind]
    return result


def divide(
    config: Config,
    tensors: Tensors,
    size: int,
    mode: Mode,
    context: int,
    rates: Mapping[str, float] = RATES,
) -> Division:
    """What a division takes, with so many tokens in the cache.

    Raises:
        ValueError: the model does not divide that way.
    """
    layers = [range(0)] * size
    if mode == "pipeline":
        layers = split_layers(config.num_hidden_layers, [1] * size)
    parts = [Shard(config, rank, size, mode, layers[rank]) for rank in range(size)]
    weights = [own(tensors, part) for part in parts]
    head = any(map(checkpoint.is_mtp, tensors))
    held = [
        sum(tensor.nbytes for tensor in some.values())
        + memory.cache_bytes(part.own_config(), context, mtp=head, itemsize=ITEM)
        for part, some in zip(parts, weights, strict=True)
    ]
    if mode == "pipeline":  # one after the other they read it all
        read: float = traffic(tensors, config, ITEM).plain(context)
    else:  # rank 0 has as much as any other, and the shared expert
        read = traffic(weights[0], parts[0].own_config(), ITEM).plain(context)
    if mode == "expert" and size > 1 and config.num_experts:
        # traffic counts a rank's mean of a token's experts, but the others wait for the busiest.
        experts = {path: tensor for path, tensor in weights[0].items() if ".switch_mlp." in path}
        more = busiest(config, size) / (config.num_experts_per_tok / size) - 1
        read += more * traffic(experts, config, ITEM).trunk
    sent = [n + _all_sum(size, TOKEN) for n in sent_a_step(config, size, mode, itemsize=ITEM)]
    # What a rank sends beyond the last one, that one and all others wait for.
    wire = sent[-1] + sum(n - sent[-1] for n in sent)
    messages = messages_a_step(config, size, mode) + 2 * (size - 1)
    link, memory_bandwidth = rates["link"] * 1e9, rates["memory_bandwidth"] * 1e9
    seconds = [read / memory_bandwidth, wire / link, messages * rates["latency"] / 1e6]
    return Division([*map(len, layers)], held, sent, messages, read, seconds)


def busiest(config: Config, size: int) -> float:
    """Experts that the busiest of the ranks reads for a token in a layer; of random choices."""
    each, chosen = [config.num_experts // size] * size, config.num_experts_per_tok
    choices = np.random.default_rng(0).multivariate_hypergeometric(each, chosen, 10_000)
    # Its first one stands for those that it has not (ops.only_own).
    return float(np.minimum(choices.max(axis=1) + 1, chosen).mean())


def sent_a_step(
    config: Config, size: int, mode: Mode, *, itemsize: int, rows: int = 1
) -> list[int]:
    """Bytes that each rank sends for one forward of ``rows`` tokens with logits, over a ring.

    A few more or less where the ranks do not divide a sum evenly.

    Args:
        itemsize: bytes of an activation.
    """
    hidden = rows * config.hidden_size * itemsize
    total = _all_sum(size, hidden)
    if mode == "pipeline":
        return [total + hidden] * (size - 1) + [total]
    logits = rows * (config.vocab_size // size) * itemsize
    return [(1 + 2 * config.num_hidden_layers) * total + (size - 1) * logits] * size


def messages_a_step(config: Config, size: int, mode: Mode) -> int:
    """Messages of one forward with logits, those that go one after the other."""
    if mode == "pipeline":
        return 3 * (size - 1)  # size - 1 sends and one sum
    return (1 + 2 * config.num_hidden_layers) * 2 * (size - 1) + size - 1


def _all_sum(size: int, nbytes: int) -> int:
    """Bytes that each rank sends for a sum of so many."""
    return 2 * (size - 1) * nbytes // size


def smallest_mac(nbytes: int) -> int | None:
    """GB of memory, as they are sold, of the smallest Mac that can hold it; None if none can."""
    return next((gb for gb in MACS if nbytes <= gb * 2**30 * KEPT), None)
