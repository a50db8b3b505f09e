"""Several processes on this machine that run one model together, over MLX's ring."""

import atexit
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAM = Path(__file__).parent / "rank.py"
TIMEOUT = 240  # seconds, which no run comes near

# The ring's threads poll their connections without a pause. Where there are more of them than
# cores, each answer would wait for the end of several others' turns.
YIELDING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <sys/socket.h>
ssize_t recv(int s, void *data, size_t count, int flags) {
  static ssize_t (*of_libc)(int, void *, size_t, int);
  if (!of_libc) of_libc = (ssize_t (*)(int, void *, size_t, int))dlsym(RTLD_NEXT, "recv");
  ssize_t got = of_libc(s, data, count, flags);
  if (got < 0 && errno == EAGAIN) {
    sched_yield();
    errno = EAGAIN;
  }
  return got;
}
"""


@functools.cache
def polite():
    """Environment in which a thread that has nothing to receive lets others run, if there is a C
    compiler; it changes the speed alone."""
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler is None:
        return {}
    directory = tempfile.mkdtemp(prefix="ring-")
    atexit.register(shutil.rmtree, directory)
    library = Path(directory) / "yielding.so"
    options = ["-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", library, "-ldl"]
    subprocess.run([compiler, *options], input=YIELDING.encode(), check=True)
    return {"LD_PRELOAD": str(library)}


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
                subprocess.Popen(
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
