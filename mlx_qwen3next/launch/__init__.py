"""Coding agents, set up for this package's server."""
