"""The server that an agent is to use: the one that runs, or one that is started for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .agents import Place

_WAIT = 0.2  # seconds between two looks at a server that is loading
_STOP = 60.0  # seconds for a server to save its prompt cache and end


def ask(url: str, key: str) -> dict[str, Any] | None:
    """The answer to a GET of a server; None if nothing listens there.

    Raises:
        ValueError: the answer is no JSON object, or refuses the key.
    """
    try:
        with urlopen(Request(url, headers={"Authorization": f"Bearer {key}"}), timeout=10) as got:
            raw, status = got.read(), got.status
    except HTTPError as error:
        raw, status = error.read(), error.code
    except (URLError, ConnectionError):
        return None
    except (OSError, HTTPException):
        raw, status = b"", 0
    if status == 401:
        raise ValueError(f"the server at {url} wants another key: name it with --api-key")
    try:
        told = json.loads(raw)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ValueError(f"something else than this package's server answers at {url}; use --port")
    return told


def place_of(url: str, key: str) -> Place | None:
    """The server at an address once it has loaded its model; None if none runs.

    Raises:
        ValueError: something else is there, or the server cannot answer.
    """
    while (health := ask(f"{url}/health", key)) is not None:
        match health.get("status"):
            case "loading":
                time.sleep(_WAIT)
            case "ok":
                break
            case status:
                raise ValueError(f"the server at {url} cannot answer: {str(status)[:80]}")
    else:
        return None
    models = (ask(f"{url}/v1/models", key) or {}).get("data") or [{}]
    name, context = models[0].get("id"), models[0].get("max_model_len")
    if not isinstance(name, str) or not isinstance(context, int):
        raise ValueError(f"something else than this package's server answers at {url}; use --port")
    return Place(url, key, name, context)


@contextmanager
def started(url: str, key: str, flags: Sequence[str], log: Path) -> Iterator[Place]:
    """A server of its own, which ends with the agent.

    Args:
        flags: of the server.
        log: the file that takes its messages.

    Raises:
        ValueError: it has ended before it could answer.
    """
    command = [sys.executable, "-m", "mlx_qwen3next.server", *flags]
    with log.open("wb") as file:
        # In a session of its own: Ctrl-C is for the agent.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        while (place := _place_of_own(process, url, key)) is None:
            if process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
                raise ValueError(f"the server has ended: {lines[-1].removeprefix('error: ')}")
            time.sleep(_WAIT)
        yield place
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _place_of_own(process: subprocess.Popen[bytes], url: str, key: str) -> Place | None:
    """As :func:`place_of`; None as well if the server cannot answer because it is ending."""
    try:
        return place_of(url, key)
    except ValueError:
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            pass
        else:
            return None
        raise
