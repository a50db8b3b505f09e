"""Processes that run one model together: how they agree, and how they end."""

import json
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import forked
import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import endless
from helpers_group import TIMEOUT, ended, hostfile, processes, run
from polite import polite

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.generate import main
from mlx_qwen3next.group import ALONE, join
from mlx_qwen3next.group.joining import connect

COMMAND = ["-m", "mlx_qwen3next.generate"]
QUESTION = ["-p", "How do I use itertools.chain?", "--verbose", "F", "-m", "8"]


@pytest.fixture(scope="module")
def endless_dir(tmp_path_factory):
    return str(endless(tmp_path_factory.mktemp("model") / "endless"))


def statuses(results):
    return [status for status, _, _ in results]


# --- the command ---------------------------------------------------------------------------------

# Runs the command again and again; the ranks' random states differ.
AGAIN = """
import json, os, sys
import mlx.core as mx
from mlx_qwen3next.generate import main
for args in json.loads(sys.argv[1]):
    mx.random.seed(int(os.environ["MLX_RANK"]))
    print(main(args), flush=True)
"""


def test_two_processes_answer_as_one_and_one_of_them_prints(tmp_path, call):
    variants = [
        [],
        ["--temp", "0.8"],
        ["--expert-parallel", "--mtp", "2", "--temp", "0.8"],
        ["--pipeline", "1,3", "--mtp", "3", "--kv-bits", "2", "--quantized-kv-start", "20"],
    ]
    expected = ""
    for variant in variants:
        mx.random.seed(0)
        alone = [x for x in variant if x not in ("--expert-parallel", "--pipeline", "1,3")]
        status, out, err = call(main, *QUESTION, *alone)
        assert (status, len(out) > 20) == (0, True), err
        expected += f"{out}0\n"
    given = json.dumps([[*QUESTION, *variant] for variant in variants])
    first, second = run(tmp_path, 2, ["-c", AGAIN, given])
    assert first[:2] == (0, expected)
    assert second == (0, "", "")
    assert first[2] == len(variants) * err  # what it says of the model


def test_mlx_launch(tmp_path, call):
    _, expected, _ = call(main, *QUESTION)
    launch = Path(sys.executable).with_name("mlx.launch")
    # It asks without a pause whether a rank's stdin can take more, until that is full.
    stdin, full = os.pipe()
    os.write(full, bytes(select.PIPE_BUF * 16))
    child = subprocess.run(
        [launch, "-n", "2", "--backend", "ring", "--starting-port", str(hostfile_port(tmp_path)),
         "--", sys.executable, *COMMAND, *QUESTION],
        env=os.environ | polite(), stdin=stdin, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    os.close(stdin)
    os.close(full)
    assert (child.returncode, child.stdout) == (0, expected), child.stderr


def hostfile_port(directory):
    """A free port with a free one after it."""
    while True:
        port = int(json.loads(hostfile(directory, 1).read_text())[0][0].rsplit(":")[-1])
        try:
            with socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--pipeline"], "--pipeline is for several processes: start them with mlx.launch"),
        (["--expert-parallel"], "--expert-parallel is for several processes: start them with"),
        (["--pipeline", "--expert-parallel"], "--pipeline and --expert-parallel exclude"),
        (["--pipeline", "3,x"], "argument --pipeline: must be numbers of layers, such as 30,18"),
        (["--pipeline", "4,0"], "argument --pipeline: must be numbers of layers, such as 30,18"),
    ],
)
def test_what_divides_a_model_is_refused_alone_or_if_it_makes_no_sense(call, args, said):
    status, out, err = call(main, *QUESTION, *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {said}")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temp", "-1"], "temp must be"),  # before the model is loaded…
        (["--kv-bits", "7"], "kv_bits must be one of (2, 3, 4, 5, 6, 8)"),  # …and after it
    ],
)
def test_bad_input_is_one_line_of_rank_0(tmp_path, args, said):
    first, second = run(tmp_path, 2, [*COMMAND, *QUESTION, *args])
    assert (first[:2], second) == ((2, ""), (2, "", ""))
    assert first[2].startswith(f"error: {said}") and first[2].count("\n") == 1


def test_ranks_with_other_files_are_told_at_once(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(BUNDLED, other, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # the first tensor's first byte
    (other / "model.safetensors").write_bytes(raw)
    commands = [[*COMMAND, *QUESTION, "--model", model] for model in (BUNDLED, other)]
    first, second = run(tmp_path, 2, commands)
    assert (first[:2], second) == ((2, ""), (2, "", ""))
    said = rf"error: rank 1: {other} is not run as on rank 0: the files' fingerprint is \w+, there"
    assert re.match(said, first[2]) and first[2].count("\n") == 1


LOST = """
from mlx_qwen3next.group import join
with join() as group:
    assert group.gather("names", group.rank) == [0, 1, 2]
    assert group.decide("name", f"of {group.rank}") == "of 0"
    if group.rank == 2:
        HERE
    group.decide("next", None)
    group.decide("what never comes", None) if group.rank else group.gather("answers", None)
"""


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("group.decide('other', None)", "rank 2: rank 0 is at 'next', rank 2 at 'other'"),
        ("raise RuntimeError('no luck')", "rank 2: RuntimeError: no luck"),
        ("import os; os._exit(0)", "rank 2 has ended unexpectedly"),
    ],
)
def test_an_error_of_one_process_ends_all(tmp_path, here, said):
    results = run(tmp_path, 3, ["-c", LOST.replace("HERE", here)])
    assert results[0] == (1, "", f"error: {said}\n")
    assert results[1] == (1, "", "")
    assert results[2][1:] == ("", "")


