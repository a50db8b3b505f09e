"""Qwen3-Next in plain PyTorch, written to train fast on a CPU.

The modules have the names of transformers' ``Qwen3NextForCausalLM`` (fused experts), so that each
loads the other's state dict. The MTP head follows vLLM's and SGLang's ``qwen3_next_mtp``. Under
``torch.autocast("cpu", torch.bfloat16)`` matmuls run in bfloat16, and everything else in float32.

Symbols: B sequences, L tokens, T = B·L, H hidden, E experts, I expert width, D head dimension.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from functions import Dispatch, Reorder, gated_delta_rule
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The fields of the hub's ``config.json`` that shape the demo model."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 1e7
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 128
    intermediate_size: int = 512
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192

    def hub(self) -> dict:
        """The complete ``config.json`` in the hub's dialect."""
        return asdict(self) | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
        }


class RMSNorm(nn.Module):
    """Zero-centred RMSNorm in float32: ``x · rsqrt(mean(x²) + eps) · (1 + w)``."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight, self.eps)


class RMSNormGated(nn.Module):
    """Gated RMSNorm in float32: ``w · norm(x) · silu(z)``; w starts at one."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps) * F.silu(z.float())


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class GatedDeltaNet(nn.Module):
    """The linear-attention mixer; the rows of both input projections are grouped by key head."""

    def __init__(self, c: Config):
        super().__init__()
        self.key_heads, self.value_heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.key_dim, self.value_dim = c.linear_key_head_dim, c.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        channels, taps = 2 * keys + values, c.linear_conv_kernel_dim
        self.in_proj_qkvz = nn.Linear(c.hidden_size, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = nn.Linear(c.hidden_size, 2 * self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.norm = RMSNormGated(self.value_dim, c.rms_norm_eps)
        self.out_proj = nn.Linear(values, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        ratio = self.value_heads // self.key_heads
        wide = ratio * self.value_dim
        qkvz = self.in_proj_qkvz(x).view(batch, length, self.key_heads, -1)
        *qkv, z = qkvz.split([self.key_dim, self.key_dim, wide, wide], -1)
        ba = self.in_proj_ba(x).view(batch, length, self.key_heads, -1)
        b, a = (y.flatten(2).float() for y in ba.split(ratio, -1))
        qkv = torch.cat([y.flatten(2) for y in qkv], -1).float()
        taps = self.conv1d.weight[:, 0].T
        padded = F.pad(qkv, (0, 0, len(taps) - 1, 0))
        qkv = F.silu(sum(padded[:, j : j + length] * tap for j, tap in enumerate(taps)))
        keys = self.key_heads * self.key_dim
        q, k, v = qkv.split([keys, keys, self.value_heads * self.value_dim], -1)
        q = l2norm(q.unflatten(-1, (self.key_heads, -1))) * self.key_dim**-0.5
        k = l2norm(k.unflatten(-1, (self.key_heads, -1)))
        q, k = (y.repeat_interleave(ratio, 2) for y in (q, k))
        v = v.unflatten(-1, (self.value_heads, -1))
        g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        out = gated_delta_rule(q, k, v, g, b.sigmoid())
        out = self.norm(out, z.reshape(out.shape))
        return self.out_proj(out.flatten(2))


class Attention(nn.Module):
    """Gated full attention; ``q_proj`` holds ``[query | gate]`` of each head."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.q_proj = nn.Linear(c.hidden_size, 2 * self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, c.rms_norm_eps)
        rotary = int(c.head_dim * c.partial_rotary_factor)
        frequencies = c.rope_theta ** -(torch.arange(0, rotary, 2) / rotary)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rope(self, x: Tensor, offset: int) -> Tensor:
        """Rotates the first dimensions of x ``[B, heads, L, D]``; row i is at ``offset + i``."""
        angles = (offset + torch.arange(x.shape[2]))[:, None] * self.frequencies
        half = angles.shape[-1]
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Causal attention over x ``[B, L, H]``.

        With ``past`` (the MTP head's recursion), x is draft depth ``len(past) + 1``. Row i moves
        one position further with each depth. It sees the first depth's rows up to i, then row i of
        each later depth, as in drafting. The method appends this depth's keys and values to
        ``past``.
        """
        batch, length, _ = x.shape
        offset = len(past) if past else 0
        q, gate = self.q_proj(x).view(batch, length, self.heads, -1).chunk(2, -1)
        k = self.k_proj(x).view(batch, length, self.kv_heads, -1)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q = self.rope(self.q_norm(q).transpose(1, 2), offset)
        k = self.rope(self.k_norm(k).transpose(1, 2), offset)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1).to(v.dtype) for y in (k, v))
        q = q.to(v.dtype)
        if past:
            past.append((k, v))
            out = self.attend(q, past)
        else:
            if past is not None:
                past.append((k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2) * gate.sigmoid()
        return self.o_proj(out.flatten(2))

    def attend(self, q: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention of a later draft depth; q, all keys and all values are ``[B, heads, L, D]``."""
        (keys, values), *later = past
        length = q.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = [(q @ keys.mT).float().masked_fill(hidden, -math.inf)]
        scores += [(q * k).float().sum(-1, keepdim=True) for k, _ in later]
        weights = (torch.cat(scores, -1) * self.head_dim**-0.5).softmax(-1)
        out = weights[..., :length] @ values
        for i, (_, v) in enumerate(later):
            out = out + weights[..., length + i, None] * v
        return out


class MLP(nn.Module):
    """A SwiGLU block."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed SwiGLU experts, fused as in transformers: gate first, then up."""

    def __init__(self, c: Config):
        super().__init__()
        width = c.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(c.num_experts, 2 * width, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, width))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Applies the experts to x ``[T·k, H]``: in expert order, ``sizes[e]`` rows each."""
        dtype = x.dtype
        gate_up, down = self.gate_up_proj.to(dtype).unbind(), self.down_proj.to(dtype).unbind()
        h = torch.cat([part @ w.T for part, w in zip(x.split(sizes), gate_up, strict=True)])
        gate, up = h.chunk(2, -1)
        h = F.silu(gate) * up
        return torch.cat([part @ w.T for part, w in zip(h.split(sizes), down, strict=True)])


class Router(nn.Module):
    """The weight of the router; :class:`MoE` applies it."""

    def __init__(self, c: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size))


class MoE(nn.Module):
    """Top-k experts plus a shared expert behind a sigmoid gate."""

    def __init__(self, c: Config):
        super().__init__()
        self.top_k = c.num_experts_per_tok
        self.gate = Router(c)
        self.experts = Experts(c)
        self.shared_expert = MLP(c.hidden_size, c.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(c.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x ``[B, L, H]`` to the same shape and the load-balancing loss (1 if even)."""
        flat = x.flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            probabilities = (flat.float() @ self.gate.weight.T).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = chosen.flatten()
        counts = chosen.bincount(minlength=len(self.gate.weight))
        balance = (probabilities.mean(0) * counts / len(chosen)).sum() * len(counts)

        low = flat.to(
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        )
        order = chosen.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        y = self.experts(Dispatch.apply(low, order, inverse, self.top_k), counts.tolist())
        y = Reorder.apply(y, inverse, order).unflatten(0, (-1, self.top_k))
        y = (weights.to(y.dtype)[:, None] @ y)[:, 0]
        shared = self.shared_expert_gate(low).sigmoid() * self.shared_expert(low)
        return (y + shared).view(x.shape), balance


class Layer(nn.Module):
    """One pre-norm decoder layer: mixer, then MoE."""

    def __init__(self, c: Config, full_attention: bool):
        super().__init__()
        if full_attention:
            self.self_attn = Attention(c)
        else:
            self.linear_attn = GatedDeltaNet(c)
        self.full_attention = full_attention
        self.mlp = MoE(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, past: list | None = None) -> tuple[Tensor, Tensor]:
        y = self.input_layernorm(x)
        x = x + (self.self_attn(y, past) if self.full_attention else self.linear_attn(y))
        y, balance = self.mlp(self.post_attention_layernorm(x))
        return x + y, balance


class Trunk(nn.Module):
    """The embedding, the decoder layers and the final norm."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Layer(c, (i + 1) % c.full_attention_interval == 0) for i in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Maps tokens ``[B, L]`` to normed hidden states ``[B, L, H]``, and the balance."""
        x = self.embed_tokens(tokens)
        balance = 0
        for layer in self.layers:
            x, b = layer(x)
            balance = balance + b
        return self.norm(x), balance / len(self.layers)


class MTP(nn.Module):
    """The multi-token-prediction head: one decoder layer that predicts a token further."""

    def __init__(self, c: Config):
        super().__init__()
        self.fc = nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList([Layer(c, full_attention=True)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, embedded: Tensor, hidden: Tensor, past: list) -> tuple[Tensor, Tensor]:
        """Maps ``embedded`` (the next tokens) and ``hidden`` to new hidden states, and the balance.

        All are ``[B, L, H]``.
        """
        pair = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        x, balance = self.layers[0](self.fc(torch.cat(pair, -1)), past)
        return self.norm(x), balance


class Qwen3Next(nn.Module):
    """Trunk, language-model head and MTP head, with transformers' initialisation."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.model = Trunk(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.mtp = MTP(c)
        for name, p in self.named_parameters():
            if name.endswith("A_log"):
                nn.init.uniform_(p, 0.01, 16).data.log_()
            elif p.dim() > 1 and "conv1d" not in name:
                nn.init.normal_(p, std=0.02)

    def drafts(self, hidden: Tensor, tokens: Tensor, depths: int) -> tuple[list[Tensor], Tensor]:
        """Applies the MTP head to its own output; returns hidden states of depths 1 … ``depths``.

        Also returns the balance. hidden ``[B, L, H]`` comes from the trunk. tokens
        ``[B, ≥ L + depths]`` are the trunk's tokens and the ones after them. Row i of depth d reads
        token i + d and predicts token i + d + 1.
        """
        past, states, balance = [], [], 0
        for depth in range(1, depths + 1):
            embedded = self.model.embed_tokens(tokens[:, depth : depth + hidden.shape[1]])
            hidden, b = self.mtp(embedded, hidden, past)
            states.append(hidden)
            balance = balance + b
        return states, balance / depths
