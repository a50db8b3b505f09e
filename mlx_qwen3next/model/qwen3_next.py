"""Qwen3-Next's hybrid stack: three Gated DeltaNet layers, one gated attention layer, and so on.

Glossary (code / config.json)::

    B, L      batch, tokens of this call
    H         hidden_size
    nh, nkv   num_attention_heads, num_key_value_heads; hd = head_dim
    Hk, Hv    linear_num_key_heads, linear_num_value_heads; r = Hv / Hk
    Dk, Dv    linear_key_head_dim, linear_value_head_dim
    K, C      linear_conv_kernel_dim; C = 2 Hk Dk + Hv Dv channels of the convolution
    E, top_k  num_experts, num_experts_per_tok; I = moe_intermediate_size
    g         log decay of the state, gamma = exp(g);  beta  write strength;  z  output gate

Modules and parameters have the checkpoint's names, in mlx-lm's converted layout (experts stacked
in ``switch_mlp``, convolution weights ``[C, K, 1]``, norm weights with their ``+ 1``), so that
mlx-lm's tools work on the model. :mod:`mlx_qwen3next.model.gated_delta_net` has the linear layers'
mixer. Norm weights, ``A_log`` and ``dt_bias`` are float32.

Sources: transformers' ``modeling_qwen3_next.py``; Yang et al. 2024, "Gated Delta Networks"; Qiu et
al. 2025, "Gated Attention for Large Language Models".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.switch_layers import SwitchGLU

from ..compute.attention import attention_gate, attention_heads
from ..compute.cpu_attention import attention
from ..compute.experts import route
from ..compute.norms import rms_norm
from ..group import ALONE
from . import layouts
from .cache import AttentionCache, BatchAttentionCache, Cache, GatedDeltaCache
from .config import MODEL_TYPE, Config
from .gated_delta_net import GatedDeltaNet
from .quantized_kv import AttentionRows


class RMSNorm(nn.Module):
    """RMSNorm; ``weight`` is the effective one, the checkpoint's zero-centred w plus 1."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class GatedAttention(nn.Module):
    """Grouped-query attention with q/k norms, partial RoPE and a sigmoid gate on its output."""

    split_heads = staticmethod(attention_heads)
    gate = staticmethod(attention_gate)

    def __init__(self, config: Config):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.nh, self.nkv = config.num_attention_heads, config.num_key_value_heads
        self.hd = config.head_dim
        self.q_proj = nn.Linear(H, 2 * self.nh * self.hd, bias=False)
        self.k_proj = nn.Linear(H, self.nkv * self.hd, bias=False)
        self.v_proj = nn.Linear(H, self.nkv * self.hd, bias=False)
        self.o_proj = nn.Linear(self.nh * self.hd, H, bias=False)
        self.q_norm = RMSNorm(self.hd, eps)
        self.k_norm = RMSNorm(self.hd, eps)
        self.rope = config.rope

    def project(self, x: mx.array) -> mx.array:
        """Returns ``[q | k | v | gate]``, head after head, ``[B, L, (2 nh + 2 nkv) hd]``."""
        return self.arrange(self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def arrange(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Returns the projections' results, or their rows, with the gates last.

        Args:
            q: ``[..., 2 nh hd]``, per head q hd, gate hd. k, v: ``[..., nkv hd]``.
        """
        shape = q.shape[:-1]
        q, gate = mx.split(q.reshape(*shape, self.nh, -1), 2, axis=-1)
        parts = [q.reshape(*shape, -1), k, v, gate.reshape(*shape, -1)]
        return mx.concatenate(parts, axis=-1)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        """Returns ``[B, L, H]``, as ``x``; the mask is mlx-lm's (None, "causal" or an array)."""
        row, q, k, v = self.heads(x, 0 if cache is None else cache.offset)
        return self.output(self.attend(q, k, v, mask, cache), row)

    def heads(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, ...]:
        """Returns :meth:`project`'s rows; q ``[B, nh, L, hd]``; k and v ``[B, nkv, L, hd]``.

        Args:
            offset: the position of the first token, one or ``[B]``.
        """
        row = self.project(x)
        q, k, v = self.split_heads(
            *(row, self.q_norm.weight, self.k_norm.weight, offset),
            eps=self.q_norm.eps,
            heads=self.nh,
            kv_heads=self.nkv,
            rope=self.rope,
        )
        return row, q, k, v

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        """Returns attention's output ``[B, nh, L, hd]``; the cache takes the keys and values."""
        if isinstance(cache, AttentionRows):
            rows = enumerate(cache.ready())
            one = [(q[i : i + 1], k[i : i + 1], v[i : i + 1], row) for i, row in rows]
            return mx.concatenate([self.attend(q, k, v, mask, row) for q, k, v, row in one])
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return attention(q, k, v, scale=self.hd**-0.5, mask=mask, cache=cache)

    def output(self, o: mx.array, row: mx.array) -> mx.array:
        """Returns ``[B, L, H]``: the gated and projected output of :meth:`attend`."""
        return self.o_proj(self.gate(o, row, kv_heads=self.nkv))


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate x) up x)``."""

    def __init__(self, dims: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, width, bias=False)
        self.up_proj = nn.Linear(dims, width, bias=False)
        self.down_proj = nn.Linear(width, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class SparseMoE(nn.Module):
    """The top k of E experts by a softmax router, plus one shared expert behind a sigmoid gate."""

    def __init__(self, config: Config):
        super().__init__()
        H, E, I = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.num_experts = E
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(H, E, bias=False)
        self.switch_mlp = SwitchGLU(H, I, E)
        self.shared_expert = MLP(H, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(H, 1, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = self.route(x)
        y = self.switch_mlp(x, experts)  # [B, L, top_k, H]
        y = (y * weights[..., None].astype(y.dtype)).sum(axis=-2)
        if "shared_expert" in self:
            y = y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Returns the experts of each token and their weights, each ``[B, L, top_k]``."""
        return route(self.gate(x), self.top_k, self.norm_topk_prob)


