"""Helpers of the tests of conversion."""

import pytest

from mlx_qwen3next.convert import convert


def state(folder):
    """Everything below a folder: path -> bytes."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in paths}


@pytest.fixture
def refusal(tmp_path):
    """Converts to `out` in vain and returns the message; all that was there is as it was, and
    nothing is new except, where the work had `begun`, what it goes on from."""

    def refusal(source, begun=False, **arguments):
        before = state(tmp_path)
        with pytest.raises(ValueError) as caught:
            convert(str(source), **{"mlx_path": str(tmp_path / "out")} | arguments)
        after = state(tmp_path)
        new = {after.pop(path) and path.split("/")[0] for path in after.keys() - before.keys()}
        assert after == before
        assert new - {False} == ({"out.partial"} if begun else set())
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refusal


def options(value):
    """A test's id of arguments; functions among them would have an address in theirs."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k}={'…' if callable(v) else v}" for k, v in value.items())
