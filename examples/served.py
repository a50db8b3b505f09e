"""A server in its own process, and a client for it; other examples use them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_qwen3next.checkpoint.hub import BUNDLED

OURS = [sys.executable, "-m", "mlx_qwen3next.server"]
STOCK = [sys.executable, "-m", "mlx_lm", "server"]


def float32_copy(directory: Path, source: Path = BUNDLED) -> Path:
    """Copies a model with float32 in place of bfloat16; stock mlx-lm keeps the files' dtype."""
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (directory / file.name).write_bytes(file.read_bytes())
    for name in ("model.safetensors", "mtp.safetensors"):
        arrays, metadata = mx.load(str(source / name), return_metadata=True)
        wide = {k: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for k, x in arrays.items()}
        mx.save_safetensors(str(directory / name), wide, metadata)
    return directory


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Answer:
    """The answer to a request, and its times."""

    text: str = ""
    finish_reason: str | None = None
    first: float = 0.0  # seconds until the first piece of text
    seconds: float = 0.0  # seconds until the end
    usage: dict = field(default_factory=dict)
    status: int = 200

    @property
    def cached(self) -> int:
        """The number of prompt tokens that were not processed again."""
        return self.usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)


class Served:
    """A server process, and the context manager that ends it."""

    def __init__(self, command: list[str], *options: object, log: Path | None = None):
        self.port = free_port()
        self._command = [*command, "--port", str(self.port), *map(str, options)]
        self._log = log
        self.start()

    def start(self) -> None:
        """Starts the server, or starts it again, and waits until it answers."""
        out = subprocess.DEVNULL if self._log is None else self._log.open("ab")
        self.process = subprocess.Popen(self._command, stdout=out, stderr=out)
        while not self.healthy():
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"{self._command[2]} ended with status {self.process.returncode}"
                )
            time.sleep(0.1)
        # Stock mlx_lm.server is already healthy while it loads: wait for an answer.
        self.ask([{"role": "user", "content": "x"}], max_tokens=1)

    def healthy(self) -> bool:
        """Whether ``/health`` answers with status 200."""
        try:
            return self.request("GET", "/health").status == 200
        except OSError:
            return False

    def request(self, method: str, path: str, body: dict | None = None, timeout: float = 600):
        """Sends a request; returns its response, which is not yet read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, body and json.dumps(body), headers)
        return connection.getresponse()

    def ask(
        self,
        messages: list[dict],
        leave_after: int | None = None,
        patience: float = 600,
        **options,
    ) -> Answer:
        """Asks for a chat completion as a stream; returns the answer.

        Args:
            leave_after: the number of pieces of text after which the client closes the connection.
            patience: seconds without a byte, after which it does so as well, with a TimeoutError.
            options: other fields of the request.
        """
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        start, answer = time.perf_counter(), Answer()
        with self.request("POST", "/v1/chat/completions", body | options, patience) as response:
            answer.status = response.status
            if response.status != 200:
                answer.text = response.read().decode()
                return answer
            for pieces, event in enumerate(_events(response)):
                if "error" in event:
                    answer.status, answer.text = 500, json.dumps(event)
                    break
                answer.usage = event.get("usage") or answer.usage
                for choice in event["choices"]:
                    text = choice["delta"].get("content", "")
                    if text and not answer.text:
                        answer.first = time.perf_counter() - start
                    answer.text += text
                    answer.finish_reason = choice["finish_reason"]
                if leave_after is not None and pieces >= leave_after:
                    break
        answer.seconds = time.perf_counter() - start
        return answer

    def memory(self) -> int:
        """The resident bytes of the process (Linux only)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def metric(self, name: str) -> float:
        """A value of ``/metrics`` that has no labels; only our server has these."""
        with self.request("GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        (value,) = (x.split()[1] for x in lines if x.startswith(f"qwen3next_{name} "))
        return float(value)

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Sends a signal; returns the exit status of the process when it has ended."""
        os.kill(self.process.pid, signum)
        return self.process.wait()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


def _events(response: http.client.HTTPResponse) -> Iterator[dict]:
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
