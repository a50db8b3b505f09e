"""The listening socket of the server, with a thread for every connection."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from ...errors import first_line
from ..requests.checks import RequestError

MAX_CONNECTIONS = 512  # at a time
RETRY = {"Retry-After": "5"}  # seconds; the header of an answer with status 429 or 503


class Server(ThreadingHTTPServer):
    """Listens on a port and handles every connection in a thread of its own.

    Args:
        host, port: the address; port 0 takes a free port, which ``server_address`` tells.
        handler: makes a handler from a connection, the client's address and this server.

    Raises:
        OSError: the host is unknown, or the port is taken.
    """

    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: Callable[..., BaseHTTPRequestHandler]):
        self._connections, self._change = 0, threading.Condition()
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Binds without looking up the host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def wait(self, seconds: float) -> bool:
        """Waits until no connection is open; returns whether that happened in time."""
        with self._change:
            return self._change.wait_for(lambda: not self._connections, seconds)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._change:
            full = self._connections >= MAX_CONNECTIONS
            self._connections += not full
        if full:
            self._turn_away(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._count_down()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._count_down()

    def _count_down(self) -> None:
        with self._change:
            self._connections -= 1
            self._change.notify_all()

    def _turn_away(self, connection: socket.socket) -> None:
        """Answers with status 503, without a thread and without waiting."""
        message = f"the server has {MAX_CONNECTIONS} connections already; try again"
        body = json.dumps(RequestError(message, status=503).body)
        lines = ["HTTP/1.0 503 Service Unavailable", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in RETRY.items()]
        lines += [f"Content-Length: {len(body)}", "", body]
        connection.setblocking(False)
        try:
            connection.send("\r\n".join(lines).encode())
        except OSError as error:
            logging.info("turned away: %s", first_line(error))
        self.shutdown_request(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs the error that ended a connection, for debugging if the client has gone."""
        error = sys.exception()
        if isinstance(error, OSError):
            logging.debug("%s is gone: %s", client_address[0], error)
        else:
            logging.error("%s: the connection failed", client_address[0], exc_info=error)


class Incoming(io.RawIOBase):
    """The bytes that a client sends, up to a deadline that holds for all of them together.

    Args:
        connection: the socket.
        seconds: the time until the deadline.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection = connection
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        return self._connection.recv_into(buffer)
