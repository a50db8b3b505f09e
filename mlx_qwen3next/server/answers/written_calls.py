"""How the model has written the values in its calls, for the requests that send them back.

Clients send calls back as JSON, where one in JavaScript has made 1 of 1.0, and a chat template
writes values in its own way, such as False for false, or lists with blanks. In another text than
the model's the prompt cache would know nothing of the answer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from typing import Any

MOST = 4096  # calls
MOST_BYTES = 16 * 2**20  # of their values' JSON


class WrittenCalls:
    """The last calls whose values a template may write in another way; the oldest go first."""

    def __init__(self) -> None:
        self._values: OrderedDict[bytes, tuple[dict[str, Any], int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(
        self, template: str | None, name: str, arguments: dict[str, Any], written: dict[str, str]
    ) -> None:
        """Keeps a call.

        Args:
            template: the name of the template that the request has named.
            name, arguments: of the call, as clients get them.
            written: the text of each value that is no string, if the call is not in JSON.
        """
        values = written or {
            key: value
            for key, value in arguments.items()
            if json.dumps(value) != json.dumps(_without_zeros(value))
        }
        key, size = _key(template, name, arguments), len(json.dumps(values))
        with self._lock:
            _, before = self._values.pop(key, (None, 0))
            self._bytes -= before
            if values:
                self._values[key] = values, size
                self._bytes += size
            while len(self._values) > MOST or self._bytes > MOST_BYTES:
                self._bytes -= self._values.popitem(last=False)[1][1]

    def restored(
        self, template: str | None, messages: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The messages, with the values of calls that are kept as the model wrote them.

        Args:
            messages: checked, so that the arguments of calls are mappings.
        """
        return [
            message | {"tool_calls": [self._restored(template, call) for call in calls]}
            if (calls := message.get("tool_calls"))
            else message
            for message in messages
        ]

    def _restored(self, template: str | None, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        key = _key(template, function["name"], function["arguments"])
        with self._lock:
            values, _ = self._values.get(key, ({}, 0))
        return call | {"function": function | {"arguments": function["arguments"] | values}}


def _key(template: str | None, name: str, arguments: dict[str, Any]) -> bytes:
    text = json.dumps([template, name, _without_zeros(arguments)], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def _without_zeros(value: Any) -> Any:
    """A JSON value as JavaScript writes it, with 1 for 1.0."""
    if isinstance(value, dict):
        return {key: _without_zeros(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_zeros(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
