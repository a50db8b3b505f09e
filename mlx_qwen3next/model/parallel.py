"""The modules of a model that several ranks run together, which take the plain ones' places.

:mod:`mlx_qwen3next.model.sharding` says which part of the weights a rank has; :func:`divide` leaves
a model that part. A mixer or an MLP with a part of the heads or channels computes one summand of
its output, so a :class:`ParallelDecoderLayer` sums over the ranks: once after each mixer and each
MLP. A :class:`ParallelTrunk` sums the embedding's rows, and ``Model.logits`` gathers the logits. A
:class:`PipelineTrunk` takes its input from the rank before and gives its output to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..compute.experts import only_own
from ..group import Group, connected
from .cache import Cache
from .qwen3_next import DecoderLayer, Model, SparseMoE, Trunk
from .sharding import Mode, Shard, plan, take

M = TypeVar("M", bound=nn.Module)


class ParallelDecoderLayer(DecoderLayer):
    """A decoder layer whose mixer and MLP each give this rank's summand of their output."""

    group: Group

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        x = x + self.group.all_sum(self.mixer(self.input_layernorm(x), mask, cache))
        return x + self.group.all_sum(self.mlp(self.post_attention_layernorm(x)))


class ExpertParallelMoE(SparseMoE):
    """A mixture of which this rank has some whole experts; the others' are left out."""

    own: range  # the experts that are here

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return only_own(*super().route(x), self.own)


class ParallelTrunk(Trunk):
    """A trunk whose embedding has the rows of some of the tokens."""

    group: Group
    first_token: int  # the first of the tokens whose rows are here

    def embed(self, tokens: mx.array) -> mx.array:
        own = tokens.astype(mx.int32) - self.first_token
        here = (own >= 0) & (own < self.embed_tokens.weight.shape[0])
        x = super().embed(mx.where(here, own, 0))
        return self.group.all_sum(mx.where(here[..., None], x, 0))


class PipelineTrunk(Trunk):
    """A trunk with some of the layers, between those of the ranks before and after."""

    group: Group

    def run_layers(
        self,
        x: mx.array,
        cache: Cache | None = None,
        between: Callable[[int, mx.array], None] | None = None,
    ) -> mx.array:
        return self.group.from_last(super().run_layers(self.group.from_before(x), cache, between))


def recast(module: nn.Module, kind: type[M], **attributes: Any) -> M:
    """Returns a copy of another class, with the same parameters and attributes, and some more."""
    copied = kind.__new__(kind)
    vars(copied).update(vars(module), **attributes)
    dict.update(copied, module)
    return copied


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """Returns a module's own parameters, by name."""
    return {key: value for key, value in module.items() if isinstance(value, mx.array)}


def divide(
    model: Model,
    group: Group | mx.distributed.Group,
    mode: Mode | None = None,
    layers: Sequence[int] | None = None,
) -> Shard:
    """Leaves this rank's part of a model, in place; a loader reads no more than that part.

    Args:
        model: not packed.
        group: the one from :func:`mlx_qwen3next.group.join` or ``mx.distributed.init``.
        mode, layers: see :func:`mlx_qwen3next.model.sharding.plan`.

    Raises:
        ValueError: the model is packed, or does not divide among so many ranks.
    """
    model.check_unpacked("shard")
    group = connected(group)
    part = plan(model, group, mode, layers)
    if group.size > 1:
        shard(model, group, part)
    return part


def shard(model: Model, group: Group, part: Shard) -> None:
    """Leaves a model, in place, this rank's part of it; its parameters may be unset yet.

    Args:
        model: not packed.
        part: this rank's; its config is the model's.

    Raises:
        ValueError: the model does not divide among so many ranks; nothing is changed then.
    """
    config = part.own_config()
    leaves: Any = tree_flatten(model.parameters())
    indices = [(path, array, part.index(path, array.shape)) for path, array in leaves]
    own = [(path, take(array, index)) for path, array, index in indices if index is not None]
    model.load_weights(own, strict=False)
    model.args, model.group = config, group
    if part.mode == "pipeline":
        model.model = recast(model.model, PipelineTrunk, group=group)
        model.model.layers = [model.model.layers[i] for i in part.layers]
        return
    first_token = part.vocabulary.start
    model.model = recast(model.model, ParallelTrunk, group=group, first_token=first_token)
    model.vocabulary = group
    for stack in [model.model] if model.mtp is None else [model.model, model.mtp]:
        stack.layers = [_shard_layer(layer, group, part) for layer in stack.layers]


def _shard_layer(layer: DecoderLayer, group: Group, part: Shard) -> DecoderLayer:
    sharded = recast(layer, ParallelDecoderLayer, group=group)
    mixer = sharded.mixer
    if sharded.is_linear:
        mixer.Hk, mixer.Hv = len(part.key_heads), len(part.value_heads)
    else:
        mixer.nh, mixer.nkv = len(part.heads), len(part.kv_heads)
    if part.mode == "expert" and isinstance(sharded.mlp, SparseMoE):
        sharded.mlp = recast(sharded.mlp, ExpertParallelMoE, own=part.experts)
        if not part.has_shared_expert:
            del sharded.mlp["shared_expert"], sharded.mlp["shared_expert_gate"]
    return sharded
