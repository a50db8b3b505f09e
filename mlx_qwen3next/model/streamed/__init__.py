"""Experts on disk: some in memory at a time, the others read when they are wanted."""
