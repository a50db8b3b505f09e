"""The server's command: its checks before loading, its answers over HTTP, and its processes."""

import contextlib
import functools
import inspect
import json
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from helpers_generate import bundled, endless, forced, narrow, process
from helpers_group import free_port
from helpers_server import CALL, CHAT, TEXT, ask, bodies, calls_of, exchange, until
from helpers_serving import TOOLS, running, served, user
from mlx_lm.generate import BatchGenerator, GenerationBatch, StopSequences

from mlx_qwen3next import stream_generate
from mlx_qwen3next.cli import fingerprint_of
from mlx_qwen3next.decoding.sampling import Sampling
from mlx_qwen3next.server import command as server
from mlx_qwen3next.server import flags
from mlx_qwen3next.server.engine import mlx_lm_interface
from mlx_qwen3next.server.http import handler


# --- before loading ---------------------------------------------------------------------------
def test_a_port_that_is_taken(call):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = call(server.main, "--port", taken.getsockname()[1])
    assert status == 2
    assert err.count("\n") == 1 and "in use" in err


def test_a_model_s_names(tmp_path, monkeypatch):
    def names(*given):
        return server._names(flags.parser().parse_args(given))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert names() == (server.DEMO,)
    assert names("--model-name", "mine") == ("mine", server.DEMO)
    assert names("--model", "org/name") == ("org/name",)
    assert names("--model", "model") == ("model", str(tmp_path / "model"))
    assert names("--model", "model", "--model-name", "mine")[0] == "mine"


def test_the_api_key_may_be_in_a_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert server._api_key(f"@{file}") == "secret"
    assert server._api_key("secret") == "secret"
    assert server._api_key(None) is None
    file.write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        server._api_key(f"@{file}")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([], {"temp": 0.7, "top_k": 20}, "temperature 0.7, top-k 20 (--temp 0 for greedy)"),
        (["--temp", "0"], {"temp": 0, "top_k": 20}, "top-k 20"),
        (["--temp", "1", "--top-k", "3"], {"temp": 1, "top_k": 3}, None),
    ],
)
def test_the_checkpoints_recommendation(call, caplog, tmp_path, monkeypatch, given, options, said):
    seen = []

    def engine(args, *_):
        seen.append({name: getattr(args, name) for name in ("temp", "top_k")})
        raise ValueError("enough")

    monkeypatch.setattr(server, "Engine", engine)
    caplog.set_level("INFO")
    directory = endless(tmp_path / "model")
    file = directory / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 20}')
    args = ("--model", directory, "--port", 0)
    assert call(server.main, *args, *given)[0] == 2
    assert seen == [options]
    lines = [m for m in caplog.messages if "recommends" in m]
    assert lines == ([f"sampling as the checkpoint recommends: {said}"] if said else [])
    file.write_text('{"temperature": "warm"}')
    status, _, err = call(server.main, *args)
    assert (status, len(seen)) == (2, 1)
    assert err == f"error: {file}: temperature must be a number, got 'warm'\n"


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("example.org", None, True),
        ("0.0.0.0", "key", False),
    ],
)
def test_a_server_that_others_can_reach_warns_about_the_key(caplog, host, key, warns):
    server._announce(host, 80, handler.Settings(names=("x",), api_key=key))
    assert ("--api-key" in caplog.text) == warns


# --- mlx-lm's version ---------------------------------------------------------------------------
def test_nothing_of_mlx_lm_s_server_is_used():
    files = [*Path(server.__file__).parents[1].rglob("*.py")]
    assert len(files) > 80
    used = re.compile(r"^\s*(from|import) mlx_lm(\.server\b| import .*\bserver\b)", re.MULTILINE)
    assert [file.name for file in files if used.search(file.read_text())] == []


def test_the_mlx_lm_that_is_installed_fits():
    assert mlx_lm_interface.check() is None


def named(**names):
    """A function with these parameters."""

    def function(*args, **options):
        return None

    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return function


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (StopSequences, "matcher", None, "mlx_lm.generate.StopSequences.matcher is missing"),
        (BatchGenerator, "_next", None, "BatchGenerator._next is missing"),
        (
            *(BatchGenerator, "remove", named(uids=0, caches=0)),
            "remove has no parameter return_prompt_caches",
        ),
        (
            *(BatchGenerator, "remove", named(return_prompt_caches=0, uids=0)),
            "remove takes its parameters in another order",
        ),
    ],
)
def test_an_mlx_lm_that_differs_is_named(monkeypatch, call, owner, name, value, message):
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(ValueError, match=message):
        mlx_lm_interface.check()
    status, _, err = call(server.main, "--port", "0")
    assert (status, err.count("\n")) == (2, 1)


def test_an_attribute_that_is_gone_is_named(monkeypatch):
    empty = GenerationBatch.empty

    def without(*args):
        batch = empty(*args)
        del batch._matchers
        return batch

    monkeypatch.setattr(GenerationBatch, "empty", without)
    with pytest.raises(ValueError, match="GenerationBatch has no attribute _matchers"):
        mlx_lm_interface.check()


