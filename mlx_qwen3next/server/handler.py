"""The handler of HTTP requests: OpenAI's completions and chat completions.

:class:`Handler` checks a request, reads reasoning and calls from the text as it is generated
(:mod:`mlx_qwen3next.server.answers`), sends them in OpenAI's form, and stops the generation once
the client has gone.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from jinja2 import TemplateError

from ..errors import ContextLengthError, QueueFullError, first_line
from . import logprobs
from .answers import Reader, call_format
from .arguments import Arguments, Chat, Prompt, arguments_of, prompt_of
from .body import read_body
from .events import Event, Text
from .http_server import RETRY, Incoming
from .prompt import template_of
from .protocols.openai import Completion
from .responses import Context, Response
from .schema import RequestError, normalise, parse, served_name

_LARGE = 2**20  # bytes of a large body; the parsed body may take 30 times as many
_large_bodies = threading.Semaphore(2)  # how many large bodies are parsed at a time
_SILENCE = 3.0  # seconds of a stream in which nothing is sent, at most
_LINGER = 2.0  # seconds for a refused client to send the rest of its body and read the answer

_MODELS = "/v1/models"
_ROUTES = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/chat/completions": "POST",
    _MODELS: "GET",
    "/health": "GET",
}


@dataclass(frozen=True)
class Settings:
    """The settings of the HTTP side.

    Args:
        names: the names of the model that a request may use; the server itself uses the first.
        adapter: the name of the adapter that a request may use.
        allowed_origins: the origins of web pages that may use the server; ``*`` allows all.
        api_key: the key that requests must carry; None requires none.
        max_body_bytes: the size of the largest body that is read.
    """

    names: tuple[str, ...]
    adapter: str | None = None
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20


class ClientGone(ConnectionError):
    """The client has closed the connection before the end of the answer."""


class Handler(BaseHTTPRequestHandler):
    """Answers the request of one connection.

    Args:
        generator: an :class:`mlx_qwen3next.server.engine.Engine`.
        settings: the settings of the HTTP side.
        connection: the arguments of ``socketserver``: request, client_address, server.
        system_fingerprint: of the versions and the machine, in answers.
    """

    timeout = 60  # seconds to receive a request, and for each write of the answer
    disable_nagle_algorithm = True
    headers = Message()  # until the headers of a request are read

    def __init__(
        self,
        generator: Any,
        settings: Settings,
        *connection: Any,
        system_fingerprint: str,
    ):
        self.generator, self.settings = generator, settings
        self.created = int(time.time())
        self._fingerprint = system_fingerprint
        self._streams = False  # whether the answer is to be an event stream
        self._is_streaming = False  # whether the headers of an event stream are sent
        self._is_unread = True  # whether the body, if there is one, is still to be read
        self._sampled: list[Response] = []  # tokens whose log-probabilities are still to be sent
        self._wants_logprobs = False
        self._context: Context | None = None
        self._generated = 0  # tokens
        self._text_offset = 0  # characters
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
        except OSError:  # of the connection; those of the generator have become RequestErrors
            raise
        except Exception as error:
            self._refuse(_server_error(error))

    do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _answer(self, path: str) -> None:
        self._check_origin()
        is_model = path.startswith(f"{_MODELS}/")
        method = "GET" if is_model else _ROUTES.get(path)
        if self.command == "OPTIONS" and method:
            self._send(204)
            return
        self._check_key(path)
        if method is None:
            known = ", ".join(_ROUTES)
            raise RequestError(f"there is no {path[:80]} here; the paths are {known}", status=404)
        if self.command != method and (self.command, method) != ("HEAD", "GET"):
            allow = {"Allow": f"{method}, OPTIONS"}
            message = f"{path[:80]} takes {method}, not {self.command}"
            raise RequestError(message, status=405, headers=allow)
        if is_model:
            self._send(200, self._model(unquote(path[len(_MODELS) + 1 :])))
        elif path == _MODELS:
            self._send(200, {"object": "list", "data": [self._model(self.settings.names[0])]})
        elif path == "/health":
            health = self.generator.health
            self._send(200 if health == "ok" else 503, {"status": health})
        else:
            self._complete(path)

    def _check_origin(self) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and not self._is_allowed(origin):
            message = f"web pages of {origin[:80]} may not use this server; see --allowed-origins"
            raise RequestError(message, status=403)

    def _is_allowed(self, origin: str) -> bool:
        return bool({origin, "*"} & set(self.settings.allowed_origins))

    def _check_key(self, path: str) -> None:
        key = self.settings.api_key
        if key is None or path == "/health":
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _model(self, name: str) -> dict[str, Any]:
        name = served_name(name, self.settings.names)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "local"}

    def _complete(self, path: str) -> None:
        """Checks the body and answers it."""
        names, adapter = self.settings.names, self.settings.adapter
        raw = read_body(self.headers, self.rfile, self.settings.max_body_bytes)
        self._is_unread = False
        is_chat = "chat" in path
        with _large_bodies if len(raw) > _LARGE else nullcontext():
            fields = normalise(parse(raw), chat=is_chat, names=names, adapter=adapter)
        del raw
        prompt = prompt_of(fields, is_chat=is_chat)
        try:
            arguments = arguments_of(fields, self.generator.args)
        except ValueError as error:  # the flags' values: those of the request are checked
            raise _server_error(error) from error
        self._streams = fields.get("stream", False)
        with_usage = fields.get("stream_options", {}).get("include_usage", False)
        try:
            context, responses = self._generate(prompt, arguments)
            reader = None
            if isinstance(prompt, Chat):
                name = arguments.template_options.get("chat_template")
                template = template_of(context.tokenizer, name, prompt.tools)
                reader = Reader(
                    format=call_format(template),
                    tools=prompt.tools,
                    reasoning_open=context.reasoning_open,
                )
            if self._streams:
                self._begin_stream()
            form = Completion(self._common(is_chat), is_chat=is_chat, is_streamed=self._streams)
            self._send_answer(form, reader, context, responses, with_usage)
        finally:
            if self._context is not None:
                self._context.stop()

    def _send_answer(
        self,
        form: Completion,
        reader: Reader | None,
        context: Context,
        responses: Iterator[Response],
        with_usage: bool,
    ) -> None:
        """Sends the answer in chunks as it comes, or as a whole."""
        events: list[Event] = []
        reason, by_itself = "stop", True
        for response in self._checked(responses):
            events += [Text(response.text)] if reader is None else reader.add(response.text)
            reason = response.finish_reason or reason
            by_itself = response.token in context.tokenizer.eos_token_ids
            if self._streams and any(event != Text("") for event in events):
                self._send_chunk(self._with_logprobs(form.choice(events)))
                events = []
            elif self._streams:
                self._keep_alive()
        events += [] if reader is None else reader.end()
        # A call that is unfinished where the model ends by itself is mended; a stop string cuts it.
        is_cut = reader is not None and reader.is_cut and not by_itself
        last = self._with_logprobs(form.choice(events, reason, is_cut=is_cut))
        counts = len(context.prompt), context.cached, self._generated, context.accepted
        if not self._streams:
            self._send(200, last | form.usage(*counts))
            return
        self._send_chunk(last)
        if with_usage:
            self._send_chunk(form.last_chunk(form.usage(*counts)))
        self.wfile.write(b"data: [DONE]\n\n")

    def _send_chunk(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self._sent = time.monotonic()

    def _keep_alive(self, comment: str = "keepalive") -> None:
        """Sends a comment if nothing was sent for a while: part of the answer is held back."""
        if time.monotonic() > self._sent + _SILENCE:
            self.wfile.write(f": {comment}\n\n".encode())
            self._sent = time.monotonic()

    def _common(self, is_chat: bool) -> dict[str, Any]:
        """The fields that all objects of an answer have."""
        kind = "chat.completion" if is_chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4()}",
            "system_fingerprint": self._fingerprint,
            "object": f"{kind}.chunk" if is_chat and self._streams else kind,
            "model": self.settings.names[0],
            "created": self.created,
        }

    def _generate(self, prompt: Prompt, arguments: Arguments) -> tuple[Context, Iterator[Response]]:
        self._wants_logprobs = arguments.logprobs

        def progress(processed: int, total: int) -> None:
            self._check_client()
            if not self._streams:
                return
            try:
                self.wfile.write(f": keepalive {processed}/{total}\n\n".encode())
            except OSError as error:
                raise ClientGone(first_line(error)) from None

        try:
            context, responses = self.generator.generate(prompt, arguments, progress)
        except ContextLengthError as error:
            raise RequestError(first_line(error), code="context_length_exceeded") from error
        except (ValueError, TemplateError) as error:
            raise RequestError(first_line(error)) from error
        except QueueFullError as error:
            code = "rate_limit_exceeded"
            raise RequestError(first_line(error), status=429, code=code, headers=RETRY) from error
        except Exception as error:
            raise self._failure(error) from error
        self._context = context
        return context, responses

    def _checked(self, responses: Iterator[Response]) -> Iterator[Response]:
        """Passes the responses on while the client is there."""
        try:
            for response in responses:
                self._check_client()
                self._generated += 1
                if self._wants_logprobs:
                    self._sampled.append(response)
                yield response
        except ClientGone:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _with_logprobs(self, content: dict[str, Any]) -> dict[str, Any]:
        """Adds the log-probabilities that are still to be sent, in OpenAI's form."""
        if self._wants_logprobs:
            assert self._context is not None
            tokenizer = self._context.tokenizer
            sampled, self._sampled = self._sampled, []
            content["choices"][0]["logprobs"] = (
                logprobs.chat_form(tokenizer, sampled)
                if content["object"].startswith("chat")
                else logprobs.text_form(tokenizer, sampled, self._text_offset)
            )
            self._text_offset += sum(len(token.text) for token in sampled)
        return content

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

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self._set_cors_headers()
        self.end_headers()
        self._is_streaming = True

    def _set_cors_headers(self) -> None:
        origin, allowed = self.headers.get("Origin"), self.settings.allowed_origins
        if origin is None or not self._is_allowed(origin):
            return
        self.send_header("Access-Control-Allow-Origin", "*" if "*" in allowed else origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        # The star does not include Authorization.
        self.send_header("Access-Control-Allow-Headers", "*, Authorization")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Sends an error of ``http.server``, such as an unreadable request, in OpenAI's form."""
        self._refuse(RequestError(message or HTTPStatus(code).phrase, status=code))

    def _refuse(self, error: RequestError) -> None:
        if error.status >= 500:
            logging.error("%s: %s", error.status, error, exc_info=error.__cause__)
        elif error.status in (401, 403):  # applications seldom show these
            logging.warning("%s: %s", error.status, ascii(str(error)))
        if self._is_streaming:
            self.wfile.write(f"data: {json.dumps(error.body)}\n\n".encode())
            return
        self._send(error.status, error.body, *error.headers.items())
        if self._is_unread and ("Content-Length" in self.headers or self.command == "POST"):
            self._discard()

    def _send(
        self, status: int, content: dict[str, Any] | None = None, *headers: tuple[str, str]
    ) -> None:
        self.send_response(status)
        self._set_cors_headers()
        for name, value in headers:
            self.send_header(name, value)
        raw = b""
        if content is not None:
            raw = json.dumps(content).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _discard(self) -> None:
        """Reads the rest of the body, without which the client might not get the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self._incoming.deadline = time.monotonic() + _LINGER
            while self.rfile.read1(2**16):
                pass

    def log_message(self, format: str, *args: Any) -> None:
        logging.info("%s %s", self.address_string(), ascii(format % args))


def _server_error(error: Exception) -> RequestError:
    refusal = RequestError(f"the server failed: {first_line(error)}", status=500)
    refusal.__cause__ = error
    return refusal
