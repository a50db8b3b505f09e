"""A request as the log tells of it, and as ``--log-requests`` stores it."""

import logging
import os
import socket
import stat
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers_generate import bundled
from helpers_server import (
    CHAT,
    MESSAGES,
    NAMES,
    TEXT,
    Fake,
    ask,
    connected,
    everything,
    exchange,
    post,
    serving,
    strict_json,
)
from helpers_serving import running

from mlx_qwen3next.server.answers.tokens import Context, SampledToken
from mlx_qwen3next.server.engine.metrics import Metrics
from mlx_qwen3next.server.http import exchange as exchanges
from mlx_qwen3next.server.http.access import Settings
from mlx_qwen3next.server.http.exchange import Exchange, RequestLog


@pytest.fixture
def lines(caplog):
    """Gives the lines of the log, each with its level, once the server has ended."""
    caplog.set_level(logging.DEBUG)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


# --- a line a request ---------------------------------------------------------------------------
def test_the_line_of_an_answer(monkeypatch, lines):
    clock = SimpleNamespace(now=100.0)
    times = SimpleNamespace(time=lambda: 0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(exchanges, "time", times)
    told, metrics = Exchange(), Metrics()
    told.status = 200
    accepted = Counter({"mtp": 2, "lookup": 3})
    told.context = Context(None, [1] * 50, cached=40, accepted=accepted)
    for at in (102, 103, 103, 103, 103, 103, 103, 104):
        clock.now = at
        told.add(SampledToken("x", 5))
    clock.now = 105
    told.tell("POST /p HTTP/1.1", "/p", "1.2.3.4", metrics)
    assert lines() == [
        (
            "INFO",
            "1.2.3.4 POST /p HTTP/1.1 200 in 5.00 s; prompt 50 (40 cached) and answer 8 tokens; "
            "first after 2.00 s; 3.5 tokens/s; accept length 2.67 (mtp 2, lookup 3)",
        )
    ]
    text = metrics.text({})
    assert "time_to_first_token_seconds_sum 2\n" in text
    assert "qwen3next_tokens_per_second_sum 3.5\n" in text


def test_every_request_has_one_line_whatever_comes_of_it(lines):
    asked = [
        post(),
        post(temperature="warm"),
        b"GET /v1/models/x%0a?key=1 HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\n\r\n",
        b"GET /\x1b[31m\xff HTTP/1.0\r\n\r\n",
        b"",
    ]
    with serving(Fake("Hello there.")) as server:
        for raw in asked:
            with connected(server, raw) as connection:
                connection.shutdown(socket.SHUT_WR) if not raw else everything(connection)
            assert server.wait(10)
    said = [f"{level} {line.split(' ', 1)[1]}" for level, line in lines()]
    starts = [
        f"INFO POST {CHAT} HTTP/1.0 200 in ",
        f"INFO POST {CHAT} HTTP/1.0 400 in ",
        "INFO GET /v1/models/x%0a?key=1 HTTP/1.0 404 in ",
        "DEBUG GET /health HTTP/1.0 200 in ",
        "DEBUG GET /metrics HTTP/1.0 200 in ",
        "INFO GET /\\x1b[31m\\xff HTTP/1.0 404 in ",
    ]
    pairs = zip(said, starts, strict=True)
    assert [line[: len(start)] for line, start in pairs] == starts
    assert "; temperature must be" in said[1]
    assert "answer 6 tokens; first after" in said[0] and "(1 cached)" in said[0]


def test_the_line_of_a_client_that_has_gone(lines):
    hold = threading.Event()
    with serving(Fake("Hello there.", hold=hold, at=1)) as server:
        with connected(server, post(stream=True)) as connection:
            connection.recv(1)
        hold.set()
    assert [line for _, line in lines() if f"POST {CHAT} HTTP/1.0 499 in " in line]


# --- --log-requests -----------------------------------------------------------------------------
ABOUT = {"model": "demo"}
BODIES = {
    **{CHAT: {"messages": MESSAGES}, TEXT: {"prompt": "Hi"}},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 60},
    "/v1/responses": {"input": "Hi"},
}


def stored(folder):
    """The records of a folder in the order of their writing."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return [strict_json(file.read_text()) for file in files]


@pytest.mark.parametrize("path", BODIES)
def test_a_request_is_stored_with_its_answer(tmp_path, path):
    body = BODIES[path] | {"seed": 7}
    settings = Settings(names=NAMES, api_key="secret-key")
    headers = {"Authorization": "Bearer secret-key"}
    generator = Fake("Hello there.")
    with serving(generator, settings, log=RequestLog(tmp_path / "log", ABOUT)) as server:
        for stream in (False, True):
            exchange(server, "POST", path, body | {"stream": stream}, headers)
            assert server.wait(10)
        exchange(server, "GET", "/v1/models", headers=headers)
    whole, streamed = stored(tmp_path / "log")
    assert whole["request"] == body | {"stream": False}
    assert (whole["path"], whole["status"], whole["error"]) == (path, 200, "")
    assert whole["model"] == "demo" and whole["text"] == "Hello there."
    assert generator.tokenizer.decode(whole["tokens"][:-1]) == "Hello there."
    assert whole["prompt_tokens"] == generator.contexts[0].prompt
    assert whole["cached"] == 1 and whole["seconds_to_first_token"] > 0
    assert streamed["tokens"] == whole["tokens"]
    for file in (tmp_path / "log").iterdir():
        assert "secret" not in file.read_text()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o700


def test_refused_and_failed_requests_are_stored(tmp_path):
    generator = Fake("Hello there.", fail=RuntimeError("broken"), at=2)
    with serving(generator, log=RequestLog(tmp_path, ABOUT)) as server:
        for raw in (post(temperature="warm"), post(stream=True)):
            with connected(server, raw) as connection:
                everything(connection)
            assert server.wait(10)
    refused, failed = stored(tmp_path)
    assert refused["status"] == 400 and "temperature" in refused["error"]
    assert "tokens" not in refused
    assert failed["status"] == 500 and "broken" in failed["error"]
    assert len(failed["tokens"]) == 2


def test_an_answer_can_be_drawn_again(tmp_path):
    """A request without a seed gets one."""
    fields = {"messages": MESSAGES, "temperature": 1.5, "max_tokens": 12}
    with (
        running(load=bundled) as engine,
        serving(engine, Settings(names=("demo",)), log=RequestLog(tmp_path, ABOUT)) as server,
    ):
        answers = []
        for body in (fields, fields | {"seed": None}):
            answers.append(ask(server, body)[1])
            assert server.wait(10)
        first, second = stored(tmp_path)
        again = ask(server, first["request"])[1]
    assert first["request"]["seed"] != second["request"]["seed"]
    texts = [answer["choices"][0]["message"]["content"] for answer in (*answers, again)]
    assert texts[0] != texts[1] and texts[0] == texts[2]


def test_a_request_that_cannot_be_stored_is_answered(tmp_path, caplog):
    log = RequestLog(tmp_path / "log", ABOUT)
    (tmp_path / "log").rmdir()
    with serving(log=log) as server:
        assert ask(server)[0] == 200
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("--log-requests: a request was not stored: ")


def test_without_the_flag_no_request_is_changed():
    generator = Fake()
    with serving(generator) as server:
        ask(server)
    assert generator.requests[0][1].seed is None


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RequestLog(tmp_path / "file", ABOUT)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match=r"--log-requests: .* cannot be written to"):
        RequestLog(tmp_path, ABOUT)