LEAVES = """
import mlx.core as mx
from mlx_qwen3next.group import join
with join() as group:
    x = mx.ones((100_000,))
    for _ in range(300):
        x = group.all_sum(x) / 2
    mx.async_eval(x)
    if group.rank > 0:
        print(x[7].item())
        import sys; print(x[7].item(), file=sys.__stdout__)
"""


def test_who_is_done_first_leaves_nothing_undone(tmp_path):
    assert run(tmp_path, 2, ["-c", LEAVES]) == [(0, "", ""), (0, "1.0\n", "")]


# --- a process that is killed --------------------------------------------------------------------

KILLED = """
import os, signal, sys
from mlx_qwen3next import terminal
from mlx_qwen3next.decoding import sampling
from mlx_qwen3next.generate import main
_, rank, when, *args = sys.argv
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["MLX_RANK"] == rank and when == "prefill":
    terminal._PromptProgress.__call__ = lambda self, done, total: done < 64 or die()
elif os.environ["MLX_RANK"] == rank:
    extend = sampling.Chooser.extend
    sampling.Chooser.extend = lambda self, x: extend(self, x) or self._position < 20 or die()
sys.exit(main(args))
"""


@pytest.mark.parametrize(
    ("when", "rank", "options"),
    [
        ("prefill", 1, ["--mtp", "off"]),
        ("decode", 1, []),
        ("decode", 0, ["--pipeline"]),
    ],
)
def test_a_killed_process_ends_the_others(tmp_path, endless_dir, when, rank, options):
    prompt = "word " * (500 if when == "prefill" else 5)
    args = ["--model", endless_dir, "-p", prompt, "--prefill-step-size", 16, "-m", -1]
    results = run(tmp_path, 2, ["-c", KILLED, rank, when, *args, *options])
    assert statuses(results)[rank] == -signal.SIGKILL
    status, _, err = results[1 - rank]  # MLX has lines of its own
    assert (status, err.splitlines()[-1]) == (1, f"error: rank {rank} has ended unexpectedly")
    assert err.count("error: ") == 1
    assert "\nGeneration" not in results[0][1]


# --- who does not come ---------------------------------------------------------------------------


def test_waiting_for_others_has_an_end(tmp_path):
    program = (
        "import sys\n"
        "from mlx_qwen3next.group import joining\n"
        "from mlx_qwen3next.generate import main\n"
        "joining.JOIN = 1.0\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    said = "error: the other processes did not come within 1 s; is the hostfile right?\n"
    hosts = hostfile(tmp_path, 3)  # the third is not started
    results = run(tmp_path, 2, ["-c", program, *QUESTION], hosts=hosts)
    assert results == [(-signal.SIGTERM, "", said)] * 2


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1, 2]", '["127.0.0.1"]', '[["nowhere"], ["nobody"]]', '[["x:0"]]'],
)
def test_what_is_no_hostfile_is_refused(tmp_path, monkeypatch, text):
    (tmp_path / "hosts.json").write_text(text)
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    program = (
        "import sys\n"
        "from mlx_qwen3next.cli import guarded\n"
        "from mlx_qwen3next.group import join\n"
        "sys.exit(guarded(join))\n"
    )
    child = forked.run([sys.executable, "-c", program])
    assert (child.returncode, child.stdout) == (2, ""), child.stderr
    assert child.stderr.startswith("error: ") and child.stderr.count("\n") == 1
    assert "joined" in child.stderr or "no other host" in child.stderr


def test_a_stranger_is_not_taken_for_another_process():
    offers, connected = queue.Queue(), {}

    class Ring:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def agree(self, x):
            if self.rank == 0:
                offers.put(x)
            return x if self.rank == 0 else offer

    def connect_rank(rank):
        connected[rank] = connect(Ring(rank))

    first = threading.Thread(target=connect_rank, args=(0,))
    first.start()
    offer = offers.get(timeout=TIMEOUT)
    port = int.from_bytes(bytes(np.array(offer))[32:36], "big")
    for word in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 32 + (1).to_bytes(4, "big")):
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as stranger:
            stranger.sendall(word)
            stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    connect_rank(1)
    first.join(TIMEOUT)
    with connected[0][1] as here, connected[1][0] as there:
        here.sendall(b"hello")
        assert there.recv(5) == b"hello"


# --- the user has seen enough --------------------------------------------------------------------


def test_interrupting_all_of_them_ends_all(tmp_path, endless_dir):
    with processes(tmp_path, 2, [*COMMAND, "--model", endless_dir, "-m", "-1"]) as started:
        assert started[0].stdout.read(12)  # the rule, then some of the answer
        started[1].send_signal(signal.SIGINT)  # which is for rank 0 to hear
        assert started[0].stdout.read(12)
        for process in started:
            process.send_signal(signal.SIGINT)
        first, second = ended(started)
    assert (first[0], second) == (130, (130, "", ""))
    assert first[2].strip() == "interrupted"


def test_a_closed_pipe_ends_all_quietly(tmp_path, endless_dir):
    with processes(tmp_path, 2, [*COMMAND, "--model", endless_dir, "-m", "-1"]) as started:
        assert started[0].stdout.read(12)
        started[0].stdout.close()
        assert started[0].stderr.read() == ""
        assert started[0].wait(TIMEOUT) == started[1].wait(TIMEOUT) == 128 + signal.SIGPIPE


# --- alone ---------------------------------------------------------------------------------------


def test_a_process_that_is_alone_decides_for_itself(monkeypatch):
    for name in ("MLX_RANK", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    x = mx.arange(3)
    with join() as group:
        assert group is ALONE and (group.rank, group.size) == (0, 1)
        assert group.all_sum(x) is group.all_gather(x) is group.agree(x) is x
        assert group.decide("it", 7) == 7 and group.gather("all", 7) == [7]
    assert ALONE.from_before(x) is ALONE.from_last(x) is x
