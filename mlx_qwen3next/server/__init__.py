"""The server, from HTTP requests to answers: ``python -m mlx_qwen3next.server``."""
