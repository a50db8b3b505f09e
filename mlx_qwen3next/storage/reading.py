"""Reads of many places at once, by a few threads, straight into memory that is there already.

A disk is fastest when it has several reads to do. The files are opened once and stay open, so a
file that is removed or replaced by another is read to the end. One that is changed in its place is
found out: nothing read from it counts.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

THREADS = 8  # measured: 4 to 16 read as fast
LONGEST = 1 << 23  # bytes of a read that neighbours share
MOST_BUFFERS = 512  # of a read; systems take 1,024
PATIENCE = 60.0  # seconds without a byte after which a disk is given up


class Piece(NamedTuple):
    """A place in a file, and the memory that takes its bytes."""

    file: Path
    start: int  # in bytes
    into: np.ndarray  # writeable and contiguous; its size is that of the piece
    then: Callable[[], None] | None = None  # what the thread does with them; with NumPy alone


class Reader:
    """A few threads that read from files which stay open.

    Args:
        files: those to be read.

    Attributes:
        bytes: that have been read. waited: seconds in which somebody waited for them.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, files: Iterable[Path]):
        self.bytes, self.waited = 0, 0.0
        self._files: dict[Path, tuple[int, tuple[int, int]]] = {}
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            _bypass_page_cache(descriptor)
            self._files[file] = descriptor, _state(descriptor)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")

    def __del__(self) -> None:
        for descriptor, _ in self._files.values():
            os.close(descriptor)

    def reading(self, pieces: Iterable[Piece]) -> Reading:
        """Returns the reads of pieces, still to be started; neighbours in a file share a read."""
        runs: list[list[Piece]] = []
        end, size = (Path(), 0), 0
        for piece in sorted(pieces, key=lambda piece: piece[:2]):
            follows = runs and (piece.file, piece.start) == end
            if not follows or size >= LONGEST or len(runs[-1]) == MOST_BUFFERS:
                runs.append([])
                size = 0
            runs[-1].append(piece)
            size += piece.into.nbytes
            end = piece.file, piece.start + piece.into.nbytes
        return Reading(self, runs)

    def rate(self, pieces: Iterable[Piece], seconds: float = 1.0) -> float:
        """Measures how many bytes a second the disk gives.

        Args:
            pieces: those to be read, until the time is up; their memory may be the same.

        Raises:
            OSError: one cannot be read.
        """
        left, start, done = iter(pieces), time.perf_counter(), 0
        while some := list(islice(left, 4 * THREADS)):
            reading = self.reading(some)
            reading.start()
            reading.wait()
            done += sum(piece.into.nbytes for piece in some)
            if time.perf_counter() - start > seconds:
                break
        self.bytes, self.waited = 0, 0.0
        return done / (time.perf_counter() - start)

    def submit(self, work: Callable[[], None]) -> None:
        """Has work done by one of the threads."""
        self._pool.submit(work)

    def check(self, files: Iterable[Path]) -> None:
        """Checks that files are as they were when they were opened.

        Raises:
            OSError: one is not.
        """
        for file in files:
            descriptor, before = self._files[file]
            if _state(descriptor) != before:
                raise OSError(f"{file} has changed since the model was loaded; load it again")

    def read(self, run: Sequence[Piece]) -> int:
        """Reads neighbours, all of them or none that counts, and returns their bytes."""
        file, start, *_ = run[0]
        left = [piece.into.data.cast("B") for piece in run]
        total = sum(map(len, left))
        done = 0
        while left:
            try:
                count = os.preadv(self._files[file][0], left, start + done)
            except OSError as error:
                raise OSError(f"{file} cannot be read: {error.strerror}") from None
            if count == 0:
                raise OSError(f"{file} has been truncated since the model was loaded")
            done += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        return total


class Reading:
    """Reads that are started together, and waited for together."""

    def __init__(self, reader: Reader, runs: Sequence[Sequence[Piece]]):
        self._reader, self._runs = reader, runs
        self._changed = threading.Condition()
        self._left, self._active, self._is_over = len(runs), 0, False
        self._bytes = 0
        self._error: Exception | None = None

    def start(self) -> None:
        """Starts the reads."""
        for run in self._runs:
            self._reader.submit(partial(self._read, run))

    def wait(self) -> None:
        """Waits until all has been read.

        Raises:
            OSError: something could not be read, or the disk does not answer; the message names the
                file. In the latter case a read may still write.
        """
        with self._changed:
            self._wait_while(lambda: self._left > 0 and self._error is None)
        self.end()
        if self._error is not None:
            raise self._error
        self._reader.check({run[0].file for run in self._runs})
        self._reader.bytes += self._bytes

    def end(self) -> None:
        """Lets no further read begin, and waits until none writes any more.

        Raises:
            OSError: the disk does not answer.
        """
        with self._changed:
            self._is_over = True
            self._wait_while(lambda: self._active > 0)

    def give_up(self) -> None:
        """Ends the reads, for nobody wants them any more.

        Raises:
            OSError: the disk does not answer.
        """
        self.end()
        self._reader.bytes += self._bytes

    @property
    def is_done(self) -> bool:
        """Whether all has been read, or has failed."""
        return self._left == 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing has failed, and nobody has ended the reads."""
        return not self._is_over and self._error is None

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        start = time.perf_counter()
        try:
            while condition():
                before = self._left
                if not self._changed.wait(PATIENCE) and self._left == before:
                    file = self._runs[0][0].file
                    raise OSError(f"{file} cannot be read: no answer in {PATIENCE:g} seconds")
        finally:
            self._reader.waited += time.perf_counter() - start

    def _read(self, run: Sequence[Piece]) -> None:
        with self._changed:
            if self._is_over:
                return
            self._active += 1
        count = 0
        error: Exception | None = None
        try:
            count = self._reader.read(run)
            for piece in run:
                if piece.then is not None:
                    piece.then()
        except Exception as failure:  # for the thread that waits
            error = failure
        with self._changed:
            self._active -= 1
            self._left -= 1
            self._bytes += count
            self._error = self._error or error
            self._changed.notify_all()


def _state(descriptor: int) -> tuple[int, int]:
    """Returns a file's size and the time of its last change, which tell of new content."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _bypass_page_cache(descriptor: int) -> None:
    """Asks the system to keep nothing of a file in memory, or not to read ahead of us."""
    if hasattr(fcntl, "F_NOCACHE"):  # macOS
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
