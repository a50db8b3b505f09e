"""The server prepares when it starts, so that a request that is alone has nothing to wait for."""

import logging
import re

import pytest
from helpers_server import until
from helpers_serving import Asked, running

from mlx_qwen3next.compute import proof
from mlx_qwen3next.group import ALONE
from mlx_qwen3next.server.command import _load
from mlx_qwen3next.server.flags import parser

FLAGS = ("--prefill-step-size", "128")


@pytest.mark.parametrize("mtp", ["off", "auto", "3"])
def test_kernels_are_proved_at_the_start(proved, caplog, mtp):
    caplog.set_level(logging.INFO)
    args = parser().parse_args([*FLAGS, "--mtp", mtp])
    depth = int(mtp) if mtp.isdigit() else mtp
    with running(*FLAGS, load=lambda: _load(args, ALONE, {}), mtp=depth) as engine:
        until(lambda: engine.health == "ok")
        before = len(proved)
        (line,) = [m for m in caplog.messages if m.startswith("kernels: ")]
        assert re.match(rf"kernels: {before} proved in [\d.]+ s, {before} not used \(", line)
        kinds = proof.findings()
        assert any(" round" in key for key in kinds) == (mtp != "off")
        assert not any("rows=257" in key for key in kinds)
        for prompt in ("import os\n", "def merge(left, right):\n" * 20):
            Asked(engine, prompt, max_tokens=12).read()
        assert len(proved) == before
