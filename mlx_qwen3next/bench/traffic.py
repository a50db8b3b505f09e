"""Computes the bytes that a token moves through memory, from the headers of the files.

Those of a decoded token over the machine's bandwidth are the limit of every decoder that reads its
weights once for each token. Only the experts in use count. Quantized codes count as stored, all
other weights in the dtype in which they are held. Activations do not count, because they stay in
the caches of the processor. Those of a prompt do not: its bytes here are the least, and
``examples/prefill_passes.py`` computes the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..model import capacity, layouts
from ..model.config import Config
from ..model.reading import Reading
from ..storage.safetensors import Tensor

_EXPERTS = re.compile(r"\.mlp\.(switch_mlp|experts)\.")
_EMBEDDING = "model.embed_tokens."
_STEP = 256  # tokens; capacity.cache_bytes rounds up to multiples of it


@dataclass(frozen=True)
class Traffic:
    """The bytes that a step of one token reads and writes, and those of a prompt."""

    trunk: int  # weights of the layers, the final norm and one row of the embedding
    output: int  # weights of the output matrix
    head: int  # weights of the MTP head; 0 without one
    states: int  # states and convolution rows, read and written
    kv: int  # keys and values for each token of context, read
    left_out: int  # weights of the trunk's experts that a token does not use
    used: float  # share of the experts that a token uses
    reading: Reading

    def plain(self, context: int) -> int:
        """The bytes of a plain step after ``context`` tokens."""
        return self.trunk + self.output + self.states + self.kv * context

    def round(self, context: int, depth: int) -> int:
        """The bytes of a round of ``depth`` drafts whose rows all use the same experts."""
        return self.plain(context) + depth * (self.head + self.output)

    def prompt(self, tokens: int) -> int:
        """The bytes of reading a prompt at once, without its activations.

        Weights are read once, the last token's output included, keys and values written. Of the
        experts those are read that some token is expected to use, if each uses any as likely.
        """
        others = 1 - (1 - self.used) ** (tokens - 1)  # the share of the first token's others
        return self.plain(tokens) + round(self.left_out * others)

    def multiply_adds(self, tokens: int) -> int:
        """The multiplications with an addition of reading a prompt, in its layers."""
        return self.reading.multiply_adds(tokens, 0)


def traffic(tensors: Mapping[str, Tensor], config: Config, itemsize: int) -> Traffic:
    """Computes the bytes that a step of a model moves.

    Args:
        tensors: the headers of the model's files, in any layout.
        config: the model's config.
        itemsize: bytes per element of the model's dtype.
    """
    used = config.num_experts_per_tok / max(config.num_experts, 1)
    trunk = output = head = left_out = 0.0
    for name, tensor in tensors.items():
        if layouts.is_ignored(name, config):
            continue
        size = _held(name, tensor, itemsize)
        if _EXPERTS.search(name):
            left_out += 0 if layouts.is_mtp(name) else size * (1 - used)
            size *= used
        if name.startswith(_EMBEDDING):
            trunk += size / tensor.shape[0]
            output += size if config.tie_word_embeddings else 0
        elif name.startswith("lm_head."):
            output += size
        elif layouts.is_mtp(name):
            head += size
        else:
            trunk += size
    fixed = capacity.cache_bytes(config, 0, mtp=False, itemsize=itemsize)
    kv = (capacity.cache_bytes(config, _STEP, mtp=False, itemsize=itemsize) - fixed) // _STEP
    return Traffic(
        *(round(trunk), round(output), round(head), 2 * fixed, kv),
        left_out=round(left_out),
        used=used,
        reading=Reading(config, itemsize, math.inf, in_pieces=False),
    )


def _held(name: str, tensor: Tensor, itemsize: int) -> float:
    """The bytes of a tensor in memory."""
    if tensor.dtype in ("U32", "U8"):
        return tensor.nbytes
    return math.prod(tensor.shape) * (4 if layouts.is_float32(name) else itemsize)
