"""The engine: the thread that owns the model, the batch and the prompt cache."""
