"""``/metrics``: its form, and that it counts what has happened."""

import functools
import re
import threading
import time

import pytest
from helpers_generate import bundled
from helpers_server import (
    CHAT,
    NAMES,
    TEXT,
    Fake,
    ask,
    connected,
    counted,
    everything,
    exchange,
    post,
    serving,
    until,
)
from helpers_serving import TEXTS, Asked, running, served, user

from mlx_qwen3next import generate_step
from mlx_qwen3next.server.engine.engine import Engine
from mlx_qwen3next.server.engine.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics
from mlx_qwen3next.server.http.access import Settings


# --- the form -----------------------------------------------------------------------------------
def test_every_family_is_told_once_with_its_kind():
    metrics = Metrics()
    for name, (_, labels) in COUNTERS.items():
        metrics.add(name, **dict.fromkeys(labels, "x"))
    text = metrics.text(dict.fromkeys(GAUGES, 1))
    kinds = re.findall(r"^# TYPE qwen3next_(\w+) (\w+)$", text, re.MULTILINE)
    assert kinds == [
        *((f"{name}_total", "counter") for name in COUNTERS),
        *((name, "histogram") for name in HISTOGRAMS),
        *((name, "gauge") for name in GAUGES),
    ]
    helps = re.findall(r"^# HELP qwen3next_(\w+) \S.*$", text, re.MULTILINE)
    assert helps == [name for name, _ in kinds]
    sample = r'(qwen3next_\w+)(?:\{\w+="[^"\\]*"(?:,\w+="[^"\\]*")*\})? [\d.e+-]+'
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(sample, line) for line in lines) and text.endswith("\n")


def test_the_counters_without_labels_begin_at_nothing():
    text = Metrics().text({})
    assert "\nqwen3next_generation_tokens_total 0\n" in text
    assert "qwen3next_requests_total{" not in text


def test_buckets_hold_the_values_up_to_their_bounds():
    metrics = Metrics()
    for value in (0.05, 0.1, 0.2, 1, 999):
        metrics.observe("time_to_first_token_seconds", value)
    found = re.findall(r'token_seconds_bucket\{le="(.*?)"\} (\d+)', metrics.text({}))
    buckets = {bound: int(count) for bound, count in found}
    assert [buckets[bound] for bound in ("0.1", "0.25", "0.5", "1", "250", "+Inf")] == [
        *(2, 3, 3, 4, 4, 5)
    ]
    assert "token_seconds_sum 1000.35\n" in metrics.text({})
    assert "token_seconds_count 5\n" in metrics.text({})


def test_names_that_are_not_declared_are_refused():
    for tell in (Metrics().add, Metrics().observe):
        with pytest.raises(KeyError):
            tell("nothing", 1)


