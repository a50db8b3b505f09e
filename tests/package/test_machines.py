"""The example that computes what a model takes on several machines, beside figures made by hand."""

import sys

import forked
import machines
import pytest
from checkpoints import GOLDENS
from machines import divide, messages_a_step, own, seconds, sent_a_step

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.sharding import Shard

BASE = Config.from_file(GOLDENS / "base" / "config.json")
DEMO = Config.from_file(BUNDLED / "config.json")
FULL = Config.from_dict(shapes.config("80b", shapes.FULL))


@pytest.mark.parametrize(
    "config, size, mode, measured",
    [
        (DEMO, 2, "tensor", [17408] * 2),
        (DEMO, 2, "expert", [17408] * 2),
        (BASE, 4, "tensor", [3744] * 4),
        (DEMO, 2, "pipeline", [2048, 1024]),
        (DEMO, 1, "tensor", [0]),
        (DEMO, 1, "pipeline", [0]),
    ],
)
def test_bytes_sent_are_those_measured(config, size, mode, measured):
    """Counted by the kernel, of real processes (tests/rank.py), in float32."""
    assert sent_a_step(config, size, mode, itemsize=4) == measured
    assert sent_a_step(config, size, mode, itemsize=2, rows=2) == measured


def test_messages_in_a_row():
    sums = 1 + 2 * 4
    assert messages_a_step(BASE, 1, "tensor") == messages_a_step(BASE, 1, "pipeline") == 0
    assert messages_a_step(BASE, 4, "tensor") == messages_a_step(BASE, 4, "expert") == sums * 6 + 3
    assert messages_a_step(BASE, 4, "pipeline") == 3 + 6


def test_two_machines_by_hand():
    tensors = shapes.headers("80b", shapes.FULL)
    whole, two = (divide(FULL, tensors, size, "tensor", 1024) for size in (1, 2))
    cache = capacity.cache_bytes(FULL, 1024, mtp=True, itemsize=2)
    assert whole.held == [sum(t.nbytes for t in tensors.values()) + cache]
    assert seconds(whole, 800e9, 1, 1) == pytest.approx(whole.read / 800e9)
    mine = own(tensors, Shard(FULL, 1, 2))
    assert two.held[1] == sum(t.nbytes for t in mine.values()) + cache // 2
    sent = (1 + 2 * 48) * 2048 * 2 + 151936 // 2 * 2 + 4  # sums in two send as many bytes
    assert two.sent == [sent] * 2 and two.messages == 97 * 2 + 1 + 2
    time = two.read / 800e9 + sent / 5e9 + two.messages * 50e-6
    assert seconds(two, 800e9, 5e9, 50e-6) == pytest.approx(time)
    assert whole.read / 2 < two.read < whole.read * 0.6


def test_a_pipeline_reads_one_after_the_other():
    tensors = shapes.headers("80b", shapes.FULL)
    piped = divide(FULL, tensors, 4, "pipeline", 1024)
    assert piped.read == divide(FULL, tensors, 1, "tensor", 1024).read
    hidden = 2048 * 2
    wire = 3 * hidden + 1.5 * hidden + 6  # three sends, one sum of hidden states, one of a token
    assert seconds(piped, 1e30, 1e9, 0) == pytest.approx(wire / 1e9)


def test_the_command():
    command = [sys.executable, machines.__file__, "--context", "1024"]
    lines = forked.run(command).stdout.splitlines()
    assert "computed, not measured" in lines[0]
    assert [line.split()[:2] for line in lines[2:]] == [
        [str(size), mode] for size in (1, 2, 4, 8) for mode in ("tensor", "pipeline")
    ][:1] + [[str(size), mode] for size in (2, 4, 8) for mode in ("tensor", "pipeline")]
