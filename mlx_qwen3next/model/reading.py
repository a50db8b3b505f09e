"""The work and the memory of reading a prompt's next chunk, counted from the model's shapes.

The work of a token grows with the text before it, by attention alone. The memory beside weights
and cache is that of one layer, since the layers of a chunk run one after the other
(:func:`mlx_qwen3next.decoding.speculative.forward`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import mlx.core as mx

from ..compute.cpu_attention import BLOCK, PIECE
from ..compute.cpu_matmul import PRODUCTS
from ..compute.cpu_streams import cores
from . import capacity
from .config import Config

MOST = 8192  # tokens of a chunk; more would not be faster
LEAST_ROOM, MOST_ROOM = 2**28, 2**32  # bytes
_BLOCKS = 16  # of scores that a CPU's streams have in work at a time, as measured


@dataclass(frozen=True)
class Reading:
    """The work and the memory of prompts' chunks.

    Args:
        config: the model's.
        itemsize: bytes per element of its dtype.
        room: bytes that a chunk may take beside weights and cache.
        in_pieces: whether attention takes a piece of the chunk at a time, as on a CPU.
        quantized: whether keys and values are, so that a layer's have to be dequantized.
    """

    config: Config
    itemsize: int
    room: float
    in_pieces: bool
    quantized: bool = False

    @classmethod
    def here(cls, config: Config, itemsize: int, quantized: bool = False) -> Reading:
        """Gives a chunk a quarter of what the model leaves now, within 0.27 and 4.3 GB."""
        return cls.beside(config, itemsize, capacity.spare(), quantized)

    @classmethod
    def beside(cls, config: Config, itemsize: int, left: int, quantized: bool = False) -> Reading:
        """Gives a chunk what :meth:`here` does where the model leaves so many bytes."""
        room = max(LEAST_ROOM, min(MOST_ROOM, left // 4))
        return cls(config, itemsize, room, mx.default_device() == mx.cpu, quantized)

    def multiply_adds(self, tokens: int, held: int) -> int:
        """Counts the multiplications with an addition in a chunk after ``held`` tokens."""
        c = self.config
        H, V, K = c.hidden_size, c.linear_value_dim, c.linear_key_dim
        heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        linear = H * (2 * K + 3 * V + 2 * c.linear_num_value_heads) + 3 * V * c.linear_key_head_dim
        attention = H * (3 * heads + 2 * groups)
        chosen = c.num_experts_per_tok * c.moe_intermediate_size
        sparse = H * (c.num_experts + 3 * (chosen + c.shared_expert_intermediate_size))
        count = len(c.layer_types)
        linears, sparses = (
            c.layer_types.count("linear_attention"),
            sum(map(c.is_sparse, range(count))),
        )
        a_token = linears * linear + (count - linears) * attention
        a_token += sparses * sparse + (count - sparses) * 3 * H * c.intermediate_size
        pairs = tokens * held + tokens * (tokens + 1) // 2  # of a token and a key that it sees
        return tokens * a_token + (count - linears) * 2 * heads * pairs

    def scratch(self, tokens: int, held: int) -> int:
        """Returns the bytes that a chunk after ``held`` tokens takes beside weights and cache.

        That is a layer's mixer and what its experts need before the mixer's arrays are free. An
        attention layer has all its scores at once, and their mask, for heads of 256 on Apple's GPUs
        before M5, where MLX has no kernel of its own. On a CPU it has some blocks of them. Its keys
        are transposed, and quantized ones are dequantized first.
        """
        c = self.config
        heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        pairs = tokens * (held + tokens)
        scores = c.num_attention_heads * pairs
        if self.in_pieces:
            block = heads // groups * PIECE * BLOCK
            scores = min(scores, _BLOCKS * block)
        else:
            scores += pairs // self.itemsize
        mixers = {
            "linear_attention": tokens * (13 * c.linear_value_dim + 11 * c.linear_key_dim),
            "full_attention": 4 * tokens * (heads + groups)
            + scores
            + (3 if self.quantized else 1) * groups * (held + tokens),
        }
        rows = c.num_experts_per_tok + (c.shared_expert_intermediate_size > 0)
        experts = rows * (3 * c.hidden_size + 4 * c.moe_intermediate_size)
        mlp = tokens * max(experts * (c.num_experts > 0), 3 * c.intermediate_size)
        return self.itemsize * (max(mixers[kind] for kind in c.layer_types) + 2 * mlp // 3)

    def most_memory(self, context: int) -> int:
        """Returns the bytes that chunks of a text take at most beside weights and cache.

        Args:
            context: its tokens.
        """
        tokens = min(context, MOST)
        scratch = min(self.scratch(tokens, context - tokens), self.room)
        return int(scratch) + (PRODUCTS * cores() if self.in_pieces else 0)

    def most(self, work: float, held: int, full: int = MOST, prompts: int = 1) -> int:
        """Returns the most tokens of each prompt that a chunk may have; 0 if not even one.

        Args:
            work: multiply-adds that the chunk may take, all prompts together.
            held: the tokens before it.
            full: the most tokens, whatever they take.
            prompts: how many are read together.
        """

        def is_too_much(tokens: int) -> bool:
            fits = prompts * self.scratch(tokens, held) <= self.room
            return not fits or prompts * self.multiply_adds(tokens, held) > work

        return bisect_right(range(1, full + 1), False, key=is_too_much)
