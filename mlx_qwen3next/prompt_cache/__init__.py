"""Checkpoints of earlier texts, in memory and on disk, for prompts that begin alike."""
