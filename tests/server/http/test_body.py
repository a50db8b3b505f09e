"""Bodies of requests that come in chunks, over real sockets."""

import contextlib
import json
import logging
import socket

import pytest
from helpers_server import NAMES, TEXT, Fake, connected, everything, serving, strict_json, until

from mlx_qwen3next.server.http import handler
from mlx_qwen3next.server.http.handler import Settings

CHUNKED = f"POST {TEXT} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n".encode()


def in_chunks(raw, size, extension=b""):
    """The bytes of a body in chunks."""
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    lines = [b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts]
    return b"".join(lines) + b"0\r\n"


@pytest.mark.parametrize(
    ("size", "extension", "fields"),
    [
        (10**6, b"", b""),
        (1, b"", b""),
        (7, b";a=b", b""),
        (7, b" ;a", b"Checksum: 5\r\nX: y\r\n"),
        (26, b"", b""),
    ],
)
def test_a_body_in_chunks_is_read(size, extension, fields):
    generator = Fake()
    body = json.dumps({"prompt": "Once é upon"}).encode()
    raw = CHUNKED + b"\r\n" + in_chunks(body, size, extension) + fields + b"\r\n"
    with serving(generator) as server, connected(server, raw) as connection:
        assert everything(connection).startswith(b"HTTP/1.0 200 ")
    assert generator.requests[0][0] == "Once é upon"


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"x\r\n", 400),
        (b"\r\n", 400),
        (b"-1\r\n", 400),
        (b"0x2\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\n{}\n0\n\n", 400),
        (b"2 x\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\r\n{}x\r\n0\r\n\r\n", 400),
        (b"3\r\n{}\r\n0\r\n\r\n", 400),
        (b"f" * 16 + b"\r\n", 400),
        (b"2;" + b"x" * 5000 + b"\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\r\n{}\r\n0\r\nno field\r\n\r\n", 400),
        (b"f" * 15 + b"\r\n", 413),
        (b"3e9\r\n", 413),
        (b"1f4\r\n" + b" " * 500 + b"\r\n1f5\r\n", 413),
    ],
)
def test_chunks_that_are_malformed_or_too_many_are_refused(chunks, status):
    settings = Settings(names=NAMES, max_body_bytes=1000)
    with serving(settings=settings) as server:
        with connected(server, CHUNKED + b"\r\n" + chunks) as connection:
            connection.shutdown(socket.SHUT_WR)
            head, _, body = everything(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 %d " % status)
        assert strict_json(body)["error"]["type"] == "invalid_request_error"


def test_a_body_has_one_kind_of_length():
    generator = Fake()
    body = in_chunks(b'{"prompt": "Hi"}', 99) + b"\r\n"
    raw = CHUNKED + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with serving(generator) as server, connected(server, raw) as connection:
        assert everything(connection).startswith(b"HTTP/1.0 400 ")
    assert not generator.requests


@pytest.mark.parametrize(
    "sent", [b"", b"5", b"5\r\n", b"5\r\n{", b"2\r\n{}\r\n", b"0\r\n", b"0\r\nA:"]
)
def test_chunks_that_end_early_are_not_completed(sent, caplog):
    generator = Fake()
    caplog.set_level(logging.INFO)
    raw = CHUNKED + b"\r\n" + sent
    with serving(generator) as server, connected(server, raw) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""
    assert not generator.requests
    assert [r for r in caplog.records if "the body ended" in r.message]


def test_chunks_that_never_end_meet_the_deadline(monkeypatch):
    monkeypatch.setattr(handler.Handler, "timeout", 0.2)
    with serving() as server, connected(server, CHUNKED + b"\r\n") as slow:
        until(lambda: not server.wait(0))
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                slow.sendall(b"1\r\n \r\n")
                if server.wait(0.05):
                    break
        assert server.wait(0)
