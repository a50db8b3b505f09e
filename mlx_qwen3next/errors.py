"""What other libraries' errors say, in one line."""


def first_line(error: Exception) -> str:
    """The first line of the message, or the error's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
