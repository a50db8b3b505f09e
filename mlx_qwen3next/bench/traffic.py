"""What a decoded token has to move through memory, from the files' headers.

No decoder that reads its weights once a token can be faster than these bytes over the machine's
bandwidth. Of the experts only those that are used count; quantized codes count as stored, all
other weights in the dtype they are held in. Activations, which stay in caches, do not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..model import capacity, layouts
from ..model.config import Config
from ..storage.safetensors import Tensor

_EXPERTS = re.compile(r"\.mlp\.(switch_mlp|experts)\.")
_EMBEDDING = "model.embed_tokens."
_STEP = 256  # tokens of which memory.cache_bytes counts whole multiples


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step of one token reads and writes."""

    trunk: int  # weights of the layers, the final norm and one row of the embedding
    output: int  # weights of the output matrix
    head: int  # weights of the MTP head, 0 without one
    states: int  # states and convolution rows, read and written
    kv: int  # keys and values read, a token of context

    def plain(self, context: int) -> int:
        """Of a plain step after ``context`` tokens."""
        return self.trunk + self.output + self.states + self.kv * context

    def round(self, context: int, depth: int) -> int:
        """Of a round of ``depth`` drafts, if all its rows used the same experts."""
        return self.plain(context) + depth * (self.head + self.output)


def traffic(tensors: Mapping[str, Tensor], config: Config, itemsize: int) -> Traffic:
    """What a step moves.

    Args:
        tensors: the model's files' headers, of any layout.
        itemsize: bytes per element of the model's dtype.
    """
    used = config.num_experts_per_tok / max(config.num_experts, 1)
    trunk = output = head = 0.0
    for name, tensor in tensors.items():
        if layouts.is_ignored(name, config):
            continue
        size = _held(name, tensor, itemsize)
        if _EXPERTS.search(name):
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
    return Traffic(round(trunk), round(output), round(head), 2 * fixed, kv)


def _held(name: str, tensor: Tensor, itemsize: int) -> float:
    """Bytes of a tensor in memory."""
    if tensor.dtype in ("U32", "U8"):
        return tensor.nbytes
    return math.prod(tensor.shape) * (4 if layouts.is_float32(name) else itemsize)
