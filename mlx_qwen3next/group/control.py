"""The connections over which ranks decide, and learn at once that another has ended."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Queue
from typing import Any, NoReturn

from ..errors import first_line

REPORT = 2.0  # seconds to wait for a process's last words once the engine has lost it
_HEAD = struct.Struct("!Q")  # length of a message


class Control:
    """One rank's connections: rank 0 has one to each of the others, which have one to it.

    Args:
        rank, size: this rank and how many there are.
        peers: a connection for each rank at the other end.
    """

    def __init__(self, rank: int, size: int, peers: Mapping[int, socket.socket]):
        self.rank, self.size, self.peers = rank, size, peers
        self._inbox: dict[int, Queue[tuple[str, Any]]] = {other: Queue() for other in peers}
        self._ended: set[int] = set()  # ranks that have ended as they should
        self._ending = threading.Lock()
        self._writing = threading.RLock()  # Ctrl-C may come while the main thread has it
        self._leaving = False  # whether the others have been told that this one ends
        for other, peer in peers.items():
            threading.Thread(target=self._listen, args=(other, peer), daemon=True).start()

    # --- decisions -----------------------------------------------------------------------------
    def decide(self, what: str, value: Any) -> Any:
        """Returns rank 0's value, as :meth:`Group.decide`."""
        if self.rank == 0:
            for peer in self.peers.values():
                self._send(peer, what, value)
            return value
        return self._receive(0, what)

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns all ranks' values, as :meth:`Group.gather`."""
        if self.rank == 0:
            others = [self._receive(rank, what) for rank in range(1, self.size)]
            return self.decide(what, [value, *others])
        self._send(self.peers[0], what, value)
        return self.decide(what, None)

    # --- messages ------------------------------------------------------------------------------
    def _receive(self, rank: int, what: str) -> Any:
        received, value = self._inbox[rank].get()
        if received != what:
            self._end_by_error(f"rank {rank} is at {received!r}, rank {self.rank} at {what!r}")
        return value

    def _write(self, peer: socket.socket, what: str, value: Any) -> None:
        message = pickle.dumps((what, value))
        with self._writing:
            peer.sendall(_HEAD.pack(len(message)) + message)

    def _send(self, peer: socket.socket, what: str, value: Any) -> None:
        try:
            self._write(peer, what, value)
        except OSError:
            time.sleep(REPORT)  # the thread that listens to it knows more
            self._end_by_error("the connection to another rank was lost")

    def _send_last(self, what: str, value: Any) -> None:
        """Sends the last message to all the others, as far as they can be reached."""
        self._leaving = True
        for peer in self.peers.values():
            with suppress(OSError):
                self._write(peer, what, value)

    def _listen(self, rank: int, peer: socket.socket) -> None:
        """Takes in a rank's messages until it ends; an end out of order ends this rank, too."""
        try:
            while True:
                (length,) = _HEAD.unpack(read_bytes(peer, _HEAD.size))
                what, value = pickle.loads(read_bytes(peer, length))
                if what == "bye":
                    self._ended.add(rank)
                elif what == "end":
                    self._end_with(rank, *value)
                else:
                    self._inbox[rank].put((what, value))
        except Exception:
            if self._leaving:
                return
            if rank not in self._ended:
                time.sleep(0.2)  # MLX has lines of its own, which must not get into ours
                self._end_by_error(f"rank {rank} has ended unexpectedly", is_known_to_all=rank == 0)
            if self.rank > 0:  # whatever this one still waits for will not come
                time.sleep(REPORT)
                os._exit(0)

    # --- the end -------------------------------------------------------------------------------
    def enter(self) -> None:
        """Leaves Ctrl-C and all output to rank 0."""
        if self.rank == 0:
            signal.signal(signal.SIGINT, self._interrupted)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def _interrupted(self, *_: Any) -> None:
        # Not by an exception: the others may go on with something that waits for this one.
        print("\ninterrupted", file=sys.stderr, flush=True)
        self.leave(130)

    def exit(self, error: BaseException | None) -> None:
        """Tells the others that this process ends, and with which error, which ends them, too."""
        if error is None:
            self._send_last("bye", None)
            return
        if isinstance(error, RuntimeError) and str(error).startswith("["):  # [ring], [jaccl], …
            time.sleep(REPORT)  # the thread that listens to the one that ended says more
            self._end_by_error("the connection to another rank was lost")
        if isinstance(error, KeyboardInterrupt):
            self._send_last("end", (130, ""))
        elif isinstance(error, (ValueError, OSError)):
            if self.rank > 0:
                time.sleep(REPORT / 2)  # rank 0 ends all of them if it has the same error
            self._send_last("end", (2, first_line(error)))
        else:
            self._send_last("end", (1, f"{type(error).__name__}: {error}"))

    def leave(self, status: int) -> NoReturn:
        """Ends all the others at once, and with them this process."""
        self._send_last("end", (status, ""))
        with suppress(RuntimeError):  # a signal came within a write, which nobody may enter again
            sys.stdout.flush()
        os._exit(status)

    def _end_with(self, rank: int, status: int, text: str) -> NoReturn:
        """Ends this process as another rank did; rank 0 says why, and passes it on."""
        with self._ending:
            if self.rank == 0:
                self._send_last("end", (status, ""))
                if text:
                    _print_error(f"rank {rank}: {text}")
            os._exit(status)

    def _end_by_error(self, text: str, is_known_to_all: bool = False) -> NoReturn:
        """Ends all ranks. Rank 0 says why, or each one that knows."""
        with self._ending:
            self._send_last("end", (1, "" if self.rank == 0 else text))
            if self.rank == 0 or is_known_to_all:
                _print_error(text)
            os._exit(1)


def read_bytes(peer: socket.socket, count: int) -> bytes:
    """Returns the next ``count`` bytes of a connection.

    Raises:
        OSError: the connection ended before.
    """
    parts = bytearray()
    while len(parts) < count:
        if not (part := peer.recv(count - len(parts))):
            raise ConnectionResetError
        parts += part
    return bytes(parts)


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.__stderr__, flush=True)
