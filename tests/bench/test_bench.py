"""The bench command through main(), with fake workers."""

import json
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

from mlx_qwen3next.bench import plots
from mlx_qwen3next.bench.__main__ import main
from mlx_qwen3next.bench.comparison import measure, run
from mlx_qwen3next.bench.comparison.sides import WorkerError

TOKENS = [5, 7, 11, 13]
LONG = 1e9  # seconds


class Fake:
    """A worker whose first token takes a second for 100 prompt tokens, ten times that for stock."""

    unloadable = ()  # labels of sides that fail to load
    shift = 0.0  # of stock's logits, relative
    tokens: ClassVar = {}  # (which, mtp) -> what is generated, if not TOKENS
    logits = np.eye(96)[5] + np.eye(96)[7] * 0.2
    seconds = 0.01  # to the first token, for each token of the prompt
    noise = ()  # factors of that time, for one repeat after the other
    asked: ClassVar[list] = []
    queueing: ClassVar[dict] = {
        "MLX_MAX_MB_PER_BUFFER": None, "MLX_MAX_OPS_PER_BUFFER": None, "layers_at_once": 1,
        "wired": None, "cache": None,
    }  # fmt: skip

    def __init__(self, side, directory, divided):
        self.side, self.turn = side, {}
        if side.label in self.unloadable:
            raise WorkerError(f"{side.label}: no such luck")
        self.loaded = {
            "import": 1.0, "load": 2.0, "bytes": 10**6, "device": "Device(cpu, 0)",
            "transposed": 3, "matrices": 4, "ranks": 1, "queueing": self.queueing,
        }  # fmt: skip

    def ask(self, do, **args):
        self.asked.append((self.side.label, do, args))
        return getattr(self, "_logits" if do == "logits" else do)(**args)

    def close(self):
        pass

    def generate(self, prompt, tokens, mtp="off"):
        n = len(prompt)
        self.turn[n] = self.turn.get(n, -1) + 1
        factor = self.noise[self.turn[n] % len(self.noise)] if self.noise else 1
        slower = 10 if self.side.which == "stock" else 1
        return {
            "first": self.seconds * n * slower * factor, "further": 0.004 * slower,
            "chunk": [self.seconds * n, n], "over": 2e7, "formula": 3e7,
            "tokens": self.tokens.get((self.side.which, mtp), TOKENS),
            "per_round": 2.0 if mtp != "off" else 1.0, "accepted": [],
            "drafted": {"0": 1, "2": 3}, "peak": 5, "resident": 6,
        }  # fmt: skip

    def _logits(self, prompt, tail, file):
        np.save(file, self.logits * (1 + self.shift * (self.side.which == "stock")))
        return file

    def turns(self, **_):
        return {"first": 2.0, "second": 0.25}

    queued = lambda self: 40  # noqa: E731
    fixed = lambda self: 0.001  # noqa: E731
    bandwidth = lambda self: 1e9  # noqa: E731
    findings = lambda self: {}  # noqa: E731
    chosen = lambda self: [[0, 0.004, 1.0, True], [1, 0.01, 1.5, True]]  # noqa: E731


@pytest.fixture
def fake(monkeypatch):
    """The class of the fake workers, which a test may change."""

    class Changed(Fake):
        asked: ClassVar[list] = []

    monkeypatch.setattr(measure, "Worker", Changed)
    return Changed


@pytest.fixture
def bench(call, base, tmp_path):
    """Runs main() on the golden; returns status, output, errors and the JSON, None without one."""

    def bench(*args):
        file = tmp_path / "figures.json"
        options = ["--model", base, "--dtype", "float32", "--tokens", 4, "--json", file]
        status, out, err = call(main, *options, *args)
        return status, out, err, json.loads(file.read_text()) if file.exists() else None

    return bench


def row(out, name):
    """The figures of the lines that begin with a name."""
    return [line[len(name) :].split() for line in out.splitlines() if line.startswith(name)]


@pytest.mark.parametrize(
    ("contexts", "n"), [("10,262000", 262000), ("10,262080", 10), ("262080,262090", None)]
)
def test_a_second_turn_needs_room_in_the_context(fake, bench, contexts, n):
    """The context has 262,144 tokens; the answer takes 4 and the second turn 64."""
    options = "--without-mlx-lm", "--limit", 1e6
    status, out, err, _ = bench("--contexts", contexts, *options)
    assert (status, err) == (0, "")
    asked = {len(args["first"]) for _, do, args in fake.asked if do == "turns"}
    assert asked == ({n} if n else set())
    assert ("a second turn is left out" in out) == (n is None)


