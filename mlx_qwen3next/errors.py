"""Errors of our own, and what other libraries' say, in one line."""


class ContextLengthError(ValueError):
    """A prompt is longer than the model's context."""


class QueueFullError(RuntimeError):
    """As many requests wait for an answer as may."""


def first_line(error: Exception) -> str:
    """The first line of the message, or the error's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
