"""Converting a published checkpoint to the files that mlx_qwen3next and mlx-lm run."""

from .conversion import convert

__all__ = ["convert"]
