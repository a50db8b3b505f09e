"""The benchmark beside stock mlx-lm on this machine: ``python -m mlx_qwen3next.bench``."""
