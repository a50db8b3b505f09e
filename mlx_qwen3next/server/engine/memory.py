"""The memory that the prompt cache and the running requests share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...checkpoint.loading import default_dtype
from ...decoding.queueing import return_free_memory
from ...model import capacity
from ...model.quantized_kv import NOT_QUANTIZED, KVQuantization
from ...model.qwen3_next import Model
from ...prompt_cache.store import PromptCache
from .request import Request


class Memory:
    """Tells which requests fit, and shrinks the prompt cache for them.

    Args:
        model: the one that answers, in all processes of its group alike.
        checkpoints: the prompt cache; its limit is the budget.
        quantization: of the requests' keys and values.

    Attributes:
        budget: bytes of the prompt cache and the running requests together.
    """

    def __init__(
        self,
        model: Model,
        checkpoints: PromptCache,
        quantization: KVQuantization = NOT_QUANTIZED,
    ):
        self._model, self._checkpoints = model, checkpoints
        self._quantization = quantization
        self._ran: set[int] = set()
        self.budget = min(model.group.gather("budget", checkpoints.max_bytes))

    def fits(self, requests: Sequence[Request], ahead: int) -> bool:
        """Whether a batch of requests fits, with so many more tokens of each answer.

        mlx-lm pads all sequences of a batch to the longest one. A single one fits at any length.
        """
        if len(requests) <= 1:
            return True
        longest = max(len(r.tokens) + min(ahead, r.max_tokens - r.generated) for r in requests)
        config, mtp = self._model.args, self._model.mtp is not None
        size, quantization = default_dtype().size, self._quantization
        row = capacity.cache_bytes(
            config, longest, mtp=mtp, itemsize=size, quantization=quantization
        )
        return self._model.group.decide("fits", len(requests) * row <= self.budget)

    def make_room(self, running: int) -> None:
        """Shrinks the prompt cache to what the running requests leave, whose caches have a size."""
        self._checkpoints.max_bytes = max(self.budget - running, 0)
        self._checkpoints.trim(self._checkpoints.max_bytes)

    def give_back(self, running: Iterable[int]) -> None:
        """Gives free memory back to the system, if a request has ended since the last call.

        Args:
            running: the numbers of the sequences that run.
        """
        before, self._ran = self._ran, set(running)
        if before - self._ran:
            return_free_memory()
