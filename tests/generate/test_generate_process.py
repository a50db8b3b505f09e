"""The command ``python -m mlx_qwen3next.generate``, in processes of its own."""

import os
import re
import signal

import pytest
from helpers_generate import endless, process

COMMAND = ("-m", "mlx_qwen3next.generate")


def test_without_a_model_the_bundled_one_answers():
    with process(*COMMAND, "--max-tokens", "3", cold=True) as child:
        out, err = (stream.decode() for stream in child.communicate())
    assert child.returncode == 0
    assert err.startswith("No --model given: running the bundled") and err.count("\n") == 1
    assert out.startswith("=" * 10 + "\n")
    assert re.search(r"^Prompt: \d+ tokens, [\d.]+ tokens-per-sec$", out, re.M)


def test_bad_input_is_one_line_and_status_2():
    with process(*COMMAND, "--model", "/no/such/model") as child:
        out, err = (stream.decode() for stream in child.communicate())
    assert child.returncode == 2
    assert err.startswith("error: /no/such/model does not exist") and err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("args", "status"),
    [("--help", 0), ("--no-such-flag", 2), ("--mtp 9", 2), ("--image cat.png", 2)],
)
def test_help_and_typos_are_answered_without_mlx(args, status):
    with process("-X", "importtime", *COMMAND, *args.split(), cold=True) as child:
        err = child.communicate()[1].decode()
    assert child.returncode == status
    imported = set(re.findall(r"^import time:.*\| +(\w+)", err, re.M))
    assert "mlx_qwen3next" in imported
    assert not imported & {"mlx", "mlx_lm", "transformers", "huggingface_hub", "numpy"}


@pytest.fixture(scope="module")
def endless_dir(tmp_path_factory):
    return str(endless(tmp_path_factory.mktemp("model") / "endless"))


def test_a_closed_pipe_ends_it_quietly(endless_dir):
    with process(*COMMAND, "--model", endless_dir, "--max-tokens", "-1") as child:
        assert child.stdout.read(12)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 128 + signal.SIGPIPE


def test_interrupting_an_answer_prints_its_statistics(endless_dir):
    with process(*COMMAND, "--model", endless_dir, "--max-tokens", "-1") as child:
        assert child.stdout.read(12)  # the separator line and some of the answer
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == b"interrupted\n"
    generated = re.search(rb"=\nPrompt: .*\nGeneration: (\d+) tokens, .*\nPeak memory: ", out)
    assert 0 < int(generated[1]) < 8000


def test_interrupting_the_imports(tmp_path, monkeypatch):
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "mlx_lm.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with process(*COMMAND, cold=True) as child:
        assert child.stdout.readline() == b"importing\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"interrupted\n")


def test_interrupting_the_loading_of_a_model():
    slow = (
        "import sys, time\n"
        "from mlx_qwen3next import terminal\n"
        "from mlx_qwen3next.generate import main\n"
        "def load(*args, **options):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(600)\n"
        "terminal.load = load\n"
        "sys.exit(main([]))\n"
    )
    with process("-c", slow) as child:
        assert child.stdout.readline() == b"loading\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"interrupted\n")
