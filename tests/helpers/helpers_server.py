"""Helpers for the server's tests: a generator without a model, requests, and spoiled requests."""

import contextlib
import copy
import functools
import http.client
import json
import random
import socket
import threading
import time
from types import SimpleNamespace

from mlx_lm.tokenizer_utils import load

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.server.answers.tokens import Context, SampledToken
from mlx_qwen3next.server.engine.metrics import Metrics
from mlx_qwen3next.server.http.connections import Server
from mlx_qwen3next.server.http.handler import Handler, Settings
from mlx_qwen3next.server.protocols.stored import Stored
from mlx_qwen3next.server.requests.prompt import tokenized_prompt

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
NAMES = ("demo", "org/demo")
CALL = """<tool_call>
<function=weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>"""


@functools.cache
def tokenizer():
    """The tokenizer of the bundled model."""
    return load(BUNDLED)


class Fake:
    """A generator that answers every request with one text, token by token.

    The model's template makes the prompt.

    Args:
        text: the answer.
        before, fail: an exception to raise instead of starting, and instead of token number `at`.
        hold: an event to wait for before each token from number `at` on.
        end: the finish reason of the last response: "stop", which has a token of its own, or None,
            with which the engine ends at a stop word.
        progress: how many times to report progress before the first token.
        logprobs: of the sampled token and of the other one that `top_tokens` has before it.
        options: the server's flags.
    """

    def __init__(self, text="Hello.", *, before=None, fail=None, hold=None, at=0, **options):
        self.text, self.before, self.fail, self.hold, self.at = text, before, fail, hold, at
        self.end = options.pop("end", "stop")
        self.progress = options.pop("progress", 0)
        self.logprobs = options.pop("logprobs", (-0.25, -2.0))
        self.health = options.pop("health", "ok")
        defaults = {"max_tokens": 64, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        defaults |= {"allowed_origins": "*", "chat_template_args": {}}
        self.args = SimpleNamespace(**defaults | options)
        self.tokenizer, self.context_length = tokenizer(), 4096
        self.metrics, self.gauges = Metrics(), dict
        self.requests = []
        self.contexts = []

    def generate(self, prompt, args, progress):
        self.requests.append((prompt, args))
        if self.before is not None:
            raise self.before
        rendered = tokenized_prompt(prompt, self.tokenizer, args.template_options)
        ctx = Context(self.tokenizer, *rendered[:4], cached=1)
        self.contexts.append(ctx)
        return ctx, self._responses(args, progress)

    def count_tokens(self, prompt, args):
        return len(tokenized_prompt(prompt, self.tokenizer, args.template_options).tokens)

    def _responses(self, args, progress):
        tokens = tokenizer().encode(self.text, add_special_tokens=False)
        detokenizer = tokenizer().detokenizer
        for i in range(self.progress):
            progress(i, self.progress)
        for i, token in enumerate([*tokens, None] if self.end else tokens):
            if i >= self.at and self.fail is not None:
                raise self.fail
            if i >= self.at and self.hold is not None:
                self.hold.wait(10)
            reason = "stop" if token is None else "length" if i + 1 == args.max_tokens else None
            if token is None:
                token = tokenizer().eos_token_id
            else:
                detokenizer.add_token(token)
            if reason is not None:
                detokenizer.finalize()
            top = list(zip((token, 5), self.logprobs, strict=True))[: args.top_logprobs]
            text = detokenizer.last_segment
            yield SampledToken(text, token, self.logprobs[0], reason, tuple(reversed(top)))
            if reason is not None:
                return


@contextlib.contextmanager
def serving(generator=None, settings=None, **options):
    """A server with a generator; checks at the end that none of its threads hangs.

    Args:
        options: others of the handler.
    """
    settings = settings or Settings(names=NAMES)
    handler = functools.partial(
        Handler, generator or Fake(), settings, Stored(), system_fingerprint="test", **options
    )
    with Server("127.0.0.1", 0, handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
            assert server.wait(10), "an exchange goes on"
        finally:
            server.shutdown()
            thread.join()


def calls_of(messages):
    """The names and arguments of calls, put together from their pieces."""
    calls = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            if "id" in call:
                assert call.get("index", len(calls)) == len(calls)
                calls.append((call["function"]["name"], call["function"]["arguments"]))
            else:
                name, arguments = calls[call["index"]]
                calls[call["index"]] = name, arguments + call["function"]["arguments"]
    return calls


def until(condition, seconds=10):
    """Waits until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


@contextlib.contextmanager
def connected(server, raw=b""):
    """A socket connected to a server, which has sent some bytes."""
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(raw)
        yield connection


def everything(connection):
    """The bytes that the server sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(2**16), b""))


