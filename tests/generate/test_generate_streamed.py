"""The command with experts on disk."""

from helpers_generate import BUNDLED
from helpers_streamed import gigabytes

from mlx_qwen3next.generate import main

SHORT = ("-p", "import", "-m", 4, "--ignore-chat-template", "--temp", 0)


def test_the_answer_is_the_same_and_the_lines_tell_of_the_experts(call):
    _, expected, _ = call(main, *SHORT, "--verbose", "F")
    status, out, err = call(main, *SHORT, "--experts-in-memory", gigabytes(BUNDLED, 5))
    assert status == 0 and out.split("=" * 10)[1].strip() == expected.strip()
    assert err.startswith("experts on disk: 5 of 16 a layer in memory (")
    assert out.splitlines()[-1].startswith("Experts: ") and " GB read, waited " in out


def test_too_little_memory_is_one_line(call):
    status, _, err = call(main, *SHORT, "--experts-in-memory", 1e-6)
    assert status == 2 and len(err.splitlines()) == 1 and "are too little" in err
    status, _, err = call(main, "--experts-in-memory", "some")
    assert status == 2 and "must be 'auto', 'all' or a number of GB, got 'some'" in err
