"""Checkpoints of earlier texts, in memory and on disk, for prompts that begin alike."""

from .store import PromptCache

__all__ = ["PromptCache"]