# --- OpenAI's client and the model --------------------------------------------------------------
@contextlib.contextmanager
def reached(**options):
    """(engine, its HTTP server, OpenAI's client of that)."""
    with running("--max-tokens", 2, **options) as engine, served(engine) as listening:
        url = "http://{}:{}/v1".format(*listening.server_address[:2])
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            yield engine, listening, client


@pytest.fixture(scope="module", params=["off", 3])
def over_http(request):
    """A server that decodes plainly or with drafts."""
    with reached(mtp=request.param) as server:
        yield server


@pytest.fixture(scope="module", params=["off", 3])
def trained(request):
    """The same with the bundled model, whose answers are text that comes back as the same
    tokens."""
    with reached(load=bundled, mtp=request.param) as server:
        yield server


QUESTION = [user("What does os.path.join do?")]


@functools.cache
def expected(n=40):
    """The command's answer to the question."""
    model, tokenizer = narrow()
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    return list(stream_generate(model, tokenizer, prompt, n, mtp="off"))


def test_a_chat_and_its_stream(over_http):
    _, _, client = over_http
    want = "".join(response.text for response in expected())
    request = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == want
    assert answer.usage.completion_tokens == len(expected())
    *chunks, last = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert last.usage.prompt_tokens == answer.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0


def test_the_second_turn_is_cached(trained):
    _, _, client = trained
    create = functools.partial(
        client.chat.completions.create, model="demo", temperature=0, max_tokens=60
    )
    messages = [user("What is a deque?")]
    first = create(messages=messages)
    answer = first.choices[0].message.content
    second = create(messages=[*messages, {"role": "assistant", "content": answer}, user("Why?")])
    read = first.usage.prompt_tokens + first.usage.completion_tokens
    # Everything before the new turn is cached; the stop token is in the prompt, not in the answer.
    assert second.usage.prompt_tokens_details.cached_tokens >= read - 1
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens


