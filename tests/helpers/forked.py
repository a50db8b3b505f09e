"""Python processes that have imported mlx-lm and the package when they start: more than a second of
CPU less for each.

On Linux, a server imports both once and forks for every process that is asked for. A forked process
has the arguments, environment, folder, files, signals and parent of one that was started, and ends
like one. Its PYTHON* variables and LD_PRELOAD are the server's, and so is its hash seed.
"""

import atexit
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

from polite import polite

TIMEOUT = 240  # seconds, which no run comes near
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: descendants without a parent become our children


@functools.cache
def server():
    """A connection to the server of this process, which ends with it."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())],
            env=os.environ | polite() | {"OPENBLAS_NUM_THREADS": "1"},  # no threads before a fork
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
        )
    atexit.register(process.wait)
    atexit.register(here.close)  # which comes first
    return here


class Popen(subprocess.Popen):
    """Runs Python with arguments (``-c CODE``, ``-m MODULE`` or a script, and what follows)."""

    if sys.platform == "linux":

        def _execute_child(
            self, args, executable, preexec, close, keep, cwd, env, info, flags, shell, *ends
        ):
            ends = ends[:6]  # of three pipes: stdin's two ends, stdout's, stderr's
            files = [ends[0], ends[3], ends[5]]
            request = [args[1:], str(cwd or os.getcwd()), dict(os.environ if env is None else env)]
            own = [i if file == -1 else file for i, file in enumerate(files)]
            socket.send_fds(server(), [json.dumps(request, default=str).encode()], own)
            self.pid = int(server().recv(32))
            server().recv(1)  # it is our child now
            self._child_created = True
            self._close_pipe_fds(*ends)


def run(command, **options):
    """Like ``subprocess.run``, with stdout and stderr as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, text=True, **pipes, **options) as child:
        try:
            out, err = child.communicate(timeout=TIMEOUT)
        finally:
            child.kill()
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def forks(requests):
    """Forks for each request; in the child returns what to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            child = os.fork()
            if child:
                requests.send(str(child).encode())
                os._exit(0)
            break
        os.waitpid(between, 0)
        requests.send(b".")
        for file in files:
            os.close(file)
    requests.close()
    while os.getppid() == between:
        time.sleep(0.001)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    args, folder, environment = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return args


def main():
    import mlx.core as mx
    import mlx_lm.server  # noqa: F401

    import mlx_qwen3next.bench.command
    import mlx_qwen3next.convert.conversion
    import mlx_qwen3next.server.command
    import mlx_qwen3next.terminal  # noqa: F401

    gc.freeze()  # what is imported stays; forked processes need not look through it again

    first, *rest = forks(socket.socket(fileno=int(sys.argv[1])))
    mx.random.seed(int.from_bytes(os.urandom(4)))  # by the time, in a process that was started
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(code, {"__name__": "__main__"})
    elif first == "-m":
        module, *rest = rest
        sys.argv, sys.path[0] = [module, *rest], os.getcwd()
        runpy._run_module_as_main(module)  # as Python itself does
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
