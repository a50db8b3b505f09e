"""The error that answers a request, and checks that all parts of a request share.

A check maps the path of a field ("messages[0].role") and its value to the value that is used, and
raises :class:`RequestError` if the value does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

Check = Callable[[str, Any], Any]

MAX_INTEGER = 2**31 - 1  # the largest index in MLX
_MAX_DEPTH = 100  # of nested lists and objects; chat templates recurse into them


class RequestError(Exception):
    """An error that answers a request.

    Args:
        message: names the fault, the value that came and the remedy.
        param: the path of the field at fault.
        status: the HTTP status.
        code: OpenAI's code of the error, if there is one.
        headers: headers of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def load_json(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: the text is no JSON, cannot be encoded in UTF-8, or is nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inside for y in x if isinstance(y, (dict, list))]
    if level:
        raise ValueError(f"it is nested too deeply, beyond {_MAX_DEPTH} levels")
    json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for half a surrogate pair
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def unfit(path: str, value: Any, expected: str) -> RequestError:
    """Makes the error for a value that is not the expected one."""
    return RequestError(f"{path} must be {expected}, got {shown(value)}", path)


def shown(value: Any) -> str:
    """Returns the beginning of a value as JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def integer(least: int, most: int = MAX_INTEGER) -> Check:
    """Makes a check for integers of a range."""

    def check(path: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise unfit(path, value, f"an integer from {least} to {most}")
        return value

    return check


def one_of(*allowed: Any, hint: str = "") -> Check:
    """Makes a check for one of these values; a value of another type, as True for 1, fails."""

    def check(path: str, value: Any) -> Any:
        if not any(type(value) is type(x) and value == x for x in allowed):
            raise unfit(path, value, " or ".join(map(json.dumps, allowed)) + hint)
        return value

    return check


def boolean(path: str, value: Any) -> bool:
    """Checks for true or false."""
    if not isinstance(value, bool):
        raise unfit(path, value, "true or false")
    return value


def string(path: str, value: Any) -> str:
    """Checks for a string."""
    if not isinstance(value, str):
        raise unfit(path, value, "a string")
    return value


def filled_string(path: str, value: Any) -> str:
    """Checks for a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise unfit(path, value, "a string that is not empty")
    return value


def mapping(path: str, value: Any) -> dict[str, Any]:
    """Checks an object and drops its nulls, which mean the same as missing fields."""
    if not isinstance(value, dict):
        raise unfit(path, value, "an object")
    return {key: entry for key, entry in value.items() if entry is not None}


def list_of(check: Check, least: int = 0) -> Check:
    """Makes a check for lists of at least ``least`` entries, each of which passes a check."""

    def check_all(path: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise unfit(path, value, "a list that is not empty" if least else "a list")
        return [check(f"{path}[{i}]", entry) for i, entry in enumerate(value)]

    return check_all
