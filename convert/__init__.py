"""Checkpoint conversion: Hugging Face weights to MLX's layout."""