def test_medians_come_from_the_samples(fake, bench):
    fake.noise = [1, 4, 2]
    status, out, err, figures = bench("--contexts", "10,20")
    assert (status, err) == (0, "")
    # 0.01 s a token times the median factor of 2; stock takes ten times as long.
    assert figures["medians"]["prefill"]["here, float32"] == {"10": 50.0, "20": 50.0}
    prefill, decode = row(out, "here, float32 ")[1:3]
    assert prefill == ["50.0", "50.0"] and decode == ["250.0", "250.0"]
    assert row(out, "  beside mlx-lm, float32")[:2] == [["10.00x"] * 2] * 2
    samples = figures["samples"]["speed"]["here, float32"]["10"]
    assert [sample["first"] for sample in samples] == pytest.approx([0.1, 0.4, 0.2])


def test_the_sides_take_turns(fake, bench):
    bench("--contexts", "10", "--repeats", 2)
    generated = [label for label, do, args in fake.asked if do == "generate" and "mtp" not in args]
    assert generated == ["here, float32", "mlx-lm, float32"] * 2


def test_the_share_of_the_limit(fake, bench):
    _, out, _, figures = bench("--contexts", "10")
    share = 250 * figures["bytes_a_token"]["here, float32"]["10"] / 1e9
    assert row(out, "  of the limit: here, float32") == [[f"{share:.1%}"]]


def test_a_prompts_work_stands_beside_its_time(fake, bench):
    _, out, _, figures = bench("--contexts", "10,20")
    work, rates = (of["here, float32"] for of in (figures["prompt"], figures["medians"]["prefill"]))
    (ms,), (moved,) = (row(out, name) for name in ("  ms ", "  MB moved, at least, without activ"))
    (millions,) = row(out, "  million multiply-adds, without the output")
    assert ms == [f"{1e3 / rates[n]:.2f}" for n in ("10", "20")]
    assert moved[1:] == [f"{work[n]['bytes'] / int(n) / 1e6:.2f}" for n in work]
    assert millions == [f"{work[n]['multiply_adds'] / int(n) / 1e6:.1f}" for n in work]


def test_a_measurement_beyond_the_limit_is_left_out(fake, bench):
    """mlx-lm takes 10 s for 100 tokens, so 20 s are predicted for 200."""
    _, out, _, figures = bench("--contexts", "100,200", "--limit", 15, "--repeats", 1)
    stock = row(out, "mlx-lm, float32 ")
    assert ["10.0", "-,", "about", "20", "s"] in stock
    assert list(figures["samples"]["speed"]["mlx-lm, float32"]) == ["100"]
    assert list(figures["samples"]["speed"]["here, float32"]) == ["100", "200"]


def test_slow_measurements_have_fewer_repeats(fake, bench):
    _, _, _, figures = bench("--contexts", "100", "--limit", 25, "--repeats", 5)
    speed = figures["samples"]["speed"]
    assert len(speed["mlx-lm, float32"]["100"]) == 2  # 10.16 s each
    assert len(speed["here, float32"]["100"]) == 5


@pytest.mark.parametrize("shift, status", [(0.05, 0), (0.2, 1), (float("nan"), 1)])
def test_logits_that_differ_too_much_give_no_figures(fake, bench, shift, status):
    fake.shift = shift
    got, out, err, figures = bench("--contexts", "10", "--repeats", 1)
    assert got == status
    if status:
        assert out == "" and figures is None and err.count("\n") == 1
        assert "logits of here, float32, and mlx-lm, float32 differ" in err
        assert not [do for _, do, _ in fake.asked if do == "generate"]


@pytest.mark.parametrize(
    "who, name",
    [(("stock", "off"), "mlx-lm, float32, after 10 tokens"), (("ours", 2), "depth 2"),
     (("ours", "auto"), "depth 4")],
)  # fmt: skip
def test_other_tokens_give_no_figures(fake, bench, who, name):
    fake.tokens = {who: [5, 5, 11, 13]}
    status, out, err, figures = bench("--contexts", "10", "--repeats", 1)
    assert (status, out, figures) == (1, "", None)
    assert err.count("\n") == 1 and name in err and "position 1: 7 and 5" in err


def test_a_tie_may_go_either_way(fake, bench):
    """The tokens' logits are 0.8 apart; they are 1 in a vocabulary of 96, so typically 0.1."""
    fake.tokens = {("stock", "off"): [5, 5, 11, 13]}
    fake.shift = 0.0999
    fake.logits = np.eye(96)[5] + np.eye(96)[7] * 0.95
    status, out, _, figures = bench("--contexts", "10", "--repeats", 1)
    assert status == 0
    assert figures["samples"]["checks"]["mlx-lm, float32"]["tokens"] == [[10, 1, 4]]
    assert "at ties, up to number 1" in out


def test_mlx_lm_is_left_out_if_it_cannot_load(fake, bench):
    fake.unloadable = ["mlx-lm, float32"]
    status, out, err, figures = bench("--contexts", "10", "--repeats", 2)
    assert (status, err) == (0, "")
    assert out.count("no such luck") == 1 and list(figures["medians"]["decode"]) == [
        "here, float32"
    ]


