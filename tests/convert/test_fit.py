"""--fit: the least error within the bytes, errors that are the model's own, and going on."""

import json
import os
import shutil

import checkpoints
import mlx.core as mx
import mlx_lm.utils
import pytest
from checkpoints import GOLDENS, relative_error
from helpers_convert import options, state
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_qwen3next import load_model
from mlx_qwen3next.convert import convert
from mlx_qwen3next.convert.calibration import Calibration, default_text
from mlx_qwen3next.convert.fit import _allocate, memory_needed
from mlx_qwen3next.convert.plan import plan_conversion
from mlx_qwen3next.convert.progress import Progress
from mlx_qwen3next.convert.quantize import dequantize, quantize
from mlx_qwen3next.convert.source import Source
from mlx_qwen3next.convert.units import Unit, Width, find_units

TEXT = " ".join(str(i * i % 89) for i in range(80))
OPTIONS = {"q_group_size": 32, "dtype": "float32"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`base` with a tokenizer of numbers and a text for it."""
    directory = shutil.copytree(GOLDENS / "base", tmp_path_factory.mktemp("fit") / "base")
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(90)}, "0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    (directory / "text").write_text(TEXT)
    return directory


def gigabytes(source, bits):
    """The memory, for --fit, that the weights at so many bits need."""
    base = Width(bits, 32).quantization
    conversion = plan_conversion(Source(source), dtype=mx.float32, base=base)
    return memory_needed(conversion, conversion.resident_bytes)


def fitted(source, out, bits, **given):
    given = {"calibration": str(source / "text"), **OPTIONS} | given
    convert(str(source), str(out), fit=gigabytes(source, bits), **given)
    return out


def calibration(source, text=TEXT):
    base = Width(4, 32).quantization
    conversion = plan_conversion(Source(source), dtype=mx.float32, base=base)
    return Calibration(conversion, find_units(conversion, 32), text)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An undisturbed conversion to the size of 3 bits."""
    return fitted(source, tmp_path_factory.mktemp("whole") / "out", 3)


# --- the choice ----------------------------------------------------------------------------------
def test_the_choice_takes_most_error_away_for_the_bytes():
    a, b, c = Width(2, 64), Width(3, 64), Width(4, 64)
    one, two = (Unit(name, "", (name,), (a, b, c)) for name in ("one", "two"))
    costs = {"one": {a: 10, b: 20, c: 30}, "two": {a: 100, b: 200, c: 300}}
    errors = {"one": {a: 9.0, b: 8.5, c: 2.0}, "two": {a: 50.0, b: 10.0, c: 9.0}}
    # The second width of `one` is worth little by itself, so its step is the one to the third.
    for left, one_gets, two_gets in [(19, b, a), (20, c, a), (100, a, b), (120, c, b), (219, c, b)]:
        chosen = _allocate({one: a, two: a}, costs, errors, left)
        assert (chosen[one], chosen[two]) == (one_gets, two_gets), left


@pytest.mark.parametrize("calibrated", ["none", None], ids=["expected", "measured"])
def test_the_model_takes_the_memory_and_no_more(source, whole, tmp_path, calibrated):
    out = whole if calibrated is None else fitted(source, tmp_path / "out", 3, calibration="none")
    model = load_model(out, dtype=mx.float32, pack=False)
    weights = sum(value.nbytes for value in checkpoints.parameters(model).values())
    base = Width(3, 32).quantization
    room = plan_conversion(Source(source), dtype=mx.float32, base=base).resident_bytes
    assert 0.97 * room < weights <= room
    config = json.loads((out / "config.json").read_text())["quantization"]
    of_kind = {}
    for path, module in model.named_modules():
        if hasattr(module, "bits"):
            of_kind.setdefault(path.rpartition(".")[2], set()).add(module.bits)
            assert config.get(path, config)["bits"] == module.bits
    assert of_kind["gate"] == of_kind["shared_expert_gate"] == {8}
    assert len(set.union(*of_kind.values())) > 2
    for layer in model.layers:
        assert layer.mlp.switch_mlp.gate_proj.bits == layer.mlp.switch_mlp.up_proj.bits
    assert {model.mtp.fc.bits, model.mtp.layers[0].mlp.switch_mlp.down_proj.bits} == {4}


def test_mlx_lm_computes_the_same(whole):
    stock, _ = mlx_lm.utils.load_model(whole)
    tokens = mx.array(checkpoints.expected("base")["tokens"])[None]
    expected = checkpoints.in_float32(stock)(tokens)
    result = load_model(whole, dtype=mx.float32, pack=False)(tokens)
    assert relative_error(result, expected) < 1e-4


# --- errors --------------------------------------------------------------------------------------
def test_errors_are_those_of_the_models_hidden_states(source, tmp_path):
    """Measured once more, unit by unit, on the whole model with one unit quantized."""
    task = calibration(source)
    tokens = task.tokenize(None)
    with Progress(tmp_path, {}) as progress:
        errors = task.measure(tokens, tmp_path, progress)
    model = load_model(source, dtype=mx.float32, pack=False)
    modules = dict(model.named_modules())
    paths = [unit.paths[0] for unit in task._units]
    assert [path.split(".")[2] for path in paths[1:-1]] == [str(i // 4) for i in range(16)]
    assert len(errors) == len(paths) == 2 + 4 * 4

    def hidden():
        """The hidden states behind the embedding, each mixer and each layer, and the logits."""
        x = model.model.embed(tokens)
        states = [x]
        for layer in model.layers:
            x = x + layer.mixer(layer.input_layernorm(x), None if layer.is_linear else "causal")
            states.append(x)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            states.append(x)
        logits = model.logits(model.model.norm(x[:, ::8]))
        return [*states, logits - logits.mean(axis=-1, keepdims=True)]

    plain = hidden()
    for unit in task._units:
        layer = int(unit.paths[0].split(".")[2]) if "layers" in unit.paths[0] else 0
        at = {"embedding": 0, "output": -1, "mixer": 1 + 2 * layer}.get(unit.kind, 2 + 2 * layer)
        width = Width(3, 32)
        wholes = [modules[path].weight for path in unit.paths]
        for path, weight in zip(unit.paths, wholes, strict=True):
            parts = quantize(weight, width.quantization, searched=True)
            modules[path].weight = dequantize(parts, width.quantization)
        expected = relative_error(hidden()[at], plain[at]) ** 2
        assert abs(errors[unit.name][width] / expected - 1) < 1e-3, unit.name
        for path, weight in zip(unit.paths, wholes, strict=True):
            modules[path].weight = weight


def test_a_searched_range_is_better_and_mlxs_format():
    value = mx.random.normal((8, 256), key=mx.random.key(1)).astype(mx.bfloat16)
    for bits in (2, 3, 4):
        q = Width(bits, 64).quantization

        def error(parts, q=q):
            difference = dequantize(parts, q) - value
            return mx.square(difference.astype(mx.float32)).reshape(8, 4, 64).sum(axis=-1)

        searched, plain = quantize(value, q, searched=True), mx.quantize(value, **q)
        assert [x.dtype for x in searched] == [x.dtype for x in plain]
        better, worse = error(searched), error(plain)
        assert (
            mx.all(better <= worse)
            and better.sum() < {2: 0.85, 3: 0.92, 4: 0.97}[bits] * worse.sum()
        )
    for q in (Width(8, 64).quantization, {"group_size": 32, "bits": 4, "mode": "mxfp4"}):
        for a, b in zip(quantize(value, q, searched=True), mx.quantize(value, **q), strict=True):
            assert mx.array_equal(a, b)


def test_the_text_that_is_there_has_prose_and_code():
    pieces = [default_text()[at : at + 2_000] for at in range(0, 60_000, 2_002)]
    assert len(pieces[-1]) == 2_000
    assert all("\n    def " not in piece for piece in pieces[::2])
    assert sum("def " in piece or "self." in piece for piece in pieces[1::2]) > 10


# --- stops ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("at", "left"), [(4, [2, 3]), (10, [])], ids=["measuring", "converting"])
def test_stopped(source, whole, tmp_path, monkeypatch, at, left):
    """At a replacement of a file (one at first, two a layer, one of the errors, and so on)."""
    original, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) - 1 == at:
            raise KeyboardInterrupt
        return original(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            fitted(source, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    measured = []
    measure = Calibration._measure_layer
    monkeypatch.setattr(
        Calibration, "_measure_layer", lambda *args: measured.append(args[1]) or measure(*args)
    )
    fitted(source, tmp_path / "out", 3)
    assert state(tmp_path / "out") == state(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert measured == left


def test_what_is_measured_is_kept(source, whole, tmp_path, monkeypatch, capsys):
    """A finished conversion is recognised, and a dry run goes by what was measured."""
    monkeypatch.setattr(Calibration, "measure", None)
    out = shutil.copytree(whole, tmp_path / "out")
    before = state(out)
    fitted(source, out, 3)
    assert "is there already" in capsys.readouterr().err and state(out) == before


def test_another_calibration_is_not_mixed_in(source, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "text").write_text(TEXT[:-3])
    with pytest.raises(ValueError, match="exists already"):
        fitted(source, out, 3, calibration=str(tmp_path / "text"))


# --- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fit": None, "calibration": "none"}, "--calibration needs --fit"),
        ({"q_bits": 3}, "--fit chooses the bits itself: --q-bits, --q-mode, --quant-predicate, -d"),
        ({"quant_predicate": "mixed_3_6"}, "--fit chooses the bits itself"),
        ({"fit": float("nan")}, "--fit must be a number of GB, got nan"),
        ({"fit": -1.0}, "--fit must be a number of GB, got -1"),
        ({"fit": 1e-4}, "--fit 0.0001 is too small: the smallest that fits is 0.1; a checkpoint "),
        ({"q_group_size": 48}, "--q-mode affine has no --q-bits 4 with --q-group-size 48"),
        ({"stream": True}, "with --stream, --calibration none is needed"),
        ({"calibration": "/no/such/file"}, "--calibration /no/such/file cannot be read: No such"),
        ({}, "tokenizer.json does not exist, which calibration needs; --calibration none does"),
    ],
    ids=options,
)
def test_refused_in_one_line(refusal, given, said):
    assert said in refusal(GOLDENS / "base", **{"fit": 48.0} | given)


def test_text_that_is_too_short(refusal, source, tmp_path):
    (tmp_path / "text").write_text("1 2 3")
    message = refusal(source, fit=48.0, calibration=str(tmp_path / "text"))
    assert message.endswith("has 3 tokens; at least 64 are needed, and up to 8192 are used")


def test_dry_run(source, whole, tmp_path, capsys):
    """It measures nothing, and tells the Macs by the rule of the choice."""
    before = state(source)
    fitted(source, tmp_path / "out", 3, dry_run=True)
    out, err = capsys.readouterr()
    assert err == "" and not list(tmp_path.iterdir()) and state(source) == before
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("recipe "))
    kinds = [line[13:].split(":")[0] for line in lines[first : first + 6]]
    assert sorted(kinds) == sorted({unit.kind for unit in calibration(source)._units})
    assert "expected" in lines[first + 6]
    shutil.copytree(whole, tmp_path / "out")
    fitted(source, tmp_path / "out", 3, dry_run=True)
    assert "measured" in capsys.readouterr().out
