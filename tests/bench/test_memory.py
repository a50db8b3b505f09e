"""``bench --experts-in-memory``: the speed by the memory for experts, as a table."""

from helpers_generate import BUNDLED
from helpers_streamed import gigabytes

from mlx_qwen3next.bench.command import main

SHORT = ("--contexts", 8, "--tokens", 2)


def test_a_row_for_each_amount_of_memory(call):
    amounts = f"{gigabytes(BUNDLED, 9)},{gigabytes(BUNDLED, 5)}"
    status, out, err = call(main, "--experts-in-memory", amounts, *SHORT)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[-3:-1]]
    assert [row[1:4] for row in rows] == [["5", "of", "16"], ["9", "of", "16"]]
    assert "on their way" in out
    for row in rows:
        *_, read, disk, speed, expected = map(float, row[7:])
        assert read >= 0 and min(disk, speed, expected) > 0


def test_memory_for_all_experts_is_refused(call):
    status, _, err = call(main, "--experts-in-memory", 2, *SHORT)
    assert (
        status == 2
        and err == "error: --experts-in-memory 2: all experts fit, nothing is read from disk\n"
    )
    assert call(main, "--experts-in-memory", "2,x")[0] == 2
