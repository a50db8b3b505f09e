"""The server in several processes that run one model together."""

import functools
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers_generate import endless
from helpers_group import ended, free_port, processes
from helpers_server import TEXT, ask, exchange, post, until
from helpers_serving import TEXTS, expected_text

from mlx_qwen3next import load


def is_ready(at):
    try:
        return exchange(at, "GET", "/health")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("divided", [[], ["--pipeline", "2,1"]], ids=["tensor", "pipeline"])
def test_answers_are_those_of_one_process(tmp_path, divided):
    """Requests come together and alone, with known texts and dropped ones, and clients leave."""
    port = free_port()
    at = SimpleNamespace(server_address=("127.0.0.1", port))
    directory = endless(tmp_path / "model")
    flags = [
        "--model",
        directory,
        "--port",
        port,
        "--mtp",
        "2",
        "--prompt-cache-bytes",
        "1MB",
        "--log-level",
        "ERROR",
    ]
    asked = [
        {"prompt": text * times, "temperature": temperature, "seed": 3, "max_tokens": 8}
        for times in (1, 10)
        for text in TEXTS[:2]
        for temperature in (0.0, 0.8)
    ]

    def answer(fields):
        status, body = ask(at, path=TEXT, **fields)
        assert status == 200, body
        return body["choices"][0]["text"]

    with processes(tmp_path, 2, ["-m", "mlx_qwen3next.server", *flags, *divided]) as ranks:
        until(lambda: is_ready(at), seconds=120)
        with socket.create_connection(at.server_address) as leaving:
            leaving.sendall(post(TEXT, prompt=TEXTS[0], max_tokens=500, stream=True))
            assert leaving.recv(10)
        with ThreadPoolExecutor(4) as clients:
            got = list(clients.map(answer, asked))
        got += [answer(asked[-1])]
        ranks[0].send_signal(signal.SIGTERM)
        assert [(status, out) for status, out, _ in ended(ranks)] == [(0, ""), (0, "")]
    whole = functools.cache(lambda: load(directory, dtype=mx.float32))
    want = [
        expected_text(f["prompt"], 8, seed=3, load=whole, temp=f["temperature"])
        for f in [*asked, asked[-1]]
    ]
    assert got == want


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_server(tmp_path, rank):
    port = free_port()
    at = SimpleNamespace(server_address=("127.0.0.1", port))
    command = ["-m", "mlx_qwen3next.server", "--port", port, "--model", endless(tmp_path / "model")]
    with processes(tmp_path, 2, command) as ranks:
        until(lambda: is_ready(at), seconds=120)
        ranks[rank].kill()
        (status, _, err), (other, *_) = ended([ranks[1 - rank], ranks[rank]])
    assert status not in (0, None) and other == -signal.SIGKILL
    if rank == 1:
        assert err.endswith("error: rank 1 has ended unexpectedly\n")
