"""The server with experts on disk: the same answers, one at a time or together; a fault ends one
request."""

import re

import pytest
from helpers_generate import bundled
from helpers_serving import TEXTS, Asked, ask, expected_text, running
from helpers_streamed import streamed

from mlx_qwen3next.server.engine.batching import most_together
from mlx_qwen3next.storage.reading import Reader


@pytest.fixture(scope="module")
def load():
    model = streamed(5)
    return lambda: (model, bundled()[1])


def test_answers_together_are_those_of_the_model_in_memory(load):
    want = [expected_text(text, 8, load=bundled) for text in TEXTS[:3]]
    with running("--decode-concurrency", 4, load=load) as engine:
        asked = [Asked(engine, text, max_tokens=8) for text in TEXTS[:3]]
        assert [answer.read().text for answer in asked] == want
        told = engine.metrics.text({})
        for name in ("hits", "misses", "bytes", "waited"):
            (count,) = re.findall(rf"^qwen3next_experts_{name}_total (\S+)$", told, re.M)
            assert float(count) > 0
        again = ask(engine, TEXTS[0], max_tokens=8)  # from the prompt cache
        assert again.text == want[0] and again.cached > 0


def test_a_fault_ends_the_request_and_the_next_one_is_answered(load, monkeypatch):
    def failing(reader, run):
        raise OSError(f"{run[0].file} cannot be read: no luck")

    with running(load=load) as engine:
        monkeypatch.setattr(Reader, "read", failing)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"model\.safetensors cannot be read: no luck"):
                ask(engine, TEXTS[1], max_tokens=8)
        monkeypatch.undo()
        assert ask(engine, TEXTS[1], max_tokens=8).text == expected_text(TEXTS[1], 8, load=bundled)


@pytest.mark.parametrize(("asked", "together"), [(None, 1), (32, 32)])
def test_one_request_is_answered_at_a_time_unless_more_are_asked_for(asked, together, load):
    assert most_together(asked, bundled()[0]) == 32
    with running(*([] if asked is None else ["--decode-concurrency", asked]), load=load) as engine:
        ask(engine, TEXTS[0], max_tokens=1)
        assert engine._max_running == together