def test_ours_must_load(fake, bench):
    fake.unloadable = ["here, float32"]
    status, out, err, figures = bench()
    assert (status, out, figures) == (2, "", None)
    assert err == "error: here, float32: no such luck\n"


def test_speculation_beside_plain_decoding(fake, bench):
    _, out, _, figures = bench("--contexts", "10", "--repeats", 1)
    assert figures["medians"]["speculation"]["2"]["needs"] == 2.0
    assert row(out, "2 ")[0][:3] == ["4.00", "2.00", "1.00x"]
    assert "auto used depth (of its rounds) 0: 25%, 2: 75%" in out
    assert "0: 4.00 ms for 1.00 tokens, 1: 10.00 ms for 1.50 tokens" in out


def test_the_json_describes_the_run(fake, bench, base):
    _, _, _, figures = bench("--contexts", "10,10,300000")
    assert figures["contexts"] == [10, 262144 - 4]
    assert any("300000" in note for note in figures["notes"])
    assert figures["machine"]["versions"]["mlx-lm"] and figures["machine"]["memory"] > 0
    assert figures["model"]["name"] == str(base) and len(figures["model"]["config"]) == 12
    assert figures["options"]["repeats"] == 3
    assert figures["samples"]["loads"]["mlx-lm, float32"][0]["load"] == 2.0
    assert len(figures["samples"]["loads"]["here, float32"]) == 3


def test_the_settings_of_queueing_are_shown(fake, bench):
    _, out, _, _ = bench("--contexts", "10")
    assert "\nqueueing: here 1 layer at a time\n" in out
    fake.queueing = {
        "MLX_MAX_MB_PER_BUFFER": "1024", "MLX_MAX_OPS_PER_BUFFER": "7", "layers_at_once": 8,
        "wired": 51_500_000_000, "cache": 4_200_000_000,
    }  # fmt: skip
    _, out, _, figures = bench("--contexts", "10")
    assert (
        "\nqueueing: MLX_MAX_MB_PER_BUFFER=1024, MLX_MAX_OPS_PER_BUFFER=7, 51.5 GB wired, "
        "here 8 layers at a time and at most 4.2 GB of freed buffers\n"
    ) in out
    assert figures["samples"]["loads"]["here, float32"][0]["queueing"] == fake.queueing


def test_models_that_do_not_fit_together_are_measured_one_by_one(fake, bench, monkeypatch):
    monkeypatch.setattr(run.capacity, "spare", lambda: 1)
    status, out, _, _ = bench("--contexts", "10", "--repeats", 2)
    assert status == 0 and "one was measured after the other" in out
    generated = [label for label, do, args in fake.asked if do == "generate" and "mtp" not in args]
    assert generated == ["mlx-lm, float32"] * 2 + ["here, float32"] * 2


def test_without_mlx_lm_there_is_no_ratio(fake, bench):
    _, out, _, _ = bench("--contexts", "10", "--without-mlx-lm")
    assert "mlx-lm, float32" not in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--tokens", 1], "--tokens must be at least 2"),
        (["--layers", 4], "--layers is for --shape"),
        (["--expert-bits", 3], "--expert-bits is for --shape"),
        (["--shape", "small", "--layers", 3], "multiple of 4"),
        (["--contexts", "128,0"], "at least 1, got '0'"),
        (["--contexts", "many"], "got 'many'"),
        (["--limit", "-1"], "more than 0"),
        (["--limit", "nan"], "more than 0"),
        (["--dtype", "float16"], "invalid choice"),
        (["--shape", "small", "--model", "x"], "not allowed with"),
        (["--model", "./nowhere"], "./nowhere does not exist"),
        (["--json", "/nowhere/figures.json"], "no directory /nowhere"),
        (["--shape", "small", "--layers", 4 * 10**9], "at most 48"),
    ],
)
def test_errors_are_one_line(call, args, message):
    status, out, err = call(main, *args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_plots_without_matplotlib(call, monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    status, out, err = call(main, "--plots", tmp_path / "figures")
    assert (status, out) == (2, "")
    assert err == "error: --plots needs matplotlib: pip install 'mlx-qwen3next[plots]'\n"


def test_plots(fake, bench, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "figures"
    assert bench("--contexts", "10,20", "--repeats", 1, "--plots", folder)[0] == 0
    rows = [
        {"tokens": n, "seconds": n, "linear": 1, "attention": n, "step": n, "cache": n,
         "formula": n} for n in (1024, 2048)
    ]  # fmt: skip
    medians = {"prefill": {"here": {10: 5.0}}, "decode": {"here": {10: 5.0}}}
    plots.draw(folder, medians, rows)
    assert {file.name for file in folder.iterdir()} == {"prefill.png", "decode.png", "growth.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.iterdir())


def test_help_teaches(call):
    status, out, _ = call(partial(main), "--help")
    assert status == 0 and "examples:" in out and "python -m mlx_qwen3next.bench --shape 80b" in out
