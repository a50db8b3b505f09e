"""The processes that run one model together, and how they agree.

All run the same program. Arrays go through MLX's collectives (``mx.distributed``: ring, JACCL,
MPI, NCCL). Whatever a program may decide differently from process to process (by the clock, by a
client, by chance) rank 0 decides: of arrays in the graph (:meth:`Group.agree`), of all else over
connections of our own (:meth:`Group.decide`), which neither wait for the device nor keep it
waiting. By the same connections every process learns at once that another has ended.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from queue import Queue
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from ..errors import first_line

JOIN = 60.0  # seconds until all have to be there
REPORT = 2.0  # seconds to wait for a process's last words once the engine has lost it
_HEAD = struct.Struct("!Q")  # length of a message
_NAME = 256  # bytes of rank 0's host names


class Group:
    """Ranks 0 to ``size - 1``. This one is for a process that is alone: nothing to be done."""

    rank = 0
    size = 1

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of all ranks' arrays, on each of them."""
        return x

    def all_gather(self, x: mx.array) -> mx.array:
        """All ranks' arrays, joined along the last axis, on each of them."""
        return x

    def agree(self, x: mx.array) -> mx.array:
        """Rank 0's array, on each of them."""
        return x

    def decide(self, what: str, value: Any) -> Any:
        """Rank 0's value; it need not make sense on the others. Rank 0 does not wait for them.

        Args:
            what: is decided; the same on all ranks, or they have lost each other.
        """
        return value

    def gather(self, what: str, value: Any) -> list[Any]:
        """All ranks' values, in order."""
        return [value]

    def from_before(self, x: mx.array) -> mx.array:
        """In a pipeline what the rank before gives, on the first ``x``; it looks like ``x``."""
        return x

    def from_last(self, x: mx.array) -> mx.array:
        """In a pipeline what the last rank gives, on each of them; this one gives ``x`` to the
        next."""
        return x

    def leave(self, status: int) -> None:
        """Ends all the others at once, and with them this process."""

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass


ALONE = Group()


def join() -> Group:
    """The group that ``mlx.launch`` (or ``mpirun``) started this process in; ALONE if in none.

    To be used as a context: its end is told to the others, an error as well, which ends them too.
    Only rank 0 prints from then on; the others leave Ctrl-C to it.

    Raises:
        ValueError: the others cannot be reached, or the hostfile is none.
    """
    try:
        with _limited() if "MLX_RANK" in os.environ else nullcontext():
            group = connected(mx.distributed.init())
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"the other processes cannot be joined: {first_line(error)}") from None
    hostfile = os.environ.get("MLX_HOSTFILE")
    if group.size == 1 and hostfile and os.environ.get("MLX_RANK", "0") != "0":
        raise ValueError(f"MLX_RANK is {os.environ['MLX_RANK']}, but {hostfile} has no other host")
    return group


def connected(group: Group | mx.distributed.Group) -> Group:
    """The group of an engine's group, unless it is one already.

    Raises:
        ValueError: the others cannot be reached.
    """
    if isinstance(group, Group):
        return group
    return ALONE if group.size() == 1 else _Connected(group)


