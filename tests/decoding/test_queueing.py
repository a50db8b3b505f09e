"""What is queued at a time, and the cache of freed buffers, as on a GPU."""

import ctypes
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers_generate import BUNDLED, bundled

from mlx_qwen3next import terminal
from mlx_qwen3next.bench.comparison import worker
from mlx_qwen3next.decoding import queueing, speculative
from mlx_qwen3next.generate import main
from mlx_qwen3next.group import ALONE
from mlx_qwen3next.model import capacity
from mlx_qwen3next.server import command
from mlx_qwen3next.server.__main__ import main as serve
from mlx_qwen3next.server.flags import parser

GB = 10**9


@pytest.fixture
def on_gpu(monkeypatch):
    """Has MLX's default device be a GPU; returns the limits that its cache was given."""
    limits = []
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    return limits


@pytest.mark.parametrize(
    ("spare", "limit"),
    [(0, 2**28), (4 * 10**8, 2**28), (8 * GB, 2 * GB), (300 * GB, 2**32)],
)
def test_the_cache_may_have_a_quarter_of_what_is_left(on_gpu, monkeypatch, spare, limit):
    monkeypatch.setattr(capacity, "spare", lambda: spare)
    assert queueing.limit_cache() == limit
    assert on_gpu == [limit]


def test_on_a_cpu_the_cache_is_left_alone(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(mx, "set_cache_limit", None)
    assert queueing.limit_cache() is None


class Library(SimpleNamespace):
    """A C library that records the calls of its functions."""

    def __init__(self, *functions):
        super().__init__(calls=[])
        for name in functions:
            setattr(self, name, lambda *args, name=name: self.calls.append((name, *args)))


@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
@pytest.mark.parametrize("functions", [(), ("mallopt", "malloc_trim")], ids=["other", "glibc"])
def test_free_memory_of_glibc_is_returned_on_a_cpu(monkeypatch, device, functions):
    library = Library(*functions)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    queueing.return_free_memory()
    assert library.calls == ([("malloc_trim", 0)] if functions and device == mx.cpu else [])


@pytest.mark.parametrize("functions", [(), ("mallopt",)], ids=["other", "glibc"])
def test_a_server_has_one_heap(monkeypatch, functions):
    library = Library(*functions)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    with pytest.raises(SystemExit):
        serve(["--help"])
    assert library.calls == ([("mallopt", queueing.M_ARENA_MAX, 1)] if functions else [])


def test_layers_at_a_time_depend_on_the_device(monkeypatch):
    monkeypatch.setattr(queueing, "LAYERS_ON_GPU", 5)
    for device, layers in ((mx.cpu, 1), (mx.gpu, 5)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        assert queueing.layers_at_once() == layers
        assert queueing.layers_at_once(queueing.CHUNK) == 1


@pytest.mark.parametrize(("layers", "starts"), [(1, 3), (2, 1), (3, 1), (48, 0)])
def test_so_many_layers_of_a_step_are_handed_over(monkeypatch, layers, starts):
    model, _ = bundled()
    assert len(model.layers) == 4
    started = []
    monkeypatch.setattr(speculative, "layers_at_once", lambda _: layers)
    monkeypatch.setattr(mx, "async_eval", started.append)
    speculative.forward(model, model.make_cache(), mx.array([5]), [])
    assert len(started) == starts


def test_of_a_chunk_a_layer_is_done_before_the_next_is_handed_over(monkeypatch):
    model, _ = bundled()
    order = []
    monkeypatch.setattr(mx, "async_eval", lambda x: order.append(("begun", id(x))))
    monkeypatch.setattr(mx, "eval", lambda xs: order.append(("done", *map(id, xs))))
    tokens = mx.zeros(queueing.CHUNK, mx.int32)
    speculative.forward(model, model.make_cache(), tokens, [])
    first, second, third = (x for what, *x in order if what == "begun")
    expected = [("done",), ("begun", *first), ("done", *first), ("begun", *second)]
    assert order == [*expected, ("done", *second), ("begun", *third)]


def test_settings_are_those_of_the_process(monkeypatch):
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 9})
    assert queueing.settings() == {
        "MLX_MAX_MB_PER_BUFFER": None,
        "MLX_MAX_OPS_PER_BUFFER": "7",
        "layers_at_once": queueing.LAYERS_ON_GPU,
        "wired": 9,
    }


def test_commands_limit_the_cache_once_the_model_is_loaded(call, monkeypatch):
    events = []

    def record(of, name):
        before = getattr(of, name)

        def recorded(*args, **options):
            events.append(name)
            return before(*args, **options)

        monkeypatch.setattr(of, name, recorded)

    for module in (terminal, command):
        record(module, "load")
        record(module, "limit_cache")
    monkeypatch.setattr(queueing, "limit_cache", lambda: 123)
    record(queueing, "limit_cache")
    for name in ("load_model", "load_stock", "maybe_set_recommended_wired_limit"):
        record(worker, name)
    assert call(main, "-m", 1)[0] == 0
    assert events == ["load", "limit_cache"]
    command._load(parser().parse_args([]), ALONE, {})
    assert events[2:] == ["load", "limit_cache"]
    held = worker.Ours(str(BUNDLED), "float32", ALONE, {}).held()
    assert events[4:] == ["load_model", "limit_cache", "maybe_set_recommended_wired_limit"]
    assert held["queueing"] == queueing.settings() | {"cache": 123}
    worker.Stock(str(BUNDLED), "bfloat16", ALONE, {})
    assert events[7:] == ["load_stock", "maybe_set_recommended_wired_limit"]
