"""Errors of our own, and what other libraries' say, in one line."""


class ContextLengthError(ValueError):
    """A prompt is longer than the model's context.

    Args:
        message: names both lengths.
        tokens: those of the prompt.
        limit: the context's length.
    """

    def __init__(self, message: str, tokens: int, limit: int):
        super().__init__(message)
        self.tokens, self.limit = tokens, limit


class FieldError(ValueError):
    """A field of a request has a value that the model cannot do.

    Args:
        message: names the fault.
        param: the path of the field.
    """

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class QueueFullError(RuntimeError):
    """As many requests wait for an answer as may."""


def first_line(error: Exception) -> str:
    """The first line of the message, or the error's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
