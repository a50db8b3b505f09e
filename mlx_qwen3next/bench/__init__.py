"""How fast this machine runs a model, beside stock mlx-lm: ``python -m mlx_qwen3next.bench``."""