def test_a_completion_its_stream_and_a_stop_word(over_http):
    _, _, client = over_http
    request = {"model": "demo", "prompt": "import os\n", "temperature": 0, "max_tokens": 24}
    model, tokenizer = narrow()
    want = "".join(r.text for r in stream_generate(model, tokenizer, "import os\n", 24, mtp="off"))
    assert client.completions.create(**request).choices[0].text == want
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == want
    word = want[10:14]
    stopped = client.completions.create(**request, stop=[word, "never"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (want[: want.find(word)], "stop")


def test_log_probabilities(over_http):
    _, _, client = over_http
    request = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    for entry, want in zip(content, expected()[:12], strict=True):
        assert entry.logprob == pytest.approx(want.logprobs[want.token].item(), abs=1e-3)
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == pytest.approx(sorted(want.logprobs.tolist())[:-3:-1], abs=1e-3)
        assert tops[0] == pytest.approx(entry.logprob, abs=1e-3)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_call(trained, monkeypatch, streamed):
    """With drafts, most of which are right here, and without."""
    _, _, client = trained
    tokenizer = bundled()[1]
    prompt = tokenizer.apply_chat_template(QUESTION, tools=TOOLS, add_generation_prompt=True)
    text = tokenizer.encode("Let me see.\n" + CALL, add_special_tokens=False)
    script = [forced([*text, tokenizer.eos_token_id], len(prompt))]
    monkeypatch.setattr(Sampling, "logits_processors", lambda _: script)
    request = {"model": "demo", "messages": QUESTION, "tools": TOOLS, "temperature": 0}
    request["max_tokens"] = 100
    if streamed:
        deltas = [
            chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True)
        ]
        calls = calls_of([choice.delta.to_dict() for choice in deltas])
        content = "".join(choice.delta.content or "" for choice in deltas)
        reason = deltas[-1].finish_reason
    else:
        (choice,) = client.chat.completions.create(**request).choices
        calls, content = calls_of([choice.message.to_dict()]), choice.message.content
        reason = choice.finish_reason
    assert calls == [("weather", '{"city": "Paris"}')]
    assert (content.strip(), reason) == ("Let me see.", "tool_calls")


def test_spoiled_requests_break_nothing(over_http):
    """No answer is a fault of the server, and its thread goes on."""
    engine, listening, _ = over_http
    statuses = set()
    for path, raw in bodies(seed=11, count=60):
        raw = re.sub(rb'(tokens": )[0-9]+', rb"\g<1>2", raw).replace(b"[" * 1000, b"[" * 150)
        status, _, answer = exchange(listening, "POST", path, raw)
        assert status < 500, answer
        assert status != 200 or b'"error"' not in answer
        statuses.add(status)
    assert {200, 400} <= statuses
    assert exchange(listening, "GET", "/health")[0] == 200
    assert engine.health == "ok"
    until(lambda: not engine._running)


# --- other models -------------------------------------------------------------------------------
def test_a_model_of_another_type_is_refused_by_name(tmp_path, call):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    status, _, err = call(server.main, "--model", tmp_path, "--port", "0")
    assert (status, err.count("\n")) == (2, 1)
    assert "model_type is 'qwen3'" in err and "mlx_lm.server" in err


def test_only_the_config_of_another_model_is_fetched(hub, tmp_path, call):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hub.add("Qwen/Other", tmp_path)
    status, _, err = call(server.main, "--model", "Qwen/Other", "--port", "0")
    assert status == 2 and "mlx_lm.server" in err
    assert hub.sent("model.safetensors") == 0 < hub.sent("config.json")


@contextlib.contextmanager
def command(*given, cold=False):
    """A process of the command, and its address."""
    port = free_port()
    args = "--port", str(port), *map(str, given)
    with process("-m", "mlx_qwen3next.server", *args, cold=cold) as child:
        yield child, SimpleNamespace(server_address=("127.0.0.1", port))


def get_ready(child, at):
    """Waits until the process reports that it is ready."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert child.poll() is None, child.stderr.read()
        with contextlib.suppress(OSError):
            if exchange(at, "GET", "/health")[0] == 200:
                return
        time.sleep(0.02)
    raise AssertionError("it is not ready after a minute")


def test_the_fingerprint_of_a_prompt_cache(tmp_path):
    """It depends on all options that change the values in a cache, and on no others."""

    def of(*given):
        return fingerprint_of(flags.parser().parse_args(list(map(str, given))))

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text('{"scale": 20}')
    seen = [of(), of("--kv-bits", 8), of("--kv-bits", 4), of("--adapter-path", adapter)]
    (adapter / "adapter_config.json").write_text('{"scale": 10}')
    seen.append(of("--adapter-path", adapter))
    (adapter / "adapters.safetensors").write_bytes(b"others")
    seen.append(of("--adapter-path", adapter))
    seen += [of("--rope-scaling", "yarn:4"), of("--rope-scaling", "yarn:2")]
    assert len({*seen}) == len(seen)
    assert of("--kv-group-size", 32, "--temp", 1) == of()
    assert of("--rope-scaling", "yarn:4.0") == of("--rope-scaling", "yarn:4")


@contextlib.contextmanager
def streaming(at, path, **fields):
    """The stream of an answer after its first event."""
    body = json.dumps(fields | {"stream": True}).encode()
    with socket.create_connection(at.server_address) as connection:
        head = f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        stream = connection.makefile("rb")
        while not stream.readline().startswith(b"data: "):
            pass
        yield stream


# --- processes ----------------------------------------------------------------------------------
def test_a_server_that_is_told_to_stop_answers_first_and_keeps_what_it_has_read(tmp_path):
    """After SIGTERM a streamed answer is completed, the status is 0, and the next server has the
    prompt in its cache."""
    model, cached = endless(tmp_path / "model"), tmp_path / "cached"
    given = ("--model", model, "--prompt-cache-dir", cached, "--temp", "0.5")
    messages = [user("What is a list?")]
    with command(*given, cold=True) as (child, at):
        get_ready(child, at)
        with streaming(at, CHAT, messages=messages, max_tokens=300) as stream:
            child.send_signal(signal.SIGTERM)
            until(lambda: exchange(at, "GET", "/health")[0] == 503)
            assert ask(at, max_tokens=1)[0] == 503
            rest = stream.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason": "length"' in rest
        assert child.wait(60) == 0, child.stderr.read()
    assert any(cached.rglob("*.safetensors"))
    stored = tmp_path / "stored"
    with command(*given, "--log-requests", stored) as (child, at):
        get_ready(child, at)
        _, answer = ask(at, messages=messages, max_tokens=2)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 5
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
        log = child.stderr.read().decode()
    (file,) = stored.iterdir()
    record = json.loads(file.read_text())
    assert (record["model"], len(record["tokens"])) == ("model", 2)
    assert record["system_fingerprint"] == answer["system_fingerprint"]
    assert re.search(f"--log-requests {stored}: .* no headers", log)
    assert re.search(f"127.0.0.1 POST {CHAT} HTTP/1.1 200 in .* answer 2 tokens;", log)
    assert "/health" not in log


def test_a_server_that_is_told_twice_to_stop_does_at_once(tmp_path):
    with command("--model", endless(tmp_path / "model"), "--mtp", "off") as (child, at):
        get_ready(child, at)
        with streaming(at, TEXT, prompt="import", max_tokens=8000) as stream:
            child.send_signal(signal.SIGINT)
            until(lambda: exchange(at, "GET", "/health")[0] == 503)
            child.send_signal(signal.SIGINT)
            rest = stream.read().decode()
        assert "shutting down" in rest and "[DONE]" not in rest
        assert child.wait(20) == 0, child.stderr.read()


def test_a_server_that_is_told_to_stop_while_it_loads_ends_at_once():
    slow = (
        "import sys, time\n"
        "from mlx_qwen3next.server import command\n"
        "def load(*args, **options):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(600)\n"
        "command.load = load\n"
        "sys.exit(command.main(['--port', '0']))\n"
    )
    with process("-c", slow) as child:
        assert child.stdout.readline() == b"loading\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 130
