"""Replacing a file in one step, so that no reader ever sees half of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"  # ends the names of files and folders that are not whole yet


@contextmanager
def replacing(file: Path, ending: str = PARTIAL) -> Iterator[Path]:
    """Gives a path beside the file to write to, which takes the file's place at the end.

    The new file's data is on disk (fsync) before it is renamed. If the block or the renaming fails,
    the file is as it was and nothing is left beside it; a process that is killed may leave the path
    beside it.

    Args:
        file: the file to make or to replace, in a directory that exists.
        ending: makes the other path's name, behind the file's name. Processes that may write the
            file at the same time need different ones.

    Raises:
        OSError: the file cannot be written.
    """
    beside = file.with_name(file.name + ending)
    try:
        yield beside
        descriptor = os.open(beside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, file)
    except BaseException:
        with suppress(OSError):  # the error under way says more
            beside.unlink()
        raise


def write_text(file: Path, text: str, ending: str = PARTIAL) -> None:
    """Replaces a file by a text in UTF-8; see :func:`replacing`.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(file, ending) as beside:
        beside.write_text(text, encoding="utf-8")
