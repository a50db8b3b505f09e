"""The part of a model that each rank of a group has: heads, channels, experts, or whole layers.

There are three modes, after Shoeybi et al. 2019, "Megatron-LM", and Huang et al. 2019, "GPipe":

- ``tensor``: every layer is divided by heads, and its experts (the shared one too) by intermediate
  channels; one sum over the ranks follows each mixer and each MLP.
- ``expert``: like ``tensor``, but experts stay whole; the shared one is rank 0's. The sums are the
  same, so the traffic is the same, but the work is divided less evenly.
- ``pipeline``: each rank has whole layers, by its machine's memory; one message a rank and step.

In the first two modes the embedding and the output are divided by vocabulary; in a pipeline every
rank has them, and the MTP head. A key head stays with its value heads, and keys and values stay
with their queries; where there are fewer of them than ranks, several ranks have the same.
:mod:`mlx_qwen3next.model.parallel` has the modules that run such parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from ..group import Group
from . import capacity
from .config import Config

Mode = Literal["tensor", "expert", "pipeline"]
Index = tuple[Any, ...]  # as an array's [] takes it

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model.

    Raises:
        ValueError: on use, if the model does not divide among so many ranks.
    """

    config: Config  # the whole model's
    rank: int = 0
    size: int = 1
    mode: Mode = "tensor"
    layers: range = range(0)  # this rank's in a pipeline

    def whole_path(self, path: str) -> str:
        """Returns the whole model's path of a parameter of this rank."""
        match = _LAYER.match(path)
        if self.mode != "pipeline" or match is None:
            return path
        return f"model.layers.{int(match[1]) + self.layers.start}.{path[match.end() :]}"

    @property
    def has_shared_expert(self) -> bool:
        """Whether this rank has (a part of) the shared expert: whole, it is rank 0's."""
        return self.mode != "expert" or self.rank == 0

    def has(self, path: str) -> bool:
        """Returns whether this rank has any elements of one of the whole model's parameters."""
        if self.mode == "pipeline" and (layer := _LAYER.match(path)):
            return int(layer[1]) in self.layers
        return self.has_shared_expert or ".shared_expert" not in path

    def index(self, path: str, shape: Sequence[int]) -> Index | None:
        """Returns the index of this rank's elements of a parameter; None stands for all.

        Args:
            path, shape: the parameter's in the whole model, quantized or not.
        """
        if self.size == 1 or self.mode == "pipeline":
            return None
        split = self._split(path)
        if split is None:
            return None
        axis, chosen, total = split
        if axis >= 0:
            return (slice(None),) * axis + (_as_slice(chosen),)
        # Along the inputs, elements may be words of several, or stand for a group of them.
        first, last = (int(n) * shape[-1] for n in (chosen[0], chosen[-1] + 1))
        if first % total or last % total:
            module, width = path.rsplit(".", 1)[0], total // shape[-1]
            raise ValueError(
                f"{module} cannot be divided among {self.size} ranks: {len(chosen)} of its {total} "
                f"inputs for each would cut through its quantization groups or words of {width}"
            )
        return (..., slice(first // total, last // total))

    def _split(self, path: str) -> tuple[int, np.ndarray, int] | None:
        """Returns the axis (-1: the inputs), the indices along it, and their number in all."""
        c, (module, leaf) = self.config, path.rsplit(".", 1)
        name = module.rsplit(".", 1)[-1]
        is_weight = leaf != "global_scale"  # which belongs to a whole matrix
        if ".linear_attn" in module:
            return self._split_linear(name, leaf)
        if ".self_attn" in module and name in ("q_proj", "o_proj"):
            width = c.head_dim * (2 if name == "q_proj" else 1)
            rows = _blocks(self.heads, width)
            return (0 if name == "q_proj" else -1), rows, width * c.num_attention_heads
        if ".self_attn" in module and name in ("k_proj", "v_proj"):
            rows = _blocks(self.kv_heads, c.head_dim)
            return 0, rows, c.head_dim * c.num_key_value_heads
        if ".switch_mlp" in module and self.mode == "expert":
            return 0, _blocks(self.experts), c.num_experts
        if name in ("gate_proj", "up_proj", "down_proj") and is_weight:
            width, of_all = c.intermediate_size, 0
            if ".switch_mlp" in module:
                width, of_all = c.moe_intermediate_size, 1
            elif ".shared_expert" in module:
                if self.mode == "expert":
                    return None
                width = c.shared_expert_intermediate_size
            channels = _blocks(self._even(width, "intermediate channels"))
            return (-1 if name == "down_proj" else of_all), channels, width
        if name in ("embed_tokens", "lm_head"):
            return 0, _blocks(self.vocabulary), c.vocab_size
        return None

    def _split_linear(self, name: str, leaf: str) -> tuple[int, np.ndarray, int] | None:
        c = self.config
        Dk, Dv, Hk = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_key_heads
        r = c.linear_num_value_heads // Hk
        if name == "conv1d":
            keys = _blocks(self.key_heads, Dk)
            parts = keys, keys + Hk * Dk, _blocks(self.value_heads, Dv) + 2 * Hk * Dk
            return 0, np.concatenate(parts), c.linear_conv_dim
        if name == "out_proj":
            return -1, _blocks(self.value_heads, Dv), c.linear_value_dim
        if leaf in ("A_log", "dt_bias"):
            return 0, _blocks(self.value_heads), c.linear_num_value_heads
        if name not in ("in_proj_qkvz", "in_proj_ba"):
            return None
        rows: list[np.ndarray] = []
        for k in self.key_heads:  # q, k, v, z or b, a of each, as the checkpoint has them
            own = [h % r for h in self.value_heads if h // r == k]
            if name == "in_proj_ba":
                b = np.array(own) + 2 * r * k
                rows += [b, b + r]
                continue
            of_values = _blocks(own, Dv) + 2 * Dk
            start = k * (2 * Dk + 2 * r * Dv)
            rows += [start + x for x in (np.arange(2 * Dk), of_values, of_values + r * Dv)]
        total = 2 * (c.linear_key_dim + c.linear_value_dim)
        return 0, np.concatenate(rows), total if name == "in_proj_qkvz" else 2 * Hk * r

    # --- this rank's share ----------------------------------------------------------------------
    @property
    def heads(self) -> range:
        """This rank's query heads of attention."""
        return self._even(self.config.num_attention_heads, "attention heads")

    @property
    def kv_heads(self) -> range:
        """This rank's key-value heads of attention."""
        return self._shared(self.config.num_key_value_heads, "key-value heads")

    @property
    def key_heads(self) -> range:
        """This rank's key heads of the linear layers."""
        return self._shared(self.config.linear_num_key_heads, "linear key heads")

    @property
    def value_heads(self) -> range:
        """This rank's value heads of the linear layers."""
        return self._even(self.config.linear_num_value_heads, "linear value heads")

    @property
    def experts(self) -> range:
        """This rank's routed experts in ``expert`` mode."""
        return self._even(self.config.num_experts, "experts")

    @property
    def vocabulary(self) -> range:
        """The tokens whose rows of the embedding and the output this rank has."""
        return self._even(self.config.vocab_size, "tokens of the vocabulary")

    def own_config(self) -> Config:
        """Returns the config of a model that has this part alone."""
        c = self.config
        if self.mode == "pipeline":
            return replace(
                c,
                num_hidden_layers=len(self.layers),
                layer_types=tuple(c.layer_types[i] for i in self.layers),
                mlp_only_layers=tuple(
                    n for n, i in enumerate(self.layers) if not c.is_sparse(i) and c.num_experts
                ),
                decoder_sparse_step=1,
            )
        return replace(
            c,
            num_attention_heads=len(self.heads),
            num_key_value_heads=len(self.kv_heads),
            linear_num_key_heads=len(self.key_heads),
            linear_num_value_heads=len(self.value_heads),
        )

    def _even(self, count: int, what: str) -> range:
        """Returns this rank's share of ``count`` things; all ranks have equal shares."""
        if count % self.size:
            raise ValueError(f"{count} {what} cannot be divided among {self.size} ranks")
        own = count // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def _shared(self, count: int, what: str) -> range:
        """Returns the share as :meth:`_even`; ranks share a thing where there are more ranks."""
        if count % self.size and self.size % count == 0:
            own = self.rank * count // self.size
            return range(own, own + 1)
        return self._even(count, what)


def _blocks(ids: Sequence[int], width: int = 1) -> np.ndarray:
    """Returns the indices within blocks of that width."""
    return (np.array(ids)[:, None] * width + np.arange(width)).flatten()


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    first, last = int(indices[0]), int(indices[-1]) + 1
    return slice(first, last) if last - first == len(indices) else indices


def split_layers(layers: int, shares: Sequence[float]) -> list[range]:
    """Returns each rank's layers: as many as its share of the whole, at least one.

    Raises:
        ValueError: there are more ranks than layers.
    """
    if len(shares) > layers:
        raise ValueError(f"{layers} layers cannot be divided among {len(shares)} ranks")
    counts = [max(1, int(layers * m / sum(shares))) for m in shares]
    while sum(counts) != layers:  # the one that is furthest from its share
        sign = 1 if sum(counts) < layers else -1
        left = [
            sign * (layers * m / sum(shares) - n) if n + sign >= 1 else -layers
            for n, m in zip(counts, shares, strict=True)
        ]
        counts[int(np.argmax(left))] += sign
    ends = np.cumsum(counts).tolist()
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]


def take(array: mx.array, index: Index) -> mx.array:
    """Returns the elements of an index."""
    return array[tuple(mx.array(i) if isinstance(i, np.ndarray) else i for i in index)]


def plan(
    model: Any, group: Group, mode: Mode | None = None, layers: Sequence[int] | None = None
) -> Shard:
    """Returns this rank's part of a model.

    Args:
        model: a :class:`mlx_qwen3next.model.qwen3_next.Model`.
        mode: None for ``tensor``, or ``expert`` where the experts' channels do not divide.
        layers: the number of each rank's layers in a pipeline; None divides by memory.

    Raises:
        ValueError: the model does not divide that way.
    """
    config = model.args
    if mode == "pipeline":
        ranges = _ranges(config.num_hidden_layers, group, layers)
        return Shard(config, group.rank, group.size, mode, ranges[group.rank])
    if mode is None:
        downs = (m.down_proj for m in model.modules() if isinstance(m, SwitchGLU))
        of_group = max((getattr(down, "group_size", 1) for down in downs), default=1)
        uneven = config.moe_intermediate_size % (group.size * of_group)
        mode = "expert" if config.num_experts and uneven else "tensor"
    return Shard(config, group.rank, group.size, mode)


def _ranges(total: int, group: Group, layers: Sequence[int] | None) -> list[range]:
    if layers is None:
        return split_layers(total, group.gather("memory", capacity.spare()))
    if len(layers) != group.size or sum(layers) != total or min(layers) < 1:
        raise ValueError(
            f"--pipeline {','.join(map(str, layers))} must give each of {group.size} ranks a layer "
            f"or more, {total} in all"
        )
    ends = np.cumsum(layers).tolist()
    return [range(end - n, end) for n, end in zip(layers, ends, strict=True)]
