"""A process that was forked is like one that was started."""

import subprocess
import sys

import forked
import pytest

SELF = """
import atexit, os, signal, sys, threading
atexit.register(print, "the end")
print(sys.argv, sys.path, os.getcwd(), dict(os.environ), os.getppid(), __name__, sys.stdin.read())
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGPIPE), threading.active_count())
print(sorted(os.listdir("/proc/self/fd")), [s.isatty() for s in (sys.stdout, sys.stderr)])
print("é\\ud800", file=sys.stderr)
"""


def outcome(popen, command, folder):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command, environment = [sys.executable, *command], {"LANG": "C.UTF-8", "PATH": "/bin"}
    with popen(command, text=True, cwd=folder, env=environment, **pipes) as child:
        out, err = child.communicate("read", timeout=forked.TIMEOUT)
    return child.returncode, out, err.splitlines()[-1:]


@pytest.mark.parametrize(
    "ends",
    ["", "sys.exit(7)", "sys.exit('why')", "1 / 0", "raise KeyboardInterrupt", "os.abort()",
     "os.kill(os.getpid(), signal.SIGTERM)", "threading.Timer(0.1, print, ['late']).start()"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_it_runs_and_ends_alike(tmp_path, how, ends):
    (tmp_path / "program.py").write_text(SELF + ends)
    command = {"-c": ["-c", SELF + ends], "-m": ["-m", "program"]}.get(how, ["program.py"])
    command += ["--flag", "é"]
    assert outcome(forked.Popen, command, tmp_path) == outcome(subprocess.Popen, command, tmp_path)


def test_chance_differs():
    code = "import random, mlx.core as mx; print(random.random(), mx.random.uniform().item())"
    first, second = (forked.run([sys.executable, "-c", code]).stdout.split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]
