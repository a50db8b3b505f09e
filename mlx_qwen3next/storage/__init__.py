"""Bytes on disk: replacing whole files, and the safetensors format. Knows nothing of the model."""
