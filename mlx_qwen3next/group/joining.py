"""Joining the other processes: MLX's group, then connections that prove who is who."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import first_line
from .collectives import Collectives
from .control import Control, read_bytes
from .group import ALONE, Group

JOIN = 60.0  # seconds until all have to be there
_NAMES = 256  # bytes of rank 0's host names in its offer


class JoinedGroup(Collectives):
    """A group of several processes."""

    def __init__(self, engine: mx.distributed.Group):
        super().__init__(engine)
        self.control = Control(self.rank, self.size, connect(self))

    def decide(self, what: str, value: Any) -> Any:
        return self.control.decide(what, value)

    def gather(self, what: str, value: Any) -> list[Any]:
        return self.control.gather(what, value)

    def leave(self, status: int) -> None:
        self.control.leave(status)

    def __enter__(self) -> Group:
        self.control.enter()
        return self

    def __exit__(self, *raised: Any) -> None:
        _, error, _ = raised
        if error is None:
            mx.synchronize()  # the others may need arrays that are on their way
        self.control.exit(error)


def join() -> Group:
    """Returns the group that ``mlx.launch`` (or ``mpirun``) started this process in, or ALONE.

    It is a context: the others are told of its end, and of an error, which ends them, too. Only
    rank 0 prints within it and hears Ctrl-C.

    Raises:
        ValueError: the others cannot be reached, or the hostfile is none.
    """
    try:
        with _limit_wait() if "MLX_RANK" in os.environ else nullcontext():
            group = connected(mx.distributed.init())
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"the other processes cannot be joined: {first_line(error)}") from None
    hostfile = os.environ.get("MLX_HOSTFILE")
    if group.size == 1 and hostfile and os.environ.get("MLX_RANK", "0") != "0":
        raise ValueError(f"MLX_RANK is {os.environ['MLX_RANK']}, but {hostfile} has no other host")
    return group


def connected(group: Group | mx.distributed.Group) -> Group:
    """Returns the group of MLX's group; a :class:`Group` as it is.

    Raises:
        ValueError: the others cannot be reached.
    """
    if isinstance(group, Group):
        return group
    return ALONE if group.size() == 1 else JoinedGroup(group)


@contextmanager
def _limit_wait() -> Iterator[None]:
    """Has another process end this one if the block takes longer than ``JOIN``.

    MLX waits for its neighbours without end, and lets no thread of Python run meanwhile; nor would
    Ctrl-C be noticed.
    """
    text = f"error: the other processes did not come within {JOIN:.0f} s; is the hostfile right?\n"
    watch = [sys.executable, "-ISc", _WATCH, str(JOIN), str(os.getpid()), text]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with subprocess.Popen(watch, stdin=subprocess.PIPE):  # which is closed in the end
            yield
    finally:
        signal.signal(signal.SIGINT, before)


_WATCH = """
import os, select, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if not select.select([0], [], [], float(sys.argv[1]))[0]:
    sys.stderr.write(sys.argv[3])
    os.kill(int(sys.argv[2]), signal.SIGTERM)
"""


def connect(group: Group) -> dict[int, socket.socket]:
    """Connects rank 0 with each of the others, which prove that they belong to it.

    Returns:
        the connections by the rank at their other end: all others on rank 0, rank 0 on the others.
    """
    if group.rank > 0:
        offer = bytes(np.array(group.agree(mx.zeros(32 + 4 + _NAMES, mx.uint8))))
        port, names = int.from_bytes(offer[32:36], "big"), offer[36:].rstrip(b"\0").decode()
        peer = _reach(names.split(), port, offer[:32] + group.rank.to_bytes(4, "big"))
        return {0: peer}
    with socket.create_server(("", 0), backlog=group.size) as server:
        secret = secrets.token_bytes(32)
        port, known = server.getsockname()[1], " ".join(_own_names()).encode()[:_NAMES]
        offer = secret + port.to_bytes(4, "big") + known.ljust(_NAMES, b"\0")
        mx.eval(group.agree(mx.array(np.frombuffer(offer, np.uint8))))
        server.settimeout(JOIN)
        peers: dict[int, socket.socket] = {}
        while len(peers) < group.size - 1:
            peer, _ = server.accept()
            _configure(peer)
            try:
                told = read_bytes(peer, 36)
                if not secrets.compare_digest(told[:32], secret):
                    raise OSError
                peer.sendall(b"!")
                peers[int.from_bytes(told[32:], "big")] = peer
                peer.settimeout(None)
            except OSError:  # somebody else
                peer.close()
    return dict(sorted(peers.items()))


def _own_names() -> Sequence[str]:
    """Returns the names that this machine may be reached by, the likeliest first."""
    names = []
    with (
        suppress(OSError, ValueError, LookupError, TypeError),
        open(os.environ["MLX_HOSTFILE"]) as file,
    ):
        names.append(json.load(file)[0][0].rsplit(":", 1)[0].strip("[]"))
    with suppress(OSError):
        names += [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys([*names, socket.gethostname(), "127.0.0.1"]))


def _reach(names: Sequence[str], port: int, proof: bytes) -> socket.socket:
    """Returns a connection to rank 0, by the first name that works."""
    for name in names:
        with suppress(OSError):
            peer = socket.create_connection((name, port), timeout=5)
            _configure(peer)
            peer.sendall(proof)
            if read_bytes(peer, 1) == b"!":
                peer.settimeout(None)
                return peer
    raise ValueError(f"rank 0 cannot be reached as {', '.join(names)}, port {port}")


def _configure(peer: socket.socket) -> None:
    """Has messages sent at once, and a machine that has gone silently noticed within seconds."""
    peer.settimeout(5)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
    for option, value in ((idle, 3), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 5)):
        if option is not None:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