@contextmanager
def _limited() -> Iterator[None]:
    """Has another process end this one if what is done here takes longer than ``JOIN``.

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


class _Connected(Group):
    """A group of several."""

    def __init__(self, engine: mx.distributed.Group):
        self._engine, self.rank, self.size = engine, engine.rank(), engine.size()
        self._inbox: list[Queue[tuple[str, Any]]] = [Queue() for _ in range(self.size)]
        self._last: mx.array | None = None  # collective
        self._gone: set[int] = set()  # ranks that have ended as they should
        self._ending = threading.Lock()
        self._writing = threading.RLock()  # Ctrl-C may come while the main thread has it
        self._leaving = False  # whether the others have been told that this one ends
        self._peers = _connect(self)
        for rank, peer in self._peers.items():
            threading.Thread(target=self._listen, args=(rank, peer), daemon=True).start()

    # --- arrays --------------------------------------------------------------------------------
    # Ranks may have other graphs (one has the shared expert), and MLX runs what does not depend on
    # each other in any order. So each collective is made to depend on the one before.
    def _ordered(self, x: mx.array) -> mx.array:
        return x if self._last is None else mx.depends(x, self._last)

    def all_sum(self, x: mx.array) -> mx.array:
        self._last = mx.distributed.all_sum(self._ordered(x), group=self._engine)
        return self._last

    def all_gather(self, x: mx.array) -> mx.array:
        parts = mx.distributed.all_gather(self._ordered(x[None]), group=self._engine)
        self._last = parts  # [size, …, n]
        return mx.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)

    def agree(self, x: mx.array) -> mx.array:
        return self.all_sum(x if self.rank == 0 else mx.zeros_like(x))

    def from_before(self, x: mx.array) -> mx.array:
        if self.rank == 0:
            return x
        if self._last is not None:
            mx.async_eval(self._last)  # which nothing can be made to depend on
        self._last = mx.distributed.recv_like(x, self.rank - 1, group=self._engine)
        return self._last

    def from_last(self, x: mx.array) -> mx.array:
        if self.rank < self.size - 1:
            sent = mx.distributed.send(self._ordered(x), self.rank + 1, group=self._engine)
            self._last, x = sent, mx.depends(mx.zeros_like(x), sent)
        x = self.all_sum(x)
        # Others wait for what is sent here, whether the result is looked at here or not.
        mx.async_eval(x)
        return x

    # --- decisions -----------------------------------------------------------------------------
    def decide(self, what: str, value: Any) -> Any:
        if self.rank == 0:
            for peer in self._peers.values():
                self._send(peer, what, value)
            return value
        return self._receive(0, what)

    def gather(self, what: str, value: Any) -> list[Any]:
        if self.rank == 0:
            others = [self._receive(rank, what) for rank in range(1, self.size)]
            return self.decide(what, [value, *others])
        self._send(self._peers[0], what, value)
        return self.decide(what, None)

    def _receive(self, rank: int, what: str) -> Any:
        told, value = self._inbox[rank].get()
        if told != what:
            self._fail(f"rank {rank} is at {told!r}, rank {self.rank} at {what!r}")
        return value

    def _write(self, peer: socket.socket, what: str, value: Any) -> None:
        message = pickle.dumps((what, value))
        with self._writing:
            peer.sendall(_HEAD.pack(len(message)) + message)

    def _send(self, peer: socket.socket, what: str, value: Any) -> None:
        try:
            self._write(peer, what, value)
        except OSError:
            time.sleep(REPORT)  # whoever listens to it knows more
            self._fail("the connection to another rank was lost")

    def _listen(self, rank: int, peer: socket.socket) -> None:
        """Takes what a rank sends, until it ends; if that is no orderly end, so does this one."""
        try:
            while True:
                what, value = pickle.loads(_read(peer, _HEAD.unpack(_read(peer, _HEAD.size))[0]))
                if what == "bye":
                    self._gone.add(rank)
                elif what == "end":
                    self._stop(rank, *value)
                else:
                    self._inbox[rank].put((what, value))
        except Exception:
            if self._leaving:
                return
            if rank not in self._gone:
                time.sleep(0.2)  # MLX has lines of its own, which must not get into ours
                self._fail(f"rank {rank} has ended unexpectedly", by_all=rank == 0)
            if self.rank > 0:  # whatever this one still waits for will not come
                time.sleep(REPORT)
                os._exit(0)

    # --- the end -------------------------------------------------------------------------------
    def __enter__(self) -> Group:
        if self.rank == 0:
            signal.signal(signal.SIGINT, self._interrupted)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout = sys.stderr = open(os.devnull, "w")
        return self

    def _interrupted(self, *_: Any) -> None:
        # Not by an exception: what the others go on with would wait for this one.
        print("\ninterrupted", file=sys.stderr, flush=True)
        self.leave(130)

    def __exit__(self, *raised: Any) -> None:
        _, error, _ = raised
        if error is None:
            mx.synchronize()  # the others may need what is on its way
            self._tell("bye", None)
            return
        if isinstance(error, RuntimeError) and str(error).startswith("["):  # [ring], [jaccl], …
            time.sleep(REPORT)  # whoever listens to the one that ended says more
            self._fail("the connection to another rank was lost")
        if isinstance(error, KeyboardInterrupt):
            self._tell("end", (130, ""))
        elif isinstance(error, (ValueError, OSError)):
            if self.rank > 0:
                time.sleep(REPORT / 2)  # rank 0 ends all of them if it has the same error
            self._tell("end", (2, first_line(error)))
        else:
            self._tell("end", (1, f"{type(error).__name__}: {error}"))

    def leave(self, status: int) -> NoReturn:
        self._tell("end", (status, ""))
        sys.stdout.flush()
        os._exit(status)

    def _tell(self, what: str, value: Any) -> None:
        self._leaving = True
        for peer in self._peers.values():
            with suppress(OSError):
                self._write(peer, what, value)

    def _stop(self, rank: int, status: int, text: str) -> NoReturn:
        """Ends as another rank did; rank 0 says why, and passes it on."""
        with self._ending:
            if self.rank == 0:
                self._tell("end", (status, ""))
                if text:
                    _say(f"rank {rank}: {text}")
            os._exit(status)

    def _fail(self, text: str, by_all: bool = False) -> NoReturn:
        """Ends all. Rank 0 says why, or each one that knows."""
        with self._ending:
            self._tell("end", (1, "" if self.rank == 0 else text))
            if self.rank == 0 or by_all:
                _say(text)
            os._exit(1)


def _connect(group: _Connected) -> dict[int, socket.socket]:
    """A connection from rank 0 to each of the others, which prove that they belong to it."""
    if group.rank > 0:
        offer = bytes(np.array(group.agree(mx.zeros(32 + 4 + _NAME, mx.uint8))))
        port, names = int.from_bytes(offer[32:36], "big"), offer[36:].rstrip(b"\0").decode()
        peer = _dial(names.split(), port, offer[:32] + group.rank.to_bytes(4, "big"))
        return {0: peer}
    with socket.create_server(("", 0), backlog=group.size) as server:
        secret = secrets.token_bytes(32)
        port, known = server.getsockname()[1], " ".join(_own_names()).encode()[:_NAME]
        offer = secret + port.to_bytes(4, "big") + known.ljust(_NAME, b"\0")
        mx.eval(group.agree(mx.array(np.frombuffer(offer, np.uint8))))
        server.settimeout(JOIN)
        peers: dict[int, socket.socket] = {}
        while len(peers) < group.size - 1:
            peer, _ = server.accept()
            _set_up(peer)
            try:
                told = _read(peer, 36)
                if not secrets.compare_digest(told[:32], secret):
                    raise OSError
                peer.sendall(b"!")
                peers[int.from_bytes(told[32:], "big")] = peer
                peer.settimeout(None)
            except OSError:  # somebody else
                peer.close()
    return dict(sorted(peers.items()))


def _own_names() -> Sequence[str]:
    """What the others may reach this machine as, the likeliest first."""
    names = []
    with (
        suppress(OSError, ValueError, LookupError, TypeError),
        open(os.environ["MLX_HOSTFILE"]) as file,
    ):
        names.append(json.load(file)[0][0].rsplit(":", 1)[0].strip("[]"))
    with suppress(OSError):
        names += [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys([*names, socket.gethostname(), "127.0.0.1"]))


def _dial(names: Sequence[str], port: int, proof: bytes) -> socket.socket:
    for name in names:
        with suppress(OSError):
            peer = socket.create_connection((name, port), timeout=5)
            _set_up(peer)
            peer.sendall(proof)
            if _read(peer, 1) == b"!":
                peer.settimeout(None)
                return peer
    raise ValueError(f"rank 0 cannot be reached as {', '.join(names)}, port {port}")


def _set_up(peer: socket.socket) -> None:
    """Messages at once, and a machine that is gone without a word noticed within seconds."""
    peer.settimeout(5)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
    for option, value in ((idle, 3), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 5)):
        if option is not None:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


def _read(peer: socket.socket, count: int) -> bytes:
    """So many bytes.

    Raises:
        OSError: the connection ended before.
    """
    parts = bytearray()
    while len(parts) < count:
        if not (part := peer.recv(count - len(parts))):
            raise ConnectionResetError
        parts += part
    return bytes(parts)


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.__stderr__, flush=True)
