"""The host's time for a step, with few layers."""

import re

import pytest

from mlx_qwen3next.bench.tables.host import host_table
from mlx_qwen3next.model.packed import tracing

PARTS = ["embedding", "layers", "norm and logits", "choice", "plain step"]
ROUND = ["drafts", "verification", "logits and choice", "bookkeeping", "round of three drafts"]


def read(table):
    """The milliseconds of each row, and the number in the last line."""
    first, *rows, last = table.splitlines()
    assert "4 layers" in first
    return dict(re.findall(r"^  (\S.*?)  +([\d.]+)", "\n".join(rows), re.M)), int(last.split()[-1])


def test_parts_add_up_and_no_text_is_written_anew():
    rows, anew = read(host_table(repeats=2, layers=4))
    assert list(rows) == PARTS + ROUND
    for *parts, total in (PARTS, ROUND):
        assert sum(float(rows[part]) for part in parts) == pytest.approx(
            float(rows[total]), abs=0.01
        )
    assert anew == 0


def test_without_traces_each_kernel_is_written_anew(monkeypatch):
    monkeypatch.setattr(tracing, "MOST_ROWS", 0)
    _, anew = read(host_table(repeats=1, layers=4))
    # A linear layer: two norms, delta, router, two of experts; attention has heads and gate.
    assert anew == 3 * 6 + 7 + 1  # and the norm after the last layer
