"""Qwen3-Next's multi-token-prediction head: from a verified hidden state, the token after next.

With h_i the trunk's hidden state after its final norm and t_{i+1} the next token::

    x_i = fc([norm_e(embed(t_{i+1})) | norm_h(h_i)])     embedding first
    u_i = decoder layer (attention, sparse)(x_i), position i, its own KV cache
    m_i = norm(u_i)                                      logits(m_i) predict t_{i+2}

Deeper drafts feed m_i as the next h, the draft as the next token, at position i + 1. Embedding
and lm_head are the trunk's. Follows vLLM's and SGLang's ``qwen3_next_mtp``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

from .cache import Cache, MTPCache
from .config import Config
from .qwen3_next import DecoderLayer, Model, RMSNorm


class MTPHead(nn.Module):
    """The head; parameters are the checkpoint's ``mtp.*``."""

    def __init__(self, config: Config, embed: Callable[[mx.array], mx.array]):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(H, eps)
        self.pre_fc_norm_hidden = RMSNorm(H, eps)
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.layers = [DecoderLayer(config, linear=False, sparse=config.is_sparse(0))]
        self.norm = RMSNorm(H, eps)
        self.embed = embed

    def __call__(
        self, hidden: mx.array, next_tokens: mx.array, cache: Cache | None = None
    ) -> mx.array:
        """Hidden states h_i ``[B, L, H]`` and tokens t_{i+1} ``[B, L]`` int to m_i ``[B, L, H]``.

        The cache (:meth:`make_cache`) holds the head's keys and values for positions before i. The
        result has the dtype of ``hidden``.
        """
        x = self.joined(self.embed(next_tokens), hidden)
        entry = None if cache is None else cache[0]
        x = self.layers[0](x, create_attention_mask(x, entry), entry)
        return self.norm(x)

    def joined(self, embedding: mx.array, hidden: mx.array) -> mx.array:
        """Returns x_i of the next tokens' embeddings and the hidden states, all ``[B, L, H]``."""
        parts = [self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)]
        return self.fc(mx.concatenate(parts, axis=-1))

    def make_cache(self) -> Cache:
        """Returns an empty cache for the head's attention layer."""
        return [MTPCache()]


def attach(model: Model, config: Config | None = None) -> MTPHead:
    """Gives the model a head with unset weights, and returns the head.

    Args:
        config: the head's, where it is not the model's own. Positions are scaled as in the trunk,
            whatever it says of that.
    """
    config = replace(config or model.args, rope_scaling=model.args.rope_scaling)
    # A closure, not the module: the embedding's parameters belong to the trunk alone, and
    # quantization may replace it.
    model.mtp = MTPHead(config, lambda tokens: model.model.embed(tokens))
    return model.mtp
