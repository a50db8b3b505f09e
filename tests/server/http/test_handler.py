"""The server over real sockets: routes, access, bad HTTP, lost clients, and limits."""

import contextlib
import json
import logging
import socket
import threading
from dataclasses import replace

import pytest
from helpers_server import (
    CALL,
    CHAT,
    MESSAGES,
    NAMES,
    TEXT,
    Fake,
    ask,
    bodies,
    connected,
    everything,
    exchange,
    post,
    serving,
    strict_json,
    until,
)

from mlx_qwen3next.server.http import connections, handler
from mlx_qwen3next.server.http.connections import Server
from mlx_qwen3next.server.http.handler import Settings


def test_the_routes_of_get():
    with serving() as server:
        assert exchange(server, "GET", "/health")[::2] == (200, b'{"status": "ok"}')
        status, headers, raw = exchange(server, "GET", "/v1/models?x=1")
        models = json.loads(raw)
        assert (status, headers["Content-Length"]) == (200, str(len(raw)))
        assert [model["id"] for model in models["data"]] == ["demo"]  # without its other names
        assert models["object"] == "list"
        assert {"object": "model", "owned_by": "local"}.items() <= models["data"][0].items()
        for path in ("/v1/models/org/demo", "/v1/models/org%2Fdemo?x"):
            status, _, raw = exchange(server, "GET", path)
            assert (status, json.loads(raw)["id"]) == (200, "org/demo")
        for path in ("/v1/models/gpt-4o", "/v1/models/Qwen%2FQwen3-Coder-Next"):
            status, _, raw = exchange(server, "GET", path)
            assert (status, json.loads(raw)["id"]) == (200, "demo")
        with connected(server, b"HEAD /health HTTP/1.0\r\n\r\n") as connection:
            raw = everything(connection)
        assert raw.startswith(b"HTTP/1.0 200 ") and raw.endswith(b"Content-Length: 16\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/v1", 404),
        ("PUT", "/v1/responses/x", 405),
        ("GET", "/v1/modelsx", 404),
        ("POST", "/v1", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/demo", 405),
        ("GET", CHAT, 405),
        ("PUT", TEXT, 405),
        ("POST", "/health", 405),
        ("TRACE", "/health", 501),
    ],
)
def test_other_requests_are_refused(method, path, status):
    with serving() as server:
        got, headers, raw = exchange(server, method, path)
        assert got == status
        assert headers["Content-Type"] == "application/json"
        assert strict_json(raw)["error"]["message"]
        assert ("Allow" in headers) == (status == 405)


@pytest.mark.parametrize("path", [CHAT, "/chat/completions", f"{CHAT}?api-version=1"])
def test_a_chat_is_completed_under_each_of_its_paths(path):
    with serving() as server:
        status, answer = ask(server, {"messages": MESSAGES}, path=path)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello.")


