"""``python -m mlx_qwen3next.generate`` prepares before it answers, and says so in one line."""

import json
import re
import tempfile

import pytest
from helpers_metal import by_host, new_process

from mlx_qwen3next.compute import proof
from mlx_qwen3next.generate import main

DEMO = "No --model given: running the bundled demo model, which knows a little Python.\n"


@pytest.fixture
def run(call):
    return lambda *args: call(main, *args, "-m", 3, "--prefill-step-size", 64)


def test_kernels_are_proved_before_the_answer_and_once(run, proved):
    status, out, err = run()
    assert (status, out.count("=" * 10)) == (0, 2)
    count = len(proved)
    line = rf"kernels: {count} proved in [\d.]+ s, {count} not used \([^\n]*\)\n"
    assert re.fullmatch(re.escape(DEMO) + line, err)
    new_process()
    assert run()[::2] == (0, DEMO)
    assert len(proved) == count > 50


def test_flags_tell_what_there_is_to_prove(run, proved):
    run("--mtp", "off")
    kinds = proof.findings().keys()
    assert not any(" round" in key for key in kinds)
    assert not any("rows=65-128" in key for key in kinds)
    before = len(proved)
    for mode in ("off", "auto"):
        assert run("--kernels", mode)[0] == 0
        assert (len(proved) > before) == (mode == "auto")


def test_ctrl_c_keeps_the_findings(run, machine, monkeypatch):
    found = []

    def prove(operation, *_):
        if len(found) == 3:
            raise KeyboardInterrupt
        found.append(operation.name)
        return proof.Finding(False, "", 2.0, 1.0)

    monkeypatch.setattr(proof, "_prove", prove)
    assert run() == (130, "", f"{DEMO}interrupted\n")
    assert [key.split()[0] for key in json.loads(machine.read_text())["findings"]] == found


@by_host
def test_the_first_run_on_a_cpu_says_what_it_builds(run, tmp_path, monkeypatch):
    assert run()[::2] == (0, DEMO)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    line = "building MLX's CPU kernels for this machine, once\n"
    assert run()[::2] == (0, DEMO + line)
