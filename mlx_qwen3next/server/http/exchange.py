"""A request and its answer, as the log, the metrics and ``--log-requests`` tell of them."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ...errors import first_line
from ..answers.tokens import Context, SampledToken
from ..engine.metrics import Metrics

GONE = 499  # the status that is told of an exchange whose client has left, as nginx calls it
_QUIET = ("/health", "/metrics")  # paths that are asked for over and over


class Exchange:
    """The events on one connection.

    Attributes:
        status: of the answer; 0 before the first line of it.
        error: the message of an error.
        body: the request's, if it is to be stored.
        context: the request's, once it is known.
        tokens, texts: of the answer so far.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self.status, self.error = 0, ""
        self.body: dict[str, Any] | None = None
        self.context: Context | None = None
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self._asked = time.monotonic()
        self._first = self._last = 0.0

    def add(self, token: SampledToken) -> None:
        """Takes account of the next token."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.tokens.append(token.token)
        self.texts.append(token.text)

    @property
    def wait(self) -> float:
        """The seconds to the first token."""
        return self._first - self._asked

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first one; None if there are none."""
        seconds = self._last - self._first
        return (len(self.tokens) - 1) / seconds if seconds else None

    def tell(self, request: str, path: str, client: str, metrics: Metrics) -> None:
        """Logs and counts the exchange at its end.

        Args:
            request: the request's first line.
            path: the path of the server that it names.
        """
        metrics.add("requests", path=path, status=str(self.status))
        if self.tokens:
            metrics.observe("time_to_first_token_seconds", self.wait)
        if self.speed is not None:
            metrics.observe("tokens_per_second", self.speed)
        is_quiet = path in _QUIET and self.status in (200, 503)
        seconds = time.monotonic() - self._asked
        line = "; ".join([f"{request} {self.status} in {seconds:.2f} s", *self._parts()])
        logging.log(logging.DEBUG if is_quiet else logging.INFO, "%s %s", client, ascii(line)[1:-1])

    def _parts(self) -> list[str]:
        """The parts of the line that are about an answer."""
        parts = [self.error[:200]] if self.error else []
        if self.context is None:
            return parts
        cached, accepted = self.context.cached, self.context.accepted
        known = f" ({cached} cached)" if cached else ""
        parts.append(
            f"prompt {len(self.context.prompt)}{known} and answer {len(self.tokens)} tokens"
        )
        if self.tokens:
            parts.append(f"first after {self.wait:.2f} s")
        if self.speed is not None:
            parts.append(f"{self.speed:.1f} tokens/s")
        if drafts := accepted.total():
            length = len(self.tokens) / max(len(self.tokens) - drafts, 1)
            sources = ", ".join(f"{source} {n}" for source, n in accepted.items())
            parts.append(f"accept length {length:.2f} ({sources})")
        return parts


class RequestLog:
    """The folder of ``--log-requests``: a file a request, for reproducing a report.

    Args:
        folder: made if it is not there, for its owner alone, as the files are.
        about: facts of the server, which every file has.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    STORES = (
        "a file a request: its body, the tokens of its prompt and its answer, the answer's text, "
        "times and errors; no headers, therefore no keys"
    )

    def __init__(self, folder: Path, about: dict[str, Any]):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"--log-requests: {folder} cannot be written to")
        self._folder, self._about = folder, about

    @staticmethod
    def seeded(body: dict[str, Any]) -> dict[str, Any]:
        """The body with a seed, without which its tokens could not be drawn again."""
        return body if body.get("seed") is not None else body | {"seed": secrets.randbits(31)}

    def write(self, exchange: Exchange, path: str) -> None:
        """Stores an exchange; an error is logged."""
        began = datetime.fromtimestamp(exchange.began).astimezone()
        context = exchange.context
        record = {
            **self._about,
            **{"time": began.isoformat(), "path": path, "status": exchange.status},
            **{"error": exchange.error, "request": exchange.body},
        }
        if context is not None:
            record |= {"prompt_tokens": context.prompt, "cached": context.cached}
            record |= {"accepted": context.accepted, "tokens": exchange.tokens}
            record |= {"text": "".join(exchange.texts)}
        if exchange.tokens:
            record |= {"seconds_to_first_token": exchange.wait, "tokens_per_second": exchange.speed}
        file = self._folder / f"{began:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}.json"
        try:
            with open(file, "x", opener=_private) as stream:
                json.dump(record, stream, indent=1)
        except OSError as error:
            logging.warning(f"--log-requests: a request was not stored: {first_line(error)}")


def _private(file: str, flags: int) -> int:
    return os.open(file, flags, 0o600)
