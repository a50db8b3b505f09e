"""The body of an HTTP request: of a given length, or in chunks (RFC 9112, sections 6 and 7.1)."""

from __future__ import annotations

import re
from email.message import Message
from io import BufferedIOBase

from ..requests.checks import RequestError

_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r\n")
_MAX_LINE = 2**12  # bytes of the line before a chunk, and of a field after the last chunk


def read_body(headers: Message, stream: BufferedIOBase, limit: int) -> bytes:
    """Reads the body of a request.

    Args:
        headers: those of the request.
        stream: the bytes after the headers.
        limit: the most bytes that the body may have.

    Raises:
        RequestError: the headers give no length, the body is too large, or its chunks are
            malformed.
        ConnectionAbortedError: the stream ends before the body does.
    """
    coding, length = headers.get("Transfer-Encoding"), headers.get("Content-Length")
    if coding is not None:
        if length is not None:
            raise RequestError(
                "a request must not have both Content-Length and Transfer-Encoding; send one"
            )
        if coding.strip().lower() != "chunked":
            raise RequestError(f"Transfer-Encoding must be chunked, got {coding[:40]!r}")
        return _read_chunks(stream, limit)
    if length is None:
        message = "a request must have the header Content-Length, or Transfer-Encoding: chunked"
        raise RequestError(message, status=411)
    if not (length.isascii() and length.isdigit()):
        raise RequestError(f"Content-Length must be a number of bytes, got {length[:40]!r}")
    if len(length) > 15 or int(length) > limit:
        raise _too_large(limit, length[:40])
    return _read_exactly(stream, int(length))


def _read_chunks(stream: BufferedIOBase, limit: int) -> bytes:
    body = bytearray()
    while size := _read_size(stream):
        if len(body) + size > limit:
            raise _too_large(limit, "more")
        body += _read_exactly(stream, size)
        if (end := _read_exactly(stream, 2)) != b"\r\n":
            raise _malformed(end)
    while (line := _read_line(stream)) != b"\r\n":  # fields after the body, which say nothing here
        if b":" not in line:
            raise _malformed(line)
    return bytes(body)


def _read_size(stream: BufferedIOBase) -> int:
    """Reads the line before a chunk and returns the chunk's number of bytes."""
    line = _read_line(stream)
    if not (head := _CHUNK_HEAD.fullmatch(line)):
        raise _malformed(line)
    return int(head[1], 16)


def _read_line(stream: BufferedIOBase) -> bytes:
    line = stream.readline(_MAX_LINE)
    if line.endswith(b"\r\n"):
        return line
    if line.endswith(b"\n") or len(line) == _MAX_LINE:
        raise _malformed(line)
    raise ConnectionAbortedError("the body ended within its chunks")


def _read_exactly(stream: BufferedIOBase, size: int) -> bytes:
    raw = stream.read(size)
    if len(raw) < size:
        raise ConnectionAbortedError(f"the body ended after {len(raw)} of {size} bytes")
    return raw


def _too_large(limit: int, got: str) -> RequestError:
    return RequestError(f"the body must be of at most {limit} bytes, got {got}", status=413)


def _malformed(line: bytes) -> RequestError:
    return RequestError(f"the body is not made of chunks: {line[:40]!r} is out of place")
