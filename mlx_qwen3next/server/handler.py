"""The handler of HTTP requests: OpenAI's completions and chat completions.

:class:`Handler` checks a request and passes it on to its base class, mlx-lm's handler, which turns
tokens into text, reasoning and tool calls. It also answers errors and log-probabilities in OpenAI's
form, and stops the generation once the client has gone.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from email.message import Message
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from jinja2 import TemplateError
from mlx_lm.server import (
    APIHandler,
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
)

from ..errors import ContextLengthError, QueueFullError, first_line
from . import logprobs
from .http_server import RETRY, Incoming
from .schema import RequestError, normalise, parse, unknown_model

_LARGE = 2**20  # bytes of a large body; the parsed body may take 30 times as many
_large_bodies = threading.Semaphore(2)  # how many large bodies are parsed at a time
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


class Handler(APIHandler):
    """Answers the request of one connection.

    Args:
        generator: has the methods of mlx-lm's ResponseGenerator. ``generate`` raises ValueError
            for a fault of the client; ``health`` is "ok", "loading", "draining" or "unavailable".
        settings: the settings of the HTTP side.
        connection: the arguments of ``socketserver``: request, client_address, server.
        system_fingerprint: computed by mlx-lm's handler for every request if missing.
    """

    timeout = 60  # seconds to receive a request, and for each write of the answer
    disable_nagle_algorithm = True
    headers = Message()  # until the headers of a request are read

    def __init__(
        self,
        generator: Any,
        settings: Settings,
        *connection: Any,
        system_fingerprint: str | None = None,
    ):
        self.generator, self.settings = generator, settings
        self._is_streaming = False  # whether the headers of an event stream are sent
        self._is_unread = True  # whether the body, if there is one, is still to be read
        self._sampled: list[Response] = []  # tokens whose log-probabilities are still to be sent
        self._wants_logprobs = False
        self._context: GenerationContext | None = None
        self._generated = 0  # tokens
        self._text_offset = 0  # characters
        super().__init__(generator, *connection, system_fingerprint=system_fingerprint)

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
        if name not in self.settings.names:
            raise unknown_model(name, self.settings.names)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "local"}

    def _complete(self, path: str) -> None:
        """Checks the body, and passes the checked one to mlx-lm's handler."""
        names, adapter = self.settings.names, self.settings.adapter
        raw = self._read_body()
        with _large_bodies if len(raw) > _LARGE else nullcontext():
            fields = normalise(parse(raw), chat="chat" in path, names=names, adapter=adapter)
            raw = json.dumps(fields).encode()
        del fields
        self.path = path
        self.rfile = io.BytesIO(raw)
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(raw))
        super().do_POST()

    def _read_body(self) -> bytes:
        length, limit = self.headers.get("Content-Length"), self.settings.max_body_bytes
        if length is None:
            raise RequestError("a request must have the header Content-Length", status=411)
        if not (length.isascii() and length.isdigit()):
            raise RequestError(f"Content-Length must be a number of bytes, got {length[:40]!r}")
        if len(length) > 15 or int(length) > limit:
            message = f"the body must be of at most {limit} bytes, got {length[:40]}"
            raise RequestError(message, status=413)
        self._is_unread = False
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ClientGone(f"the body ended after {len(raw)} of {length} bytes")
        return raw

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Completes a text or a chat with mlx-lm's handler, whose generator is ``_generate``."""
        generator: Any = SimpleNamespace(generate=self._generate)
        self.response_generator = generator
        try:
            super().handle_completion(request, stop_words)
        finally:
            if self._context is not None:
                # mlx-lm's handler does this too, except if the headers cannot be sent.
                self._context.stop()

    def _generate(
        self,
        request: CompletionRequest,
        args: GenerationArguments,
        progress_callback: Callable[[int, int], None],
    ) -> tuple[GenerationContext, Iterator[Response]]:
        self._wants_logprobs = args.logprobs
        self.requested_model = self.settings.names[0]  # from here on used in the answer only

        def progress(processed: int, total: int) -> None:
            self._check_client()
            try:
                progress_callback(processed, total)
            except OSError as error:
                raise ClientGone(first_line(error)) from None

        try:
            ctx, responses = self.generator.generate(request, args, progress_callback=progress)
        except ContextLengthError as error:
            raise RequestError(first_line(error), code="context_length_exceeded") from error
        except (ValueError, TemplateError) as error:
            raise RequestError(first_line(error)) from error
        except QueueFullError as error:
            code = "rate_limit_exceeded"
            raise RequestError(first_line(error), status=429, code=code, headers=RETRY) from error
        except Exception as error:
            raise self._failure(error) from error
        self._context = ctx
        self._tokenizer = (
            self.generator.model_provider.tokenizer
        )  # the provider drops it when the server drains
        ctx.tool_parser = _strict(ctx.tool_parser)
        return ctx, self._watch(responses)

    def _watch(self, responses: Iterator[Response]) -> Iterator[Response]:
        reason = None
        try:
            for response in responses:
                self._check_client()
                self._generated += 1
                if self._wants_logprobs:
                    self._sampled.append(response)
                reason = response.finish_reason
                if reason == "stop" and response.token in self._tokenizer.eos_token_ids:
                    reason, response = None, replace(response, finish_reason=None)
                yield response
        except ClientGone:
            raise
        except Exception as error:
            raise self._failure(error) from error
        if reason is None:
            # mlx-lm's handler drops an end of the text that may begin a marker, because its own
            # generator may leave a part of a stop word there; after "length" it does not.
            yield Response("", 0, 0.0, "length", ({},))
            yield Response("", 0, 0.0, "stop", ({},))

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

    def generate_response(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Makes mlx-lm's response, with log-probabilities in OpenAI's form, streamed or not."""
        response = super().generate_response(*args[:2], *self._counts(*args[2:]), **options)
        if self._wants_logprobs:
            sampled, self._sampled = self._sampled, []
            response["choices"][0]["logprobs"] = (
                logprobs.chat_form(self._tokenizer, sampled)
                if self.object_type.startswith("chat")
                else logprobs.text_form(self._tokenizer, sampled, self._text_offset)
            )
            self._text_offset += sum(len(token.text) for token in sampled)
        return response

    def completion_usage_response(self, *counts: Any) -> dict[str, Any]:
        """Makes mlx-lm's response with the right kind of object, which is always a chat's there."""
        response = super().completion_usage_response(*self._counts(*counts))
        return response | {"object": self.object_type}

    def _counts(self, prompt: Any = None, _: Any = None, cached: Any = None) -> tuple[Any, ...]:
        return prompt, self._generated, cached  # mlx-lm also counts the responses _watch adds

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # mlx-lm's handler is about to answer an exception that it has caught, in a form of its own.
        if status_code != 200 and (error := sys.exception()) is not None:
            raise error
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
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
        self._headers_buffer: list[bytes] = []  # drops those of mlx-lm's handler
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


def _strict(parser: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Wraps a parser of tool calls so that it raises ValueError, as mlx-lm's handler expects."""
    if parser is None:
        return None

    def parse_call(*args: Any) -> Any:
        try:
            return parser(*args)
        except Exception as error:
            raise ValueError(first_line(error)) from error

    return parse_call
