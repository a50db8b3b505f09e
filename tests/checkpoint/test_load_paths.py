"""Where a model is looked for: directories and the hub's repositories; what is said of neither."""

import fnmatch
import os
import shutil
import subprocess
import sys

import forked
import mlx.core as mx
import pytest
from checkpoints import GOLDENS, INDEX

from mlx_qwen3next import load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED, resolve


def refusal(name):
    """The message a path or repository id is refused with."""
    with pytest.raises(ValueError) as caught:
        load_model(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_is_no_directory(base):
    file = base / "model.safetensors"
    assert refusal(file).startswith(f"{file} cannot be read: ")
    assert "Not a directory" in refusal(file)


@pytest.mark.parametrize(
    "name",
    [
        "/no-such",
        "/no/such/model",
        "./no/such",
        "../no-such",
        "~/no-such",
        "no-such-directory",
        "a/b/c",
    ],
)
def test_no_such_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == f"{name} does not exist, and is no repository id (owner/name)"


@pytest.mark.parametrize("name", ["owner/two words", "owner/a--b", "owner/.git", "owner/"])
def test_no_repository_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert message.startswith(f"{name} is neither a directory nor a repository id: ")


@pytest.mark.parametrize(
    "name", ["~no-such-user/model", "x" * 5000, "nul\0/byte"], ids=["user", "long", "NUL"]
)
def test_name_no_system_can_read(name):
    assert refusal(name).startswith(f"{name} cannot be read: ")


def test_directory_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", str(tmp_path)):
        assert refusal(name) == f"{name or '.'} is no model directory: it has no config.json"


def test_directories_of_every_spelling(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("HOME", str(base.parent))
    for name in ("base", "./base", "../" + base.parent.name + "/base", "~/base", base, str(base)):
        assert resolve(name).samefile(base)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub's client: raises or returns `answer`, and keeps what it was asked."""

    class Hub:
        def __call__(self, *arguments, **keywords):
            self.asked = arguments, keywords
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    hub = Hub()
    monkeypatch.setattr(sys.modules["mlx_qwen3next.checkpoint.hub"], "snapshot_download", hub)
    return hub


def test_repository(hub):
    hub.answer = GOLDENS / "base"
    model = load_model("owner/model", revision="v2", dtype=mx.float32)
    assert model.args.hidden_size == 64
    (repo,), arguments = hub.asked
    assert (repo, arguments["revision"]) == ("owner/model", "v2")
    wanted = [file.name for file in BUNDLED.iterdir() if file.suffix in (".json", ".safetensors")]
    wanted += [INDEX, "merges.txt", "vocab.json", "chat_template.jinja", "model-1.safetensors"]
    patterns = arguments["allow_patterns"]
    assert not [name for name in wanted if not any(fnmatch.fnmatch(name, p) for p in patterns)]
    assert not any(fnmatch.fnmatch("pytorch_model.bin", p) for p in patterns)


def test_local_directory_before_a_repository(base, hub, monkeypatch):
    monkeypatch.chdir(base.parent.parent)
    hub.answer = AssertionError("asked the hub")
    name = f"{base.parent.name}/base"
    assert resolve(name).samefile(base)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("401 Client Error.\n\nRepository Not Found\n"), "401 Client Error."),
        (RuntimeError("the connection broke"), "the connection broke"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=["two lines", "one line", "none"],
)
def test_repository_that_cannot_be_fetched(hub, error, reason):
    hub.answer = error
    assert refusal("owner/model") == (
        f"owner/model is no local directory and cannot be fetched: {reason}"
    )


def test_offline_hub_in_one_line(tmp_path):
    command = [sys.executable, "-m", "mlx_qwen3next.generate", "--model", "owner/model", "-p", "hi"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: owner/model is no local directory and cannot be fetched: ")


AS_SOMEBODY_ELSE = """
import os, sys
from mlx_qwen3next import load_model
os.chdir(sys.argv[1])
if os.getuid() == 0:  # who may read everything
    try:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    except OSError:
        sys.exit("no other user")
for name in ("config", "index", "shard", "directory"):
    try:
        load_model(name)
    except ValueError as error:
        print(error)
"""


def test_no_permission(base):
    parent = base.parent / "others"
    for name in ("config", "index", "shard", "directory"):
        shutil.copytree(base, parent / name)
    (parent / "index" / INDEX).write_text("{}")
    parent.chmod(0o755)
    unreadable = ["config/config.json", f"index/{INDEX}", "shard/model.safetensors", "directory"]
    for path in unreadable:
        (parent / path).chmod(0)
    result = forked.run([sys.executable, "-c", AS_SOMEBODY_ELSE, str(parent)])
    (parent / "directory").chmod(0o755)
    if result.stderr == "no other user\n":
        pytest.skip("this system's root may read everything and become nobody else")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"{path} cannot be read: Permission denied" for path in unreadable[:3]]
    assert lines[3].startswith("directory cannot be read: ") and "Permission denied" in lines[3]
