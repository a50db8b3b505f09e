"""Qwen3-Next on Apple Silicon: the hybrid stack in MLX, with its own MTP head."""

from .load import load, load_model

__all__ = ["load", "load_model"]
