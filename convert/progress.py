"""The progress of a conversion, kept on disk so that the same command can go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_qwen3next.storage.replacing import PARTIAL, write_text

PROGRESS_FILE = "progress.json"
STREAMED = "source"  # the folder of weight files that are kept only as long as they are needed
CALIBRATION = "calibration.json"  # what --fit has measured
HIDDEN = "calibration.safetensors"  # hidden states, while it measures


class Progress:
    """The progress of a task in a folder, which one process at a time may work in.

    Attributes:
        folder: the folder to write in.
        done: the number of finished chunks.
    """

    def __init__(self, folder: Path, task: Mapping[str, Any]):
        """Begins the task in a new folder, or takes it up where it was left.

        Args:
            task: identifies the task, as JSON values; another task is not taken up.

        Raises:
            ValueError: the folder is another task's or no task's, or another process is at work in
                it, or it cannot be written.
        """
        self.folder, self._task = folder, json.loads(json.dumps(task))
        self._file = folder / PROGRESS_FILE
        self.done = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._take_up()
            except BaseException:
                os.close(self._lock)
                raise
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another conversion") from None
        except OSError as error:
            where = error.filename or folder
            raise ValueError(f"{where} cannot be written: {error.strerror}") from None

    def _take_up(self) -> None:
        contents = {path.name for path in self.folder.iterdir()} - {STREAMED, CALIBRATION, HIDDEN}
        if not contents - {PROGRESS_FILE + PARTIAL}:
            return self.record(0)
        try:
            saved = json.loads(self._file.read_text())
            task, self.done = dict(saved["task"]), int(saved["done"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.folder} exists, but is no conversion that could go on. Move it away or "
                "choose another --mlx-path."
            ) from None
        if task != self._task:
            keys = sorted(k for k in {*task, *self._task} if task.get(k) != self._task.get(k))
            raise ValueError(
                f"{self.folder} holds another conversion, with different {', '.join(keys)}. Finish "
                "it with its own command, delete the folder to give it up, or choose another "
                "--mlx-path."
            )

    def record(self, done: int) -> None:
        """Writes to disk that so many chunks are finished.

        Raises:
            OSError: the file cannot be written.
        """
        self.done = done
        write_text(self._file, json.dumps({"task": self._task, "done": done}) + "\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._lock)


@contextmanager
def saying_how_to_go_on(progress: Progress, total: int) -> Iterator[None]:
    """Adds to the message of an interrupt or a disk error how the conversion goes on.

    Args:
        total: the value of ``progress.done`` at the end.
    """
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        state = (
            f"with {progress.done / total:.0%} done; the same command goes on from there, "
            f"deleting {progress.folder} gives it up"
        )
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted {state}") from None
        where = error.filename or progress.folder
        raise ValueError(f"{where}: {error.strerror or error}, {state}") from None
