"""The sides of the comparison: this package or mlx-lm in a dtype, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from ...checkpoint.loading import default_dtype
from ...storage.safetensors import DTYPES, Tensor
from ..models import DtypeChoice

# The imports of a package before it can load a model. They are timed; the worker imports more.
_IMPORTS = {
    "ours": "mlx_qwen3next.checkpoint.loading, mlx_qwen3next.decoding.generation",
    "stock": "mlx_lm.utils, mlx_lm.generate",
}
_START = (
    "import time; start = time.perf_counter(); import {}; seconds = time.perf_counter() - start; "
    "from mlx_qwen3next.bench.comparison import worker; worker.main(seconds)"
)


CLOSING = 1.0  # seconds for an idle process to end


class WorkerError(ValueError):
    """A worker has failed."""


@dataclass(frozen=True)
class Side:
    """This package or stock mlx-lm, in one dtype."""

    which: Literal["ours", "stock"]
    dtype: str  # MLX's name

    @property
    def label(self) -> str:
        """The name of the side in the tables."""
        return f"{'here' if self.which == 'ours' else 'mlx-lm'}, {self.dtype}"

    @property
    def itemsize(self) -> int:
        """The bytes per element of the dtype."""
        return getattr(mx, self.dtype).size


def sides_of(choice: DtypeChoice, tensors: Mapping[str, Tensor], stock: bool) -> list[Side]:
    """Lists the sides of the comparison; the first one is this package.

    Args:
        choice: the dtypes. "default" is the package's own: this package's depends on the device,
            mlx-lm's on the files.
        tensors: the headers of the model's files.
        stock: whether mlx-lm takes part.
    """
    table = "model.embed_tokens"
    stored = tensors.get(f"{table}.scales") or tensors[f"{table}.weight"]
    own = DTYPES[stored.dtype]
    pairs = {
        "default": (default_dtype(), own if mx.issubdtype(own, mx.floating) else mx.bfloat16),
        "float32": (mx.float32, mx.float32),
    }
    wanted = pairs.values() if choice == "both" else [pairs[choice]]
    sides = [
        Side(which, str(dtype).rpartition(".")[2])  # type: ignore[arg-type]
        for pair in wanted
        for which, dtype in zip(("ours", "stock"), pair, strict=True)
        if stock or which == "ours"
    ]
    return list(dict.fromkeys(sides))


def partner(side: Side, sides: list[Side]) -> Side:
    """The side of this package that one of mlx-lm is compared with.

    It has the same dtype, or is the first one.
    """
    ours = [other for other in sides if other.which == "ours"]
    return next((other for other in ours if other.dtype == side.dtype), ours[0])


class Worker:
    """The process of a side, from its start to :meth:`close`.

    Args:
        side: the side.
        directory: the directory of the model.
        divided: how several ranks divide the model, from :func:`mlx_qwen3next.cli.division`.

    Raises:
        WorkerError: the model cannot be loaded.
    """

    def __init__(self, side: Side, directory: Path, divided: Mapping[str, Any]):
        self._name = side.label
        # In a session of its own the worker gets no Ctrl-C; the bench gets it and ends the worker.
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
        """Calls a method of the worker's backend and returns its result.

        Raises:
            WorkerError: the method failed, or the process has died.
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
        return WorkerError(f"{self._name}: its process ended unexpectedly ({how})")

    def close(self) -> None:
        """Ends the process, even if it is busy."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # from flushing an unsent request
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSING)
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
