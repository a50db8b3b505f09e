"""Fixtures of the command ``generate``."""

from functools import partial

import pytest
from helpers_generate import endless

from mlx_qwen3next.generate import main


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small model without stop tokens and with a context of 64."""
    return str(endless(tmp_path_factory.mktemp("model") / "short", max_position_embeddings=64))


@pytest.fixture
def run(call):
    return partial(call, main)


@pytest.fixture
def answer(run):
    """Runs main() with --verbose F, checks that it prints only the answer, and returns that."""

    def answer(*args):
        status, out, err = run(*args, "--verbose", "F")
        assert (status, err) == (0, "")
        assert out.endswith("\n")
        return out[:-1]

    return answer