def post(path=CHAT, **fields):
    """The bytes of a valid request."""
    body = json.dumps({"messages": MESSAGES, "prompt": "Hi"} | fields)
    return f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def exchange(server, method, path, body=None, headers=None):
    """Sends a request with a body of bytes or JSON; returns status, headers and answer in bytes."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def ask(server, body=None, path=CHAT, **fields):
    """Sends a POST, by default of a valid body with these fields; returns status and answer."""
    required = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
    status, headers, raw = exchange(server, "POST", path, body or required | fields)
    assert headers["Content-Type"] == "application/json"
    assert int(headers["Content-Length"]) == len(raw)
    return status, strict_json(raw)


def events(server, path=CHAT, **fields):
    """The data of the events of a streamed answer, and its comments."""
    required = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hi"}
    status, headers, raw = exchange(server, "POST", path, required | fields | {"stream": True})
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    data = [part.removeprefix("data: ") for part in parts if part.startswith("data: ")]
    comments = [part for part in parts if part.startswith(":")]
    assert len(data) + len(comments) == len(parts)
    return [x if x == "[DONE]" else strict_json(x) for x in data], comments


def counted(server):
    """The metrics of a server: a name with its labels -> the value."""
    status, headers, raw = exchange(server, "GET", "/metrics")
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
    lines = [line for line in raw.decode().splitlines() if not line.startswith("#")]
    return {
        name.removeprefix("qwen3next_"): float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines)
    }


def strict_json(raw):
    """Parses JSON, without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} in {raw!r}")

    return json.loads(raw, parse_constant=refuse)


_FUNCTION = {
    "name": "weather",
    "description": "Tells the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "which"}, "days": {"type": "int"}},
        "required": ["city"],
    },
}
_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
_SAMPLING = {
    "model": "default_model",
    "stream": False,
    "stream_options": {"include_usage": True},
    "max_tokens": 4,
    "max_completion_tokens": 4,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "repetition_context_size": 20,
    "presence_penalty": 0.5,
    "presence_context_size": 20,
    "frequency_penalty": 0.5,
    "frequency_context_size": 20,
    "xtc_probability": 0.1,
    "xtc_threshold": 0.2,
    "logit_bias": {"5": 1, "7": -2.5},
    "top_logprobs": 2,
    "seed": 7,
    "stop": ["one", "two"],
    "num_draft_tokens": 2,
    "n": 1,
    "user": "somebody",
}
_VALID = {
    CHAT: _SAMPLING
    | {
        "messages": [
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "What is the weather?"}]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        "tools": [{"type": "function", "function": _FUNCTION}],
        "tool_choice": "auto",
        "logprobs": True,
        "response_format": {"type": "text"},
        "chat_template_kwargs": {"enable_thinking": False},
        "role_mapping": {"user": "U: "},
    },
    TEXT: _SAMPLING | {"prompt": "Once upon", "logprobs": 2, "echo": False, "best_of": 1},
}
_ODD = (
    *(None, True, False, 0, 1, -1, 1.5, -0.0, 1e308, 2**31, 2**64, -(2**63), 10**400),
    *(float("nan"), float("inf"), "", "a", "\0", "\ud800", "\U0001f642", "é" * 300, "<|im_end|>"),
    *([], {}, [[]], [{}], {"": None}, [None], ["a", "b"], [1, 2, 3], [-1], {"type": "image_url"}),
    *("default_model", "NaN", "null", "-1", "{}", '{"x": NaN}', "[" * 2000, "http://127.0.0.1:1/"),
)


def bodies(seed, count, valid=_VALID):
    """Yields `count` pairs of path and body: valid requests, spoiled in up to four places, and
    some of them in their bytes.

    Args:
        valid: path -> a valid request with all its fields.
    """
    rng = random.Random(seed)
    for _ in range(count):
        path = rng.choice(list(valid))
        body = copy.deepcopy(valid[path])
        for name in [name for name in body if name not in ("messages", "prompt", "input")]:
            if rng.random() < 0.5:
                del body[name]
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            _spoil(rng, body)
        yield path, _spoil_bytes(rng, json.dumps(body, ensure_ascii=rng.random() < 0.5))


def _places(value):
    """Yields every (container, key) in a value."""
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from _places(value[key])


def _spoil(rng, body):
    places = list(_places(body))
    if not places:
        return
    container, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1:
            container[key] = [container[key]]
        case 2:
            container[key] = {"type": "text", "text": container[key]}
        case 3:
            other, name = rng.choice(places)
            with contextlib.suppress(LookupError):  # it may be in a part that was deleted
                container[key] = copy.deepcopy(other[name])
        case 4:
            for _ in range(rng.choice((3, 90, 150))):
                container[key] = [container[key]]
        case _:
            container[key] = copy.deepcopy(rng.choice(_ODD))


def _spoil_bytes(rng, text):
    raw = text.encode("utf-8", "surrogatepass")
    match rng.randrange(16):
        case 0:
            return raw[: rng.randrange(len(raw) + 1)]
        case 1:
            at = rng.randrange(len(raw))
            return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        case 2:
            return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")), "surrogatepass")
        case 3:
            return raw[:-1] + b', "stream": true, "messages": [], "prompt": []}'
        case 4:
            return raw + rng.choice((b"\0", b"{}", b" ", b"\n", raw))
        case _:
            return raw