@pytest.mark.parametrize("health", ["loading", "draining", "unavailable"])
def test_health_tells_the_state(health):
    with serving(Fake(health=health)) as server:
        status, _, raw = exchange(server, "GET", "/health")
        assert (status, json.loads(raw)) == (503, {"status": health})


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
    ],
)
def test_malformed_http_is_answered_with_json(raw, status):
    with serving() as server, connected(server, raw) as connection:
        connection.shutdown(socket.SHUT_WR)
        head, _, body = everything(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 %d " % status) or head.startswith(b"{")
        assert strict_json(body or head)["error"]["type"].endswith("_error")


def test_a_body_too_large_is_refused_unread_and_the_client_can_read_why():
    settings = Settings(names=NAMES, max_body_bytes=1000)
    with serving(settings=settings) as server:
        body = {"prompt": "x" * 20_000_000}
        status, answer = ask(server, body, path=TEXT)
        assert status == 413
        assert "1000 bytes" in answer["error"]["message"]
        assert ask(server, path=TEXT)[0] == 200


def test_few_large_bodies_are_parsed_at_a_time(monkeypatch):
    parse, hold, large = handler.parse, threading.Event(), []

    def held(raw):
        if len(raw) > 2**20:
            large.append(len(raw))
            assert hold.wait(10)
        return parse(raw)

    monkeypatch.setattr(handler, "parse", held)
    with serving() as server, contextlib.ExitStack() as stack:
        raw = post(TEXT, user="x" * 2**20)
        clients = [stack.enter_context(connected(server, raw)) for _ in range(4)]
        until(lambda: len(large) == 2)
        assert ask(server)[0] == 200  # while they are parsed
        assert len(large) == 2
        hold.set()
        assert all(everything(client).startswith(b"HTTP/1.0 200 ") for client in clients)


def test_a_refused_client_need_not_wait_for_the_end(monkeypatch):
    monkeypatch.setattr(handler, "_LINGER", 60.0)
    head = b"POST /nowhere HTTP/1.0\r\nContent-Length: 5000\r\n\r\n"
    with serving() as server, connected(server, head) as connection:
        assert everything(connection).startswith(b"HTTP/1.0 404 ")


def test_a_body_that_ends_early_is_not_completed(caplog):
    generator = Fake()
    caplog.set_level(logging.INFO)
    with serving(generator) as server, connected(server, post()[:-1]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""
    assert not generator.requests
    assert [r for r in caplog.records if "the body ended" in r.message]
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_a_request_that_never_comes_ends(monkeypatch):
    monkeypatch.setattr(handler.Handler, "timeout", 0.2)
    with serving() as server, connected(server, post()[:-1]) as connection:
        assert everything(connection) == b""
        # Single bytes do not postpone the end.
        with connected(server) as slow, contextlib.suppress(ConnectionError):
            until(lambda: not server.wait(0))
            for _ in range(40):
                slow.sendall(b"x")
                if server.wait(0.05):
                    break
            assert server.wait(0)


def cors(headers):
    return {name for name in headers if name.startswith("Access-Control")}


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_web_pages_are_refused_by_default(method, caplog):
    generator = Fake()
    with serving(generator) as server:
        path = "/health" if method == "GET" else CHAT
        page = {"Origin": "http://evil.example"}
        body = {"messages": MESSAGES} if method == "POST" else None
        status, headers, raw = exchange(server, method, path, body, page)
        assert status == 403
        message = json.loads(raw)["error"]["message"]
        assert "--allowed-origins" in message
        assert warnings(caplog) == [f"403: {message!r}"]
        assert not cors(headers)
        assert not cors(exchange(server, "GET", "/health")[1])
    assert not generator.requests


@pytest.mark.parametrize(
    ("allowed", "origin", "said"),
    [
        (("http://a", "http://b"), "http://b", "http://b"),
        (("*",), "http://a", "*"),
        (("http://a",), "http://b", None),
        (("http://a",), "null", None),
    ],
)
def test_allowed_origins(allowed, origin, said):
    with serving(settings=Settings(names=NAMES, allowed_origins=allowed)) as server:
        for method, path in (("GET", "/v1/models"), ("OPTIONS", CHAT), ("POST", CHAT)):
            body = {"messages": MESSAGES} if method == "POST" else None
            status, headers, _ = exchange(server, method, path, body, {"Origin": origin})
            assert status == (403 if said is None else 204 if method == "OPTIONS" else 200)
            assert headers["Access-Control-Allow-Origin"] == said
            if said is not None:
                assert "Authorization" in headers["Access-Control-Allow-Headers"]
                assert "POST" in headers["Access-Control-Allow-Methods"]
        status, headers, _ = exchange(server, "GET", "/nowhere", headers={"Origin": origin})
        assert headers["Access-Control-Allow-Origin"] == said  # so that pages can read errors


def test_streams_and_errors_of_completions_are_for_allowed_pages_too():
    with serving(settings=Settings(names=NAMES, allowed_origins=("http://a",))) as server:
        for fields in ({"stream": True}, {"n": 2}):
            body = {"messages": MESSAGES} | fields
            headers = exchange(server, "POST", CHAT, body, {"Origin": "http://a"})[1]
            assert headers["Access-Control-Allow-Origin"] == "http://a"


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic käse", "käse", "\xff"])
def test_without_the_key_only_health_is_answered(given, caplog):
    headers = {} if given is None else {"Authorization": given.encode()}
    with serving(settings=Settings(names=NAMES, api_key="käse")) as server:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("GET", "/nowhere")):
            status, got, raw = exchange(server, method, path, headers=headers)
            assert (status, got["WWW-Authenticate"]) == (401, "Bearer")
            assert json.loads(raw)["error"]["code"] == "invalid_api_key"
        assert exchange(server, "GET", "/health", headers=headers)[0] == 200
    assert len(warnings(caplog)) == 3
    assert all(line.startswith("401: 'the API key is missing or") for line in warnings(caplog))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_key_opens(scheme):
    with serving(settings=Settings(names=NAMES, api_key="käse")) as server:
        headers = {"Authorization": f"{scheme} käse".encode()}
        assert exchange(server, "GET", "/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("Hello there, how are you?", {"stream": True}),
        ("Hello there, how are you?", {"stream": False}),
        (CALL, {"stream": True}),  # nothing is written during a tool call
    ],
)
def test_nothing_is_generated_for_a_client_that_is_gone(text, fields, caplog):
    caplog.set_level(logging.INFO)
    hold = threading.Event()
    generator = Fake(text, hold=hold, at=2)
    tokens = []
    responses = generator._responses
    generator._responses = lambda *args: (tokens.append(x) or x for x in responses(*args))
    with serving(generator) as server:
        with connected(server, post(**fields)) as connection:
            until(lambda: len(tokens) == 2)
            connection.shutdown(socket.SHUT_WR)
        hold.set()
    assert len(tokens) <= 3  # two if the second was sent already
    assert generator.contexts[0].stopped
    assert [r for r in caplog.records if " 499 in " in r.message]
    assert not [r for r in caplog.records if r.levelno > logging.INFO or r.exc_info]


@pytest.mark.parametrize("streamed", [False, True])
def test_no_prompt_is_processed_for_a_client_that_is_gone(streamed):
    hold = threading.Event()
    generator = Fake(progress=10)
    responses, steps = generator._responses, []

    def watched(args, callback):
        def progress(*counts):
            assert hold.wait(10)
            steps.append(counts)
            callback(*counts)

        return responses(args, progress)

    generator._responses = watched
    with serving(generator) as server:
        with connected(server, post(stream=streamed)):
            until(lambda: generator.contexts)
        hold.set()
    assert len(steps) == 1
    assert generator.contexts[0].stopped


@pytest.mark.parametrize("streamed", [False, True])
def test_generating_stops_if_not_even_the_headers_can_be_sent(streamed, monkeypatch, caplog):
    def end_headers(self):
        raise BrokenPipeError("gone")

    monkeypatch.setattr(handler.Handler, "end_headers", end_headers)
    generator = Fake()
    with serving(generator) as server, connected(server, post(stream=streamed)) as connection:
        everything(connection)
    assert generator.contexts[0].stopped
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


@pytest.mark.parametrize("progress", [False, True])
def test_a_client_that_stops_reading_does_not_hold_its_thread(progress, monkeypatch, caplog):
    monkeypatch.setattr(handler.Handler, "timeout", 0.2)
    caplog.set_level(logging.INFO)
    generator = Fake("x")
    responses = generator._responses

    def flood(args, callback):
        for response in responses(args, callback):
            flooding = replace(response, text="x" * 100_000, finish_reason=None)
            while True:
                if progress:
                    callback(flooding.text, 1)
                else:
                    yield flooding

    generator._responses = flood
    with serving(generator) as server, connected(server, post(stream=True)):
        until(lambda: generator.contexts and server.wait(0))
    assert generator.contexts[0].stopped
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_wait_waits_for_open_connections():
    hold = threading.Event()
    generator = Fake(hold=hold)
    with serving(generator) as server:
        assert server.wait(0)
        with connected(server, post()) as connection:
            until(lambda: generator.contexts)
            assert not server.wait(0.01)
            hold.set()
            assert server.wait(10)
            assert everything(connection).startswith(b"HTTP/1.0 200 ")


def test_connections_beyond_the_limit_are_turned_away(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with serving() as server:
        with connected(server), connected(server):
            until(lambda: server._connections == 2)
            with connected(server) as third:
                head, _, body = everything(third).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.0 503 ")
            assert b"Retry-After: 5" in head
            assert strict_json(body)["error"]["type"] == "server_error"
        assert server.wait(10)
        assert ask(server)[0] == 200


def test_a_bug_in_a_handler_is_logged_and_the_server_goes_on(caplog):
    def broken(*connection):
        raise AttributeError("a bug")

    with Server("localhost", 0, broken) as server:
        with socket.create_connection(server.server_address[:2]) as connection:
            server.handle_request()
            assert everything(connection) == b""
        assert server.wait(10)
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert str(record.exc_info[1]) == "a bug"


def test_nothing_is_printed(capfd):
    with serving() as server:
        ask(server)
        exchange(server, "GET", "/nowhere")
        with connected(server, b"nonsense\r\n\r\n") as connection:
            everything(connection)
    assert capfd.readouterr() == ("", "")


def test_log_lines_have_no_control_characters(caplog):
    caplog.set_level(logging.INFO)
    with serving() as server, connected(server, b"GET /\x1b[31m HTTP/1.0\r\n\r\n") as connection:
        everything(connection)
    assert "404" in caplog.text
    assert "\x1b" not in "".join(record.getMessage() for record in caplog.records)


def test_spoiled_requests_are_answered_and_the_server_lives():
    with serving() as server:
        answered = {200: 0, 400: 0, 404: 0}
        for path, body in bodies(seed=2, count=2000):
            status, headers, raw = exchange(server, "POST", path, body)
            assert status in answered, (status, raw, body)
            answered[status] += 1
            if headers["Content-Type"] == "application/json":
                assert ("error" in strict_json(raw)) == (status != 200)
            else:
                assert raw.endswith(b"data: [DONE]\n\n")
        assert min(answered.values()) > 0
        assert server.wait(10)
        assert exchange(server, "GET", "/health")[0] == 200
