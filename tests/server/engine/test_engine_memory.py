"""Free memory is given back, so that a server under long prompts does not grow."""

from helpers_server import until
from helpers_serving import ENDLESS, TEXTS, Asked, ask, running

from mlx_qwen3next.server.engine import memory


def test_free_memory_is_given_back_whenever_a_request_has_ended(monkeypatch):
    """By its length, or because the client has gone; not while requests run."""
    given_back = []
    monkeypatch.setattr(memory, "return_free_memory", lambda: given_back.append(True))
    with running() as engine:
        other = Asked(engine, TEXTS[0], max_tokens=8000, logit_bias=ENDLESS).read(9)
        assert given_back == []
        ask(engine, TEXTS[1], max_tokens=2)
        until(lambda: given_back)
        other.read(9)
        assert len(given_back) == 1
        other.leave()
        until(lambda: len(given_back) == 2)
