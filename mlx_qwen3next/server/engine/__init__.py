"""The engine: the thread that owns the model, the batch and the prompt cache."""

DECODE_CONCURRENCY = 32  # sequences that are decoded together; mlx_lm.server's default