def test_no_count_of_a_thread_is_lost():
    class Yielding(str):
        """A label that lets other threads run between the reading and the writing of its count."""

        def __hash__(self):
            time.sleep(0)
            return super().__hash__()

    metrics, label = Metrics(), Yielding("x")
    tell = functools.partial(metrics.add, "draft_tokens", 2, source=label)
    threads = [threading.Thread(target=lambda: [tell() for _ in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 'draft_tokens_total{source="x"} 2400\n' in metrics.text({})


# --- over HTTP ----------------------------------------------------------------------------------
def test_requests_are_counted_by_path_and_status():
    with serving(Fake("Hello there.")) as server:
        ask(server)
        ask(server, stream_options=5)
        for path in ("/nowhere", "/v1/models/x", "/v1/models/demo?y", "/health"):
            exchange(server, "GET", path)
        with connected(server, b"nonsense\r\n\r\n") as connection:
            everything(connection)
        with connected(server):  # which asks for nothing
            pass
        assert server.wait(10)
        counts = counted(server)
    assert {name: n for name, n in counts.items() if name.startswith("requests_total")} == {
        f'requests_total{{path="{path}",status="{status}"}}': 1
        for path, status in [
            *((CHAT, 200), (CHAT, 400), ("other", 404), ("/v1/models/", 404)),
            *(("/v1/models/", 200), ("/health", 200), ("other", 400)),
        ]
    }
    assert counts["time_to_first_token_seconds_count"] == counts["tokens_per_second_count"] == 1
    assert counts["tokens_per_second_sum"] > 0 < counts["time_to_first_token_seconds_sum"]


def test_a_stream_that_fails_and_a_client_that_goes_have_their_own_status():
    hold = threading.Event()
    generator = Fake("Hello there, you.", fail=RuntimeError("broken"), at=2)
    with serving(generator) as server:
        with connected(server, post(stream=True)) as connection:
            assert b"broken" in everything(connection)
        generator.fail, generator.hold = None, hold
        with connected(server, post(stream=True)) as connection:
            connection.recv(1)
        hold.set()
        assert server.wait(10)
        counts = counted(server)
    for status in (500, 499):
        assert counts[f'requests_total{{path="{CHAT}",status="{status}"}}'] == 1


def test_metrics_need_the_key():
    with serving(settings=Settings(names=NAMES, api_key="key")) as server:
        assert exchange(server, "GET", "/metrics")[0] == 401
        headers = {"Authorization": "Bearer key"}
        assert exchange(server, "GET", "/metrics", headers=headers)[0] == 200


# --- of the engine --------------------------------------------------------------------------------
def test_tokens_and_the_prompt_cache_are_counted():
    with running() as engine, served(engine) as server:
        answers = [ask(server, messages=[user("Hello")], max_tokens=n)[1] for n in (5, 7)]
        cache = engine._checkpoints
        until(lambda: counted(server)["prompt_cache_bytes"] == cache.nbytes)  # kept after the end
        counts = counted(server)
        usages = [answer["usage"] for answer in answers]
        known = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        assert known[0] == 0 < known[1]
        names = {"prompt_tokens": "prompt_tokens", "generation_tokens": "completion_tokens"}
        for name, field in names.items():
            assert counts[f"{name}_total"] == sum(usage[field] for usage in usages)
        assert counts["prompt_tokens_cached_total"] == known[1]
        assert counts["prompt_cache_lookups_total"] == 2
        assert counts["prompt_cache_hits_total"] == 1
        assert counts["prompt_cache_bytes"] > 0
        assert counts["prompt_cache_checkpoints"] == len(cache) > 0
        assert counts["memory_peak_bytes"] >= counts["memory_active_bytes"] > 2**20


@pytest.mark.parametrize("options", [{"mtp": 2}, {"mtp": "off", "lookup": 3}])
def test_drafts_are_counted_by_their_source(options):
    """As many as there are, in an answer that ends within a round, too."""
    prompt = "x = [1, 2, 3]\ny = [1, 2, 3]\n"
    flags = ("--lookup", options["lookup"]) if "lookup" in options else ()
    model, tokenizer = bundled()
    for n in (12, 13):
        tokens = [*generate_step(tokenizer.encode(prompt), model, max_tokens=n, **options)]
        (source,) = {token.source for token in tokens if token.source is not None}
        within = [False, *(token.from_draft for token in tokens)]
        rounds = [t for t, goes_on in zip(tokens, within, strict=False) if t.source and not goes_on]
        with running(*flags, load=bundled, mtp=options["mtp"]) as engine, served(engine) as server:
            answer = ask(server, path=TEXT, prompt=prompt, max_tokens=n, temperature=0)[1]
            assert answer["usage"]["completion_tokens"] == len(tokens)
            counts = counted(server)
        by_source = f'_total{{source="{source}"}}'
        assert counts[f"draft_rounds{by_source}"] == len(rounds) > 0
        assert counts[f"draft_tokens{by_source}"] == sum(token.drafted for token in rounds)
        accepted = sum(token.from_draft for token in tokens)
        assert counts[f"draft_tokens_accepted{by_source}"] == accepted > 0


def test_running_and_waiting_requests():
    hold = threading.Event()

    class Held(Engine):
        def _step(self):
            hold.wait(10)
            super()._step()

    with running("--decode-concurrency", 1, engine=Held) as engine, served(engine) as server:
        asked = [Asked(engine, TEXTS[0])]
        until(lambda: counted(server)["requests_running"] == 1)
        asked += [Asked(engine, text) for text in TEXTS[1:3]]  # the thread has not seen them yet
        assert counted(server)["requests_waiting"] == 2
        hold.set()
        for answer in asked:
            answer.read()
        until(lambda: counted(server)["requests_running"] == 0)
        assert counted(server)["requests_waiting"] == 0


def test_while_the_model_is_loaded_there_are_metrics_too():
    hold = threading.Event()

    def load():
        hold.wait(10)
        return bundled()

    with running(load=load) as engine, served(engine) as server:
        counts = counted(server)
        hold.set()
    assert counts["requests_running"] == 0 and "prompt_cache_bytes" not in counts
