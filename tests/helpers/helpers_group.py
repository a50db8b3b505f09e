"""Several processes on this machine that run one model together, over MLX's ring."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import forked
from forked import TIMEOUT
from polite import polite

PROGRAM = Path(__file__).parent / "rank.py"


def free_port():
    """One that nothing is given by chance before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def hostfile(directory, count):
    file = Path(directory) / "hosts.json"
    file.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(count)]))
    return file


@contextmanager
def processes(directory, count, commands, hosts=None):
    """Runs Python with arguments in each rank (one list for all of them, or one each)."""
    if not isinstance(commands[0], (list, tuple)):
        commands = [commands] * count
    hosts = hosts or hostfile(directory, count)
    started = []
    # Ctrl-C must not be ignored in them, whatever started the tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for rank, command in enumerate(commands):
            own = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            started.append(
                forked.Popen(
                    [sys.executable, *map(str, command)],
                    env=os.environ | polite() | own,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        signal.signal(signal.SIGINT, before)
        yield started
    finally:
        signal.signal(signal.SIGINT, before)
        for process in started:
            process.kill()
        for process in started:
            process.communicate()


def ended(started):
    """(status, stdout, stderr) of each process, once all of them have ended."""
    texts = [process.communicate(timeout=TIMEOUT) for process in started]
    return [(p.returncode, *text) for p, text in zip(started, texts, strict=True)]


def run(directory, count, commands, **options):
    """Starts processes and returns the results of :func:`ended` once all have run to their end."""
    with processes(directory, count, commands, **options) as started:
        return ended(started)


def results(directory, count, cases):
    """Runs ``rank.py`` on cases in one group of processes; returns what each rank reported."""
    spec = Path(directory) / "cases.json"
    spec.write_text(json.dumps(cases))
    of_ranks = run(directory, count, [PROGRAM, spec])
    assert [status for status, *_ in of_ranks] == [0] * count, of_ranks
    return [json.loads((spec.parent / f"rank{rank}.json").read_text()) for rank in range(count)]
