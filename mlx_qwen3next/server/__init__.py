"""HTTP to answers: the command ``python -m mlx_qwen3next.server``."""
