"""Who is compared: this package and mlx-lm, by dtype, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ..checkpoint.loading import default_dtype
from ..storage.safetensors import DTYPES, Tensor

Kinds = Literal["default", "float32", "both"]

# What a side imports before it can load a model; then comes the worker, which imports more.
_IMPORTS = {
    "ours": "mlx_qwen3next.checkpoint.loading, mlx_qwen3next.decoding.generation",
    "stock": "mlx_lm.utils, mlx_lm.generate",
}
_START = (
    "import time; start = time.perf_counter(); import {}; seconds = time.perf_counter() - start; "
    "from mlx_qwen3next.bench import worker; worker.main(seconds)"
)


LAST_WORDS = 1.0  # seconds that an idle process takes at most to end


def rank() -> int | None:
    """This process's, if ``mlx.launch`` started it; the worker joins the others, not it."""
    given = os.environ.get("MLX_RANK")
    return None if given is None else int(given)


class WorkerError(ValueError):
    """A worker could not do what it was asked."""


@dataclass(frozen=True)
class Side:
    """This package or stock mlx-lm, in one dtype."""

    which: Literal["ours", "stock"]
    dtype: str  # MLX's name

    @property
    def label(self) -> str:
        """As the tables call it."""
        return f"{'here' if self.which == 'ours' else 'mlx-lm'}, {self.dtype}"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return getattr(mx, self.dtype).size


def sides_of(kinds: Kinds, tensors: Mapping[str, Tensor], stock: bool) -> list[Side]:
    """Who is compared; the first is this package in the dtype it is asked about first.

    Args:
        kinds: "default" is each side's own dtype: ours by the device, mlx-lm's by the files.
        tensors: the model's headers.
        stock: whether mlx-lm takes part.
    """
    table = "model.embed_tokens"
    stored = tensors.get(f"{table}.scales") or tensors[f"{table}.weight"]
    own = DTYPES[stored.dtype]
    pairs = {
        "default": (default_dtype(), own if mx.issubdtype(own, mx.floating) else mx.bfloat16),
        "float32": (mx.float32, mx.float32),
    }
    wanted = pairs.values() if kinds == "both" else [pairs[kinds]]
    sides = [
        Side(which, str(dtype).rpartition(".")[2])  # type: ignore[arg-type]
        for pair in wanted
        for which, dtype in zip(("ours", "stock"), pair, strict=True)
        if stock or which == "ours"
    ]
    return list(dict.fromkeys(sides))


def partner(side: Side, sides: list[Side]) -> Side:
    """Ours that a side of mlx-lm is compared with: of its dtype, or the first."""
    ours = [other for other in sides if other.which == "ours"]
    return next((other for other in ours if other.dtype == side.dtype), ours[0])


class Worker:
    """A side's process, from its start to :meth:`close`.

    Args:
        divided: among ranks, how: see :func:`mlx_qwen3next.cli.division`.

    Raises:
        WorkerError: the model cannot be loaded there.
    """

    def __init__(self, side: Side, directory: Path, divided: Mapping[str, Any]):
        self._name = side.label
        # A session of its own, so that Ctrl-C reaches this process alone, which ends the others.
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _START.format(_IMPORTS[side.which])),
                *(side.which, str(directory), side.dtype, json.dumps(divided)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.loaded: dict[str, Any] = self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> Any:
        """The result of a method of the worker's side.

        Raises:
            WorkerError: it failed, or the process has died.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self._name}: {reply['error']}")
        return reply["result"]

    def _died(self) -> WorkerError:
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return WorkerError(f"{self._name}: its process ended unasked ({how})")

    def close(self) -> None:
        """Ends the process, at once if it is doing something."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of what was not sent
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS)
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
