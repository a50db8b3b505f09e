"""``generate`` while it reads a prompt: its bar on a terminal, and what Ctrl-C leaves."""

import io
import re
from functools import partial

import pytest
from helpers_generate import bundled

from mlx_qwen3next import terminal
from mlx_qwen3next.generate import main

PROMPT = "import os\n" * 80


@pytest.fixture
def run(call):
    return partial(call, main, "--ignore-chat-template", "-p", PROMPT, "-m", 4)


@pytest.fixture
def bar(monkeypatch):
    """What the bar writes, at each call; a second passes between two of them."""
    stream, made, seconds = io.StringIO(), terminal.tqdm, iter(range(1000))
    stream.isatty = lambda: True

    def started(*args, **options):
        result = made(*args, file=stream, mininterval=0, ncols=100, **options)
        result._time = lambda: float(next(seconds))
        result.start_t = result.last_print_t = result._time()
        return result

    monkeypatch.setattr(terminal, "tqdm", started)
    return stream


@pytest.mark.parametrize("known", [0, 5000])
def test_the_bar_shows_rate_and_time_left(bar, known):
    """What the prompt cache knew does not count as read."""
    progress = terminal._PromptProgress()
    for processed in range(known, known + 4001, 1000):
        progress(processed, 20_000)
    shown = bar.getvalue().split("\r")[-1]
    assert f"{known + 4000}/20000" in shown
    seconds, rate = re.search(r"<(\d\d:\d\d), +([\d.]+)token/s\]", shown).groups()
    per_call = 1000 / float(rate)  # a fraction of the calls of the clock between
    assert 1 <= per_call <= 4
    left = int(seconds[:2]) * 60 + int(seconds[3:])
    assert left == int((16_000 - known) / float(rate))
    progress(20_000, 20_000)
    assert bar.getvalue().split("\r")[-2].strip() == ""  # it is cleared


@pytest.mark.parametrize("total, at_once", [(9000, False), (20_000, True)])
def test_a_long_prompt_has_its_bar_at_once(bar, total, at_once):
    progress = terminal._PromptProgress()
    progress(1000, total)
    assert (f"1000/{total}" in bar.getvalue()) == at_once
    progress.close()


def test_an_interrupted_prompt_is_gone_on_with(run, monkeypatch, tmp_path):
    file = tmp_path / "chat.safetensors"
    run = partial(run, "--prefill-step-size", 64)
    expected = run()[1].partition("\nPrompt: ")[0]

    def interrupt(self, processed, total):
        if processed >= 192:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(terminal._PromptProgress, "__call__", interrupt)
        status, out, err = run("--prompt-cache-file", file)
    assert (status, "No text generated" in out) == (130, True)
    assert err.endswith("\ninterrupted\n")
    text, _, after = run("--prompt-cache-file", file)[1].partition("\nPrompt: ")
    assert text == expected
    count = len(bundled()[1].encode(PROMPT))
    assert after.startswith(f"{count} tokens (192 of them cached), ")
