"""Answers: from tokens to reasoning, text and calls."""

from .reader import Reader, parse

__all__ = ["Reader", "parse"]
