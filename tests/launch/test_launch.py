"""The command that runs agents: their configurations, a server that runs or is started, and the
user's files, which stay as they are."""

import json
import os
import socket
import subprocess
import sys
import threading
import tomllib

import pytest
from helpers_server import Fake, serving

from mlx_qwen3next.launch import running
from mlx_qwen3next.launch.__main__ import main, parser, server_flags
from mlx_qwen3next.launch.agents import AGENTS, Place
from mlx_qwen3next.server.flags import parser as server_parser
from mlx_qwen3next.server.http.handler import Settings

PLACE = Place("http://127.0.0.1:1234", "a key", "coder", 100_000)
AGENT = """#!{python}
import json, os, sys
files = [argument for argument in sys.argv[1:] if os.path.isfile(argument)]
files += [path for path in [os.environ.get("QWEN_CODE_SYSTEM_SETTINGS_PATH")] if path]
told = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "files": files}}
told["texts"] = [open(file).read() for file in files]
open({out!r}, "w").write(json.dumps(told))
sys.exit(7)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home, and no agents but those that a test makes."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return home


@pytest.fixture
def installed(tmp_path):
    """Installs an agent that notes how it was started; returns the file with its note."""

    def install(name):
        program, out = tmp_path / "bin" / AGENTS[name].program, tmp_path / "started.json"
        program.parent.mkdir(exist_ok=True)
        program.write_text(AGENT.format(python=sys.executable, out=str(out)))
        program.chmod(0o755)
        return out

    return install


@pytest.fixture
def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", AGENTS)
def test_a_configuration_names_the_server_and_the_model(name):
    texts = AGENTS[name].files(PLACE)
    for path, text in texts.items():
        tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    told = "".join(texts.values())
    assert "http://127.0.0.1:1234" in told and "a key" in told
    assert "100000" in told and "coder" in told
    limit = {"claude": '"25000"', "opencode": "25000", "aider": "25000"}.get(name, "")
    assert limit in told  # an answer leaves room for the prompt


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_is_started_with_a_temporary_configuration(
    name, home, installed, monkeypatch, call
):
    out = installed(name)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the user's")
    with serving(Fake(), Settings(names=("demo",), api_key="secret")) as server:
        port = server.server_address[1]
        flags = ["--port", port, "--api-key", "secret", "--", "-p", "What? --model x"]
        status, printed, logged = call(main, name, *flags)
    assert (status, printed) == (7, "")
    assert "demo" in logged and "4096 tokens is too short" in logged
    told = json.loads(out.read_text())
    assert told["arguments"][-2:] == ["-p", "What? --model x"]
    known = json.dumps([told["arguments"], told["environment"], told["texts"]])
    assert f"http://127.0.0.1:{port}" in known and "secret" in known
    assert ("ANTHROPIC_API_KEY" in told["environment"]) == (name != "claude")
    assert not any(os.path.exists(file) for file in told["files"])
    assert files_below(home) == []


def test_codex_reads_its_arguments_as_toml(home, installed, call):
    out = installed("codex")
    with serving() as server:
        call(main, "codex", "--port", server.server_address[1])
    arguments = json.loads(out.read_text())["arguments"]
    assert arguments[::2] == ["-c"] * (len(arguments) // 2)
    content = tomllib.loads("\n".join(arguments[1::2]))
    assert (content["model"], content["model_context_window"]) == ("demo", 4096)
    provider = content["model_providers"][content["model_provider"]]
    assert provider["wire_api"] == "responses"


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_that_is_missing(name, home, call):
    status, printed, logged = call(main, name)
    assert (status, printed) == (2, "")
    assert logged == (f"error: {name} is not installed; install it with: {AGENTS[name].install}\n")


def test_printing_starts_nothing(home, free_port, call):
    for name in AGENTS:
        status, printed, _ = call(main, name, "--print", "--port", free_port, "--model", "a/Coder")
        assert status == 0
        assert all(f"# ~/{path}\n" in printed for path in AGENTS[name].files(PLACE))
        assert "a/Coder" in printed and "262144" in printed
    assert files_below(home) == []


def test_writing_adds_to_what_is_there(home, free_port, call):
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    before = '{"theme": "dark", "env": {"A": "b", "ANTHROPIC_MODEL": "opus"}}'
    path.write_text(before)
    for _ in range(2):
        assert call(main, "claude", "--write", "--port", free_port)[0] == 0
    content = json.loads(path.read_text())
    assert (content["theme"], content["env"]["A"]) == ("dark", "b")
    assert content["env"]["ANTHROPIC_MODEL"] == "qwen3-next-demo"
    assert path.with_name("settings.json.before").read_text() == before
    assert call(main, "qwen", "--write", "--port", free_port)[0] == 0
    assert json.loads((home / ".qwen/settings.json").read_text())["model"]["name"]


@pytest.mark.parametrize(
    ("name", "path", "text"),
    [
        ("codex", ".codex/config.toml", 'model = "gpt-5"\n'),
        ("claude", ".claude/settings.json", '{"env": {}, // mine\n}'),
        ("aider", ".aider.conf.yml", "model: x\n"),
    ],
)
def test_a_file_that_cannot_be_added_to_stays(name, path, text, home, free_port, call):
    (home / path).parent.mkdir(exist_ok=True)
    (home / path).write_text(text)
    status, _, logged = call(main, name, "--write", "--port", free_port)
    assert (status, "--print" in logged) == (2, True)
    assert files_below(home) == [home / path]
    assert (home / path).read_text() == text


def test_something_else_at_the_port(home, installed, call):
    out = installed("claude")
    with serving(Fake(health="draining")) as server:
        status, _, logged = call(main, "claude", "--port", server.server_address[1])
        assert (status, "cannot answer: draining" in logged) == (2, True)
    with serving(settings=Settings(names=("demo",), api_key="secret")) as server:
        status, _, logged = call(main, "claude", "--port", server.server_address[1])
        assert (status, "--api-key" in logged) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            with listening.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        status, _, logged = call(main, "claude", "--port", listening.getsockname()[1])
        thread.join()
        assert (status, "something else" in logged) == (2, True)
    assert not out.exists()


def test_a_server_is_started_and_ends_with_the_agent(home, installed, free_port, call):
    out = installed("opencode")
    status, _, logged = call(main, "opencode", "--port", free_port)
    assert status == 7, logged
    content = json.loads(json.loads(out.read_text())["environment"]["OPENCODE_CONFIG_CONTENT"])
    assert content["model"] == "mlx_qwen3next/qwen3-next-demo"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", free_port))


def test_a_server_that_is_ending_is_waited_for(monkeypatch):
    monkeypatch.setattr(running, "_STOP", 0.2)
    with serving(Fake(health="unavailable")) as server:
        url = "http://{}:{}".format(*server.server_address[:2])
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        with process, pytest.raises(ValueError, match="cannot answer: unavailable"):
            running._place_of_own(process, url, "none")
        assert running._place_of_own(process, url, "none") is None


def test_a_server_that_cannot_load_says_why(forks, base, home, installed, free_port, call):
    """It listens already when it finds that weights are missing."""
    (base / "model.safetensors").unlink()
    out = installed("claude")
    status, _, logged = call(main, "claude", "--port", free_port, "--model", base)
    *_, last = logged.splitlines()
    assert status == 2 and last.startswith("error: the server has ended: ")
    assert str(base) in last and not out.exists()


def test_the_flags_of_a_server_that_is_started():
    model = "org/Qwen3-Coder-Next-4bit"
    flags = server_flags(parser().parse_args(["claude", "--model", model]))
    args = server_parser().parse_args(flags)
    assert args.temp is None  # the checkpoint's recommendation
    assert (args.model, args.port) == (model, 8080)
