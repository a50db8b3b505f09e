"""The handler of HTTP requests.

:class:`Handler` has a request checked, sends the answer as it is read
(:mod:`mlx_qwen3next.server.answers.tokens`) in the form of the request's protocol
(:mod:`mlx_qwen3next.server.protocols`), and stops the generation once the client has gone.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from jinja2 import TemplateError

from ...errors import ContextLengthError, FieldError, QueueFullError, first_line
from ..answers.events import Event, Text
from ..answers.tokens import Context, SampledToken, TokenReader
from ..engine import metrics
from ..protocols.anthropic import Message as AnthropicMessage
from ..protocols.form import About, Form
from ..protocols.openai import ChatCompletion, TextCompletion
from ..protocols.openai_responses import ModelResponse
from ..protocols.stored import Stored
from ..requests.checks import RequestError
from ..requests.fields import Options, normalise, options_of, parse, served_name
from ..requests.prompt import Chat, Prompt, prompt_of
from . import discovery
from .access import OPEN, Settings, check_key, check_origin, cors_headers
from .body import read_body
from .connections import RETRY, Incoming
from .exchange import GONE, Exchange, RequestLog
from .page import HEADERS, PAGE

_LARGE = 2**20  # bytes of a large body; the parsed body may take 30 times as many
_large_bodies = threading.Semaphore(2)  # how many large bodies are parsed at a time
_SILENCE = 3.0  # seconds of a stream in which nothing is sent, at most
_LINGER = 2.0  # seconds for a refused client to send the rest of its body and read the answer

_MODELS, _RESPONSES, _COUNT = "/v1/models", "/v1/responses", "/v1/messages/count_tokens"
_FORMS: dict[str, type[Form]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": TextCompletion,
    "/v1/messages": AnthropicMessage,
    _COUNT: AnthropicMessage,
    _RESPONSES: ModelResponse,
    "/chat/completions": ChatCompletion,
}
# Path -> the methods that it takes; HEAD goes with GET.
_ROUTES = {path: ("POST",) for path in (*_FORMS, "/api/pull")}
_ROUTES |= {path: ("GET",) for path in (_MODELS, "/health", "/metrics", "/")}
_ROUTES |= {path: ("GET",) for path in ("/api/version", "/api/tags")}
_BELOW = {f"{_MODELS}/": ("GET",), f"{_RESPONSES}/": ("GET", "DELETE")}  # paths that go on


class ClientGone(ConnectionError):
    """The client has closed the connection before the end of the answer."""


class Handler(BaseHTTPRequestHandler):
    """Answers the request of one connection.

    Args:
        generator: an :class:`mlx_qwen3next.server.engine.engine.Engine`.
        settings: the settings of the HTTP side.
        stored: the responses that requests may continue.
        connection: the arguments of ``socketserver``: request, client_address, server.
        system_fingerprint: of the versions and the machine, in answers.
        log: where requests are stored; None stores none.
    """

    timeout = 60  # seconds to receive a request, and for each write of the answer
    disable_nagle_algorithm = True
    headers = Message()  # until the headers of a request are read

    def __init__(
        self,
        generator: Any,
        settings: Settings,
        stored: Stored,
        *connection: Any,
        system_fingerprint: str,
        log: RequestLog | None = None,
    ):
        self.generator, self.settings, self._log = generator, settings, log
        self._exchange = Exchange()
        created = int(time.time())
        self._about = About(settings.names[0], created, system_fingerprint, stored)
        self._error = Form.error  # the form of errors
        self._streams = False  # whether the answer is to be an event stream
        self._stream: Form | None = None  # of the event stream whose headers are sent
        self._is_unread = True  # whether the body, if there is one, is still to be read
        self._sent = 0.0  # when the last chunk was sent
        super().__init__(*connection)

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = Incoming(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._incoming)

    def do_GET(self) -> None:
        """Answers a request of any method."""
        try:
            self._answer(self.path.partition("?")[0])
        except RequestError as error:
            self._refuse(error)
        except OSError as error:  # of the connection; the generator's have become RequestErrors
            self._exchange.status, self._exchange.error = GONE, first_line(error)
            raise
        except Exception as error:
            self._refuse(_server_error(error))

    def finish(self) -> None:
        """Tells of the exchange, however it has ended, and closes it."""
        exchange, asked = self._exchange, getattr(self, "path", "").partition("?")[0]
        if exchange.status:
            below = next((start for start in _BELOW if asked.startswith(start)), "other")
            path = asked if asked in _ROUTES else below
            exchange.tell(self.requestline, path, self.address_string(), self.generator.metrics)
            if self._log is not None and exchange.body is not None:
                self._log.write(exchange, path)
        super().finish()

    do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _answer(self, path: str) -> None:
        form = _FORMS.get(path)
        self._error = (form or Form).error
        check_origin(self.headers, self.settings)
        below = next((start for start in _BELOW if path.startswith(start)), None)
        methods = _BELOW[below] if below else _ROUTES.get(path, ())
        if self.command == "OPTIONS" and methods:
            self._send(204)
            return
        if path not in OPEN:
            check_key(self.headers, self.settings)
        if not methods:
            known = ", ".join(_ROUTES)
            raise RequestError(f"there is no {path[:80]} here; the paths are {known}", status=404)
        if self.command not in methods and (self.command != "HEAD" or "GET" not in methods):
            allow = {"Allow": ", ".join([*methods, "OPTIONS"])}
            message = f"{path[:80]} takes {' and '.join(methods)}, not {self.command}"
            raise RequestError(message, status=405, headers=allow)
        if form is not None:
            self._complete(form, path)
        elif path == "/":
            self._send_bytes(200, PAGE, "text/html; charset=utf-8", HEADERS)
        elif path == "/metrics":
            text = self.generator.metrics.text(self.generator.gauges())
            self._send_bytes(200, text.encode(), metrics.TYPE, {})
        elif below:
            self._send(200, self._find(below, unquote(path[len(below) :])))
        else:
            self._send(*self._told(path))

    def _told(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and answer of a path that tells of the server."""
        about, health = self._about, self.generator.health
        match path:
            case "/v1/models":
                return 200, discovery.models(self._model(about.model))
            case "/api/version":
                return 200, discovery.OLLAMA
            case "/api/tags":
                return 200, discovery.tags(about.model, about.created)
            case "/api/pull":
                body = parse(self._read_body())
                self._model(str(body.get("model") or body.get("name")))
                return 200, discovery.PULLED
        return 200 if health == "ok" else 503, {"status": health}

    def _find(self, below: str, name: str) -> dict[str, Any]:
        """The model, or the response kept, of a name."""
        if below.startswith(_MODELS):
            return self._model(name)
        kept = self._about.stored.get(name)
        if self.command != "DELETE":
            return kept.response
        self._about.stored.delete(name)
        return {"id": name, "object": "response", "deleted": True}

    def _model(self, name: str) -> dict[str, Any]:
        name = served_name(name, self.settings.names, self.settings.aliases)
        return discovery.model(name, self._about.created, self.generator.context_length)

    def _read_body(self) -> bytes:
        raw = read_body(self.headers, self.rfile, self.settings.max_body_bytes)
        self._is_unread = False
        return raw

    def _complete(self, protocol: type[Form], path: str) -> None:
        """Checks the body and answers it."""
        settings = self.settings
        raw = self._read_body()
        with _large_bodies if len(raw) > _LARGE else nullcontext():
            body = parse(raw)
            if self._log is not None:
                self._exchange.body = body = self._log.seeded(body)
            form = protocol(body, self._about)
            fields = normalise(
                form.request,
                chat=form.is_chat,
                names=settings.names,
                aliases=settings.aliases,
                adapter=settings.adapter,
            )
        del raw
        try:
            options = options_of(fields, self.generator.args)
        except ValueError as error:  # the flags' values: those of the request are checked
            raise _server_error(error) from error
        calls, template = self._about.stored.calls, options.template_options.get("chat_template")
        if form.is_chat:
            fields["messages"] = calls.restored(template, fields["messages"])
        prompt = prompt_of(fields, is_chat=form.is_chat)
        if path == _COUNT:
            count = self._asked(lambda: self.generator.count_tokens(prompt, options))
            self._send(200, {"input_tokens": count})
            return
        self._streams = fields.get("stream", False)
        try:
            context, tokens = self._generate(prompt, options)
            chat = prompt if isinstance(prompt, Chat) else Chat([])
            reader = TokenReader(context, chat.tools, chat.one_call, template, calls)
            if self._streams:
                self._begin_stream(form)
            self._send_answer(form, fields, reader, self._checked(tokens))
        finally:
            if self._exchange.context is not None:
                self._exchange.context.stop()

    def _send_answer(
        self,
        form: Form,
        fields: dict[str, Any],
        reader: TokenReader,
        tokens: Iterator[SampledToken],
    ) -> None:
        """Sends the answer in chunks as it comes, or as a whole."""
        events: list[Event] = []
        sampled: list[SampledToken] = []  # tokens that no chunk has told of
        beginning: bytes | None = None  # of a stream, still to be sent
        for token in tokens:
            if beginning is None:  # the first token tells how much of the prompt was known
                assert self._exchange.context is not None
                beginning = form.begin(self._exchange.context, fields)
            self._exchange.add(token)
            events += reader.add(token)
            sampled.append(token)
            if reader.is_over:
                break
            if self._streams and any(event != Text("") for event in events):
                self._send_chunk(beginning + form.chunk(events, sampled))
                events, sampled, beginning = [], [], b""
            elif self._streams:
                self._keep_alive()
        events += reader.end()
        if self._streams:
            self._send_chunk((beginning or b"") + form.end(events, sampled, reader.ending))
        else:
            self._send(200, form.whole(events, sampled, reader.ending))

    def _send_chunk(self, chunk: bytes) -> None:
        self.wfile.write(chunk)
        self._sent = time.monotonic()

    def _keep_alive(self, comment: str = "keepalive") -> None:
        """Sends a comment if nothing was sent for a while: part of the answer is held back."""
        if time.monotonic() > self._sent + _SILENCE:
            self._send_chunk(f": {comment}\n\n".encode())

    def _generate(self, prompt: Prompt, options: Options) -> tuple[Context, Iterator[SampledToken]]:
        def progress(processed: int, total: int) -> None:
            self._check_client()
            if not self._streams:
                return
            try:
                self.wfile.write(f": keepalive {processed}/{total}\n\n".encode())
            except OSError as error:
                raise ClientGone(first_line(error)) from None

        context, tokens = self._asked(lambda: self.generator.generate(prompt, options, progress))
        self._exchange.context = context
        return context, tokens

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """Returns the generator's immediate answer; its errors become those of the request."""
        try:
            return ask()
        except ContextLengthError as error:
            raise RequestError(first_line(error), code="context_length_exceeded") from error
        except (ValueError, TemplateError) as error:
            param = error.param if isinstance(error, FieldError) else None
            raise RequestError(first_line(error), param) from error
        except QueueFullError as error:
            code = "rate_limit_exceeded"
            raise RequestError(first_line(error), status=429, code=code, headers=RETRY) from error
        except Exception as error:
            raise self._failure(error) from error

    def _checked(self, tokens: Iterator[SampledToken]) -> Iterator[SampledToken]:
        """Passes the tokens on while the client is there."""
        try:
            for token in tokens:
                self._check_client()
                yield token
        except ClientGone:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RequestError:
        health = self.generator.health
        if isinstance(error, RuntimeError) and health != "ok":
            message = f"the server is not ready ({health}): {first_line(error)}"
            return RequestError(message, status=503, headers=RETRY)
        return _server_error(error)

    def _check_client(self) -> None:
        """Checks that the client has not closed the connection.

        Raises:
            ClientGone: the client has closed it.
        """
        # A client that has only stopped sending (SHUT_WR) looks the same; HTTP clients do not do
        # that. select() is no alternative: it refuses file descriptors above 1023.
        self.connection.settimeout(0)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ClientGone("the client closed the connection")
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGone(first_line(error)) from None
        finally:
            self.connection.settimeout(self.timeout)

    def _begin_stream(self, form: Form) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self._send_headers(cors_headers(self.headers, self.settings))
        self.end_headers()
        self._stream = form

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Sends an error of ``http.server``, such as an unreadable request."""
        self._refuse(RequestError(message or HTTPStatus(code).phrase, status=code))

    def _refuse(self, error: RequestError) -> None:
        self._exchange.status, self._exchange.error = error.status, str(error)
        if error.status >= 500:
            logging.error("%s: %s", error.status, error, exc_info=error.__cause__)
        elif error.status in (401, 403):  # applications seldom show these
            logging.warning("%s: %s", error.status, ascii(str(error)))
        if self._stream is not None:
            self.wfile.write(self._stream.failed(error))
            return
        self._send(error.status, self._error(error), error.headers)
        if self._is_unread and ("Content-Length" in self.headers or self.command == "POST"):
            self._discard()

    def _send(
        self,
        status: int,
        content: dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        raw = b"" if content is None else json.dumps(content).encode()
        self._send_bytes(status, raw, "application/json", headers or {})

    def _send_bytes(self, status: int, raw: bytes, kind: str, headers: Mapping[str, str]) -> None:
        """Sends a whole answer.

        Args:
            raw: the body, which has no headers if it is empty.
            kind: its media type.
        """
        self.send_response(status)
        self._send_headers({**cors_headers(self.headers, self.settings), **headers})
        if raw:
            self._send_headers({"Content-Type": kind, "Content-Length": str(len(raw))})
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _send_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)

    def _discard(self) -> None:
        """Reads the rest of the body, without which the client might not get the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self._incoming.deadline = time.monotonic() + _LINGER
            while self.rfile.read1(2**16):
                pass

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Notes the status, which is told at the end."""
        self._exchange.status = int(code)

    def log_message(self, format: str, *args: Any) -> None:
        logging.info("%s %s", self.address_string(), ascii(format % args))


def _server_error(error: Exception) -> RequestError:
    refusal = RequestError(f"the server failed: {first_line(error)}", status=500)
    refusal.__cause__ = error
    return refusal
