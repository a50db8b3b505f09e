"""Several processes on this machine that run one model together, over MLX's ring."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAM = Path(__file__).parent / "rank.py"


def free_ports(count):
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def hostfile(directory, count):
    file = Path(directory) / "hosts.json"
    file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    return file


@contextmanager
def processes(directory, count, commands, hosts=None):
    """Starts a command for each rank (one list for all of them, or one each)."""
    if not isinstance(commands[0], (list, tuple)):
        commands = [commands] * count
    hosts = hosts or [hostfile(directory, count)] * count
    started = []
    try:
        for rank, command in enumerate(commands):
            environment = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts[rank])}
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def run(directory, count, commands, timeout=120, **options):
    """Runs it to the end: (status, stdout, stderr) of each rank."""
    with processes(directory, count, commands, **options) as started:
        ended = [process.communicate(timeout=timeout) for process in started]
        return [(p.returncode, *text) for p, text in zip(started, ended, strict=True)]


def results(directory, count, cases, timeout=300):
    """Runs ``rank.py`` on cases in one group of processes; returns what each rank reported."""
    spec = Path(directory) / "cases.json"
    spec.write_text(json.dumps(cases))
    ended = run(directory, count, [PROGRAM, spec], timeout)
    assert all(status == 0 for status, _, _ in ended), "\n\n".join(out + err for _, out, err in ended)
    return [json.loads((spec.parent / f"rank{rank}.json").read_text()) for rank in range(count)]