class DecoderLayer(nn.Module):
    """A token mixer (linear or full attention), then an MLP (sparse or dense), each residual."""

    def __init__(self, config: Config, *, linear: bool, sparse: bool):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.is_linear = linear
        if linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = SparseMoE(config) if sparse else MLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any | None = None) -> mx.array:
        x = x + self.mixer(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    @property
    def mixer(self) -> Any:
        """The token mixer, whichever it is."""
        return self.linear_attn if self.is_linear else self.self_attn


class Trunk(nn.Module):
    """Embedding, the decoder layers and the final norm: tokens to hidden states."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            DecoderLayer(config, linear=config.is_linear(i), sparse=config.is_sparse(i))
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        between: Callable[[int, mx.array], None] | None = None,
    ) -> mx.array:
        """Turns tokens ``[B, L]`` into hidden states ``[B, L, H]`` after the final norm.

        ``between`` is called with the number and the output of every layer that another follows.
        """
        return self.norm(self.run_layers(self.embed(tokens), cache, between))

    def embed(self, tokens: mx.array) -> mx.array:
        """Turns tokens ``[B, L]`` into their embeddings ``[B, L, H]``."""
        return self.embed_tokens(tokens)

    def run_layers(
        self,
        x: mx.array,
        cache: Cache | None = None,
        between: Callable[[int, mx.array], None] | None = None,
    ) -> mx.array:
        """Runs one layer after the other; ``x`` and the result are ``[B, L, H]``."""
        caches = [None] * len(self.layers) if cache is None else cache
        are_linear = [layer.is_linear for layer in self.layers]
        firsts = (
            caches[are_linear.index(kind)] if kind in are_linear else None for kind in (True, False)
        )
        linear_mask, attention_mask = masks(x, *firsts)
        for i, (layer, c) in enumerate(zip(self.layers, caches, strict=True)):
            if between is not None and i > 0:
                between(i - 1, x)
            x = layer(x, linear_mask if layer.is_linear else attention_mask, c)
        return x


def masks(x: mx.array, linear: Any, full: Any) -> tuple[mx.array | None, Any]:
    """Returns the mask of all linear layers, and that of all attention layers.

    ``linear`` and ``full`` are the cache entries of the first such layers, or None.
    """
    linear_mask = None if linear is None else linear.make_mask(x.shape[1])
    return linear_mask, create_attention_mask(x, full)


class Model(nn.Module):
    """A Qwen3-Next causal language model, which mlx-lm's tools take.

    ``mtp`` is the multi-token-prediction head (:class:`mlx_qwen3next.model.mtp_head.MTPHead`) or
    None, ``dflash`` a block drafter (:class:`mlx_qwen3next.model.dflash.DFlash`) or None, which is
    used instead. The latter's parameters are not the model's.
    """

    dflash: Any = None

    packed = False  # whether mlx_qwen3next.model.packed.packing has packed it for inference
    streamed: Any = (
        None  # mlx_qwen3next.model.streamed.experts.StreamedExperts if experts stay on disk
    )
    group = ALONE  # the processes that run this model together
    vocabulary = ALONE  # the group whose ranks each compute the logits of some tokens

    def __init__(self, config: Config):
        super().__init__()
        self.args = config
        self.model_type = MODEL_TYPE
        self.mtp: Any = None
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """Turns tokens ``[B, L]`` int into logits ``[B, L, vocab]``; the cache advances by L."""
        return self.logits(self.model(tokens, cache))

    def logits(self, hidden: mx.array) -> mx.array:
        """Turns hidden states ``[..., H]``, after the final norm, into logits ``[..., vocab]``."""
        tied = self.args.tie_word_embeddings
        logits = self.model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden)
        return self.vocabulary.all_gather(logits)

    def train(self, mode: bool = True) -> nn.Module:
        """Sets training mode, as ``nn.Module.train``.

        Raises:
            ValueError: the model is packed for inference.
        """
        if mode:
            self.check_unpacked("train")
        return super().train(mode)

    def save_weights(self, file: str, **options: Any) -> None:
        """Saves the weights, as ``nn.Module.save_weights``.

        Raises:
            ValueError: the model is packed for inference.
        """
        self.check_unpacked("save")
        super().save_weights(file, **options)

    def check_unpacked(self, to_do: str) -> None:
        """Checks that the model has the checkpoint's own modules.

        Raises:
            ValueError: it is packed for inference.
        """
        if self.packed:
            raise ValueError(
                f"this model is packed for inference; load it with pack=False to {to_do} it"
            )

    def make_cache(self, left_padding: list[int] | None = None) -> Cache:
        """Returns an empty cache, one entry a layer.

        Args:
            left_padding: the number of each prompt's pad tokens in a batch padded on the left.
        """
        if left_padding is None:
            kinds = [
                GatedDeltaCache if layer.is_linear else AttentionCache for layer in self.layers
            ]
            return [kind() for kind in kinds]
        return [
            GatedDeltaCache(left_padding=left_padding)
            if layer.is_linear
            else BatchAttentionCache(left_padding)
            for layer in self.layers
        ]

    @property
    def drafts(self) -> bool:
        """Whether there is something to draft with, the MTP head or a block drafter."""
        return self.mtp is not None or self.dflash is not None

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, for mlx-lm's tools."""
        return self.model.layers

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Returns a checkpoint's tensors, of any known layout, by this module's parameter names."""
        return layouts.sanitize(weights, self.parameter_shapes(), self.args)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns path -> shape of every parameter, quantized ones in their packed form."""
        leaves: Any = tree_flatten(self.parameters())
        return {path: tuple(leaf.shape) for path, leaf in leaves}

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool | dict[str, int]]:
        """mlx-lm's rule: routers and shared-expert gates keep 8 bits, whatever the rest has."""
        return lambda path, module: (
            {"group_size": 64, "bits": 8} if layouts.is_router(path) else True
        )

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """mlx-lm's rule: whether a parameter follows the model's dtype or stays float32."""
        return lambda path: not layouts.is_float32(path)
