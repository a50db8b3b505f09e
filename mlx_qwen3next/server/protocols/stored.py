"""Responses kept for later requests, in memory alone."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..answers.written_calls import WrittenCalls
from ..requests.checks import RequestError, shown

MOST = 256  # responses
MOST_BYTES = 64 * 2**20  # of their JSON


@dataclass(frozen=True)
class Kept:
    """A response.

    Args:
        items: of the conversation up to it, its own output included.
        response: the object that was sent.
    """

    items: list[dict[str, Any]]
    response: dict[str, Any]


class Stored:
    """The last responses; the oldest go first when there are too many or they are too large.

    Attributes:
        calls: how the model has written its calls.
    """

    def __init__(self) -> None:
        self.calls = WrittenCalls()
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, kept: Kept) -> None:
        """Keeps a response."""
        size = len(json.dumps(kept.items)) + len(json.dumps(kept.response))
        with self._lock:
            self._kept[kept.response["id"]] = kept, size
            self._bytes += size
            while len(self._kept) > MOST or self._bytes > MOST_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1][1]

    def get(self, name: str, param: str | None = None, status: int = 404) -> Kept:
        """Finds a response.

        Args:
            param, status: of the error.

        Raises:
            RequestError: it is not kept.
        """
        with self._lock:
            if name in self._kept:
                return self._kept[name][0]
        message = (
            f"the response {shown(name)} is not kept here: the server keeps the last {MOST} in "
            "memory, unless they were sent with store false; send the whole conversation as input"
        )
        raise RequestError(message, param, status=status, code="previous_response_not_found")

    def delete(self, name: str) -> None:
        """Forgets a response.

        Raises:
            RequestError: it is not kept.
        """
        self.get(name)
        with self._lock:
            _, size = self._kept.pop(name, (None, 0))
            self._bytes -= size

    def item(self, path: str, name: str) -> dict[str, Any]:
        """Finds an item of the responses kept, by its id.

        Raises:
            RequestError: there is none.
        """
        with self._lock:
            kept = [kept for kept, _ in self._kept.values()]
        for item in (item for each in reversed(kept) for item in reversed(each.items)):
            if item.get("id") == name:
                return item
        message = f"{path} refers to the item {shown(name)}, which is not kept here; send it whole"
        raise RequestError(message, path)
