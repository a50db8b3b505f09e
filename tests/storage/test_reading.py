"""Reads by several threads: whole or an error that names the file, and no write after the end."""

import os
import threading

import numpy as np
import pytest

from mlx_qwen3next.storage import reading
from mlx_qwen3next.storage.reading import Piece, Reader


@pytest.fixture
def file(tmp_path):
    """A file of 4,000 bytes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((np.arange(4000) % 251).astype(np.uint8).tobytes())
    return path


def pieces(file, *places):
    return [Piece(file, start, np.zeros(n, np.uint8)) for start, n in places]


def read(reader, some):
    reads = reader.reading(some)
    reads.start()
    reads.wait()
    return [bytes(piece.into) for piece in some]


PLACES = [(300, 50), (0, 100), (100, 200), (2000, 1), (3990, 10), (350, 5)]


def expected(file, places=PLACES):
    whole = file.read_bytes()
    return [whole[start : start + n] for start, n in places]


def test_pieces_are_read_and_neighbours_together(file, monkeypatch):
    calls, preadv = [], os.preadv

    def counted(descriptor, buffers, start):
        calls.append(len(buffers))
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", counted)
    reader = Reader([file])
    assert read(reader, pieces(file, *PLACES)) == expected(file)
    assert sorted(calls) == [1, 1, 4]
    assert reader.bytes == sum(n for _, n in PLACES) and reader.waited > 0


def test_a_read_that_stops_early_goes_on(file, monkeypatch):
    preadv = os.preadv

    def short(descriptor, buffers, start):
        if len(buffers) > 1:
            return preadv(descriptor, [*buffers[:1], buffers[1][:7]], start)
        return preadv(descriptor, [buffers[0][:3]], start)

    monkeypatch.setattr(os, "preadv", short)
    assert read(Reader([file]), pieces(file, *PLACES)) == expected(file)


def test_a_file_that_is_removed_or_replaced_is_read_to_the_end(file):
    reader, want = Reader([file]), expected(file)
    other = file.with_name("other")
    other.write_bytes(bytes(4000))
    os.replace(other, file)
    assert read(reader, pieces(file, *PLACES)) == want
    file.unlink()
    assert read(reader, pieces(file, *PLACES)) == want


def truncate(file):
    os.truncate(file, 3995)


def change(file):
    with file.open("r+b") as stream:
        stream.write(b"other")
    os.utime(file, ns=(0, 0))


@pytest.mark.parametrize(
    ("fault", "message"), [(truncate, "has been truncated"), (change, "has changed since")]
)
def test_a_file_that_is_changed_is_refused(file, fault, message):
    reader = Reader([file])
    fault(file)
    for _ in range(2):
        with pytest.raises(OSError, match=rf"model\.safetensors {message}"):
            read(reader, pieces(file, *PLACES))
    assert reader.bytes == 0


def test_a_failing_read_ends_the_others(file, monkeypatch):
    def failing(descriptor, buffers, start):
        raise OSError(5, "Input/output error")

    reader = Reader([file])
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read: Input/output error"):
        read(reader, pieces(file, *((4 * i, 1) for i in range(100))))
    monkeypatch.undo()
    assert read(reader, pieces(file, *PLACES)) == expected(file)


def test_a_disk_that_does_not_answer_is_given_up(file, monkeypatch):
    released, preadv = threading.Event(), os.preadv

    def stuck(descriptor, buffers, start):
        released.wait()
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", stuck)
    monkeypatch.setattr(reading, "PATIENCE", 0.02)
    reader = Reader([file])
    some = pieces(file, *PLACES)
    reads = reader.reading(some)
    reads.start()
    try:
        for wait in (reads.wait, reads.end):
            with pytest.raises(OSError, match=r"model\.safetensors .* no answer in 0\.02 seconds"):
                wait()
    finally:
        released.set()
    monkeypatch.setattr(reading, "PATIENCE", 60)
    reads.end()  # then nothing writes any more
    assert reads._active == 0


def test_what_has_not_begun_at_the_end_is_not_read(file):
    reader = Reader([file])
    reads = reader.reading(some := pieces(file, *PLACES))
    reads.end()
    reads.start()
    reader._pool.shutdown()
    assert not any(piece.into.any() for piece in some)


def test_bytes_of_reads_that_are_given_up_count(file):
    reader = Reader([file])
    reads = reader.reading(pieces(file, *PLACES))
    reads.start()
    with reads._changed:
        reads._wait_while(lambda: not reads.is_done)
    reads.give_up()
    assert reader.bytes == sum(n for _, n in PLACES) and not reads.is_sound


def test_what_is_done_with_bytes_is_done_when_the_wait_ends(file):
    reader, done = Reader([file]), []
    some = [
        piece._replace(then=lambda i=i, piece=piece: done.append((i, bytes(piece.into))))
        for i, piece in enumerate(pieces(file, *PLACES))
    ]
    read(reader, some)
    assert sorted(done) == [*enumerate(expected(file))]


def test_a_failure_with_bytes_is_raised(file):
    def failing():
        raise ValueError("no luck")

    (piece,) = pieces(file, (0, 100))
    with pytest.raises(ValueError, match="no luck"):
        read(Reader([file]), [piece._replace(then=failing)])
