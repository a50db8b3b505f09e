"""The comparison with stock mlx-lm, each side in a process of its own."""
