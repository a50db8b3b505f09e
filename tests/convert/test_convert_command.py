"""The command ``python -m mlx_qwen3next.convert``: through main(), and in processes of its own."""

import inspect
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import checkpoints
import forked
import mlx.core as mx
import pytest
from checkpoints import GOLDENS
from helpers_convert import state
from helpers_generate import process
from mlx_lm.convert import configure_parser
from mlx_lm.convert import convert as convert_by_mlx_lm

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.convert import convert, weights
from mlx_qwen3next.convert.__main__ import main, parser

ROOT = Path(__file__).parents[2]
BASE = str(GOLDENS / "base")
STOCK = {action.dest: action for action in configure_parser()._actions if action.dest != "help"}
OURS = {action.dest: action for action in parser()._actions if action.dest != "help"}


@pytest.fixture
def run(call):
    return partial(call, main)


# --- flags ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dest", STOCK)
def test_stock_flags_are_mlx_lms(dest):
    ours, stock = OURS[dest], STOCK[dest]
    for name in ("option_strings", "default", "nargs", "const", "choices"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.type in (stock.type, None) or stock.type is str
    value = "32" if stock.type is int else (stock.choices or ["x"])[-1]
    for option in stock.option_strings:
        args = [option] if stock.nargs == 0 else [option, value]
        expected = getattr(configure_parser().parse_args(args), dest)
        given = args if dest == "hf_path" else ["--hf-path", "y", *args]
        assert getattr(parser().parse_args(given), dest) == expected


def test_the_function_takes_what_mlx_lms_takes():
    ours, stock = (inspect.signature(f).parameters for f in (convert, convert_by_mlx_lm))
    assert list(ours)[: len(stock)] == list(stock)
    for name, parameter in stock.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind


def test_the_function_takes_a_parsed_command_line(tmp_path):
    args = vars(parser().parse_args(["--hf-path", BASE, "--mlx-path", str(tmp_path / "a")]))
    signature = inspect.signature(convert)
    assert args.keys() == signature.parameters.keys()
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    assert args == defaults | {"hf_path": BASE, "mlx_path": str(tmp_path / "a")}
    convert(**args)
    assert (tmp_path / "a" / "config.json").is_file()


def test_flags_reach_the_function(run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mlx_qwen3next.convert.__main__.convert", lambda **given: calls.append(given)
    )
    expected = {
        "hf_path": "owner/model",
        "mlx_path": "out",
        "quantize": True,
        "q_group_size": 32,
        "q_bits": 5,
        "q_mode": "affine",
        "dtype": "float16",
        "upload_repo": "owner/other",
        "revision": "v2",
        "dequantize": True,
        "quant_predicate": "mixed_3_6",
        "trust_remote_code": True,
        "mtp": "drop",
        "mtp_bits": 16,
        "attach_mtp": True,
        "any_trunk": True,
        "fit": 48.0,
        "calibration": "text",
        "stream": True,
        "dry_run": True,
        "verify": True,
    }
    flags = [
        x
        for name, value in expected.items()
        for x in ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    ]
    assert run(*flags) == (0, "", "")
    assert calls == [expected]


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_help(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for action in OURS.values():
        for option in action.option_strings:
            assert re.search(rf"(^|[ ,]){option}[ ,\n]", out, re.M), option
    essential = out[: out.index("\noptions:")]
    assert all(f"  {option}" in essential for option in ("--hf-path", "--mlx-path", "--mtp"))
    assert "--q-bits" not in essential


def test_examples_in_the_help_are_understood(run):
    _, out, _ = run("--help")
    examples = re.findall(r"^  python -m mlx_qwen3next.convert (.*)$", out, re.M)
    assert len(examples) == 6
    for example in examples:
        parser().parse_args(example.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: --hf-path"),
        (["--hf-path"], "--hf-path"),
        (["--hf-path", BASE, "--no-such-flag"], "--no-such-flag"),
        (["--hf-path", BASE, "--q-bits", "four"], "--q-bits"),
        (["--hf-path", BASE, "--q-mode", "gptq"], "--q-mode"),
        (["--hf-path", BASE, "--dtype", "float64"], "--dtype"),
        (["--hf-path", BASE, "--mtp", "4"], "--mtp"),
        (["--hf-path", BASE, "--mtp-bits", "7"], "--mtp-bits"),
        (["--hf-path", BASE, "--quant-predicate", "mixed_1_2"], "--quant-predicate"),
        (["--hf-path", BASE, "-q", "-d"], "choose either -q (--quantize) or -d (--dequantize)"),
        (["--hf-path", BASE, "-q", "--q-bits", "7"], "no --q-bits 7"),
        (["--hf-path", BASE, "--stream"], "--stream is for hub repositories"),
        (["--hf-path", BASE, "-d"], "is not quantized"),
        (["--hf-path", BASE, "--mlx-path", "in the way"], "exists already; move it away"),
        (["--hf-path", BASE, "--mlx-path", "a file"], "is no usable folder"),
        (["--hf-path", "/no/such/model"], "/no/such/model does not exist"),
        (["--hf-path", "a\nb"], "a b does not exist, and is no repository id"),
        (["--hf-path", "\0"], "cannot be read"),
    ],
    ids=lambda x: " ".join(x[2:])[:30] if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, monkeypatch, args, said):
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way" / "file").touch()
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and said in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert state(tmp_path) == before


def test_an_error_in_the_middle_follows_the_progress(run, base, tmp_path):
    tensors = checkpoints.tensors("base")
    tensors["lm_head.weight"][0, 0] = float("nan")
    mx.save_safetensors(str(base / "model.safetensors"), tensors)
    status, out, err = run("--hf-path", base, "--mlx-path", tmp_path / "out")
    *progress, line = err.splitlines()
    assert (status, out) == (2, "")
    assert line == (
        f"error: {base / 'model.safetensors'}: lm_head.weight holds NaN or infinite values"
    )
    assert all(part.startswith("converting: ") or not part for part in progress)


# --- what it prints ------------------------------------------------------------------------------
def test_dry_run_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("--hf-path", BASE, "-q", "--q-group-size", 32, "--verify", "--dry-run")
    assert (status, err) == (0, "")
    assert os.listdir(tmp_path) == []
    convert(BASE, quantize=True, q_group_size=32)
    for line in (
        r"source +base",
        r" +195 tensors \(195 BF16\), 1\.0 MB, MTP head: yes",
        r"output +model\.safetensors: \d+ tensors, 0\.3 MB",
        r" +mtp\.safetensors: \d+ tensors, 0\.1 MB",
        r" +together 0\.3 MB, 5\.185 bits per weight",
        r"disk +0\.4 MB",
        r"memory +less than 0\.5 GB while converting",
        r"to run +\S+ MB with 8,192 tokens of context: Macs with 16 GB or more",
        r"to run +\S+ GB with 262,144 tokens of context: Macs with 16 GB or more",
    ):
        assert re.search(f"^{line}$", out, re.M), line
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "mlx_model").glob("*.safetensors")}
    for name, count, size in re.findall(r"(\S+): ([\d,]+) tensors, ([\d.]+) MB", out):
        header = mx.load(str(tmp_path / "mlx_model" / name))
        assert int(count.replace(",", "")) == len(header)
        assert float(size) == round(sizes.pop(name) / 1e6, 1)
    assert sizes == {}


def test_what_a_conversion_says(run, tmp_path):
    args = ("--hf-path", BASE, "--mlx-path", tmp_path / "out", "-q", "--q-group-size", 32)
    status, out, err = run(*args)
    assert (status, out) == (0, "")
    assert err.endswith(f"\n{tmp_path / 'out'}: 5.185 bits per weight\n")
    before = state(tmp_path)
    said = f"{tmp_path / 'out'} is there already, made from the same source in the same way\n"
    assert run(*args) == (0, "", said)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "flags"),
    [(BASE, ()), (BASE, ("-q", "--q-group-size", 32)), (BUNDLED, ("-d",))],
    ids=["plain", "quantized", "dequantized"],
)
def test_verify(run, tmp_path, source, flags):
    args = ("--hf-path", source, "--mlx-path", tmp_path / "out", "--dtype", "float32", *flags)
    status, out, _ = run(*args, "--verify")
    assert status == 0
    lines = out.splitlines()
    logits = lines.index("logits on demo prompts")
    kinds = [line.split()[0] for line in lines[1:logits]]
    expected = {
        re.sub(r"^(model|mtp)\.layers\.\d+\.", r"\1.", name)
        for file in ("model.safetensors", "mtp.safetensors")
        for name in mx.load(str(tmp_path / "out" / file))
        if not name.endswith((".scales", ".biases"))
    }
    assert sorted(kinds) == sorted(expected)
    for line in lines[1:logits]:
        error = float(line.split()[-1])
        assert error < 0.2 if " bits " in line else error == 0
    trunk, drafts = lines[logits + 1 :]
    for name, line in (("trunk", trunk), ("drafts", drafts)):
        assert re.fullmatch(
            rf"  {name}: relative error [\d.e+-]+, same choice [\d.]+%, "
            r"Kullback-Leibler divergence -?[\d.]+ nats",
            line,
        )
        error = float(line.split()[3].rstrip(","))
        assert 0.005 < error < 1 if "-q" in flags else error < 1e-4
    assert run(*args, "--verify")[:2] == (0, out)


# --- Ctrl-C --------------------------------------------------------------------------------------
# Pieces are small and slow, so that there is work left when the signal comes.
SLOW = """
import sys, time
from mlx_qwen3next.convert import weights
from mlx_qwen3next.convert.__main__ import main
weights._CHUNK = 2**10
write = weights.Outputs.write
def slowly(*args):
    write(*args)
    print("writing", flush=True)
    time.sleep(0.005)
weights.Outputs.write = slowly
sys.exit(main(sys.argv[1:]))
"""


def test_interrupted(tmp_path, run, monkeypatch):
    args = ("--hf-path", BASE, "-q", "--q-group-size", "32", "--mlx-path")
    out = tmp_path / "out"
    with process("-c", SLOW, *args, str(out)) as child:
        for _ in range(100):
            assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGINT)
        *progress, line = child.communicate(timeout=60)[1].decode().splitlines()
    assert child.returncode == 130
    done = re.fullmatch(
        rf"interrupted with (\d+)% done; the same command goes on from there, deleting "
        rf"{re.escape(str(out))}\.partial gives it up",
        line,
    )
    assert 0 < int(done[1]) < 90
    assert all(part.startswith("converting: ") or not part for part in progress)
    assert os.listdir(tmp_path) == ["out.partial"]
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_CHUNK", 2**10)
        assert run(*args, out)[0] == 0
    everything = tmp_path / "whole" / "out"
    assert run(*args, everything)[0] == 0
    assert state(out) == state(everything)


def test_interrupted_before_there_is_anything(run, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_qwen3next.convert.conversion.open_source", interrupt)
    assert run("--hf-path", BASE) == (130, "", "interrupted\n")


# --- in a process of its own ---------------------------------------------------------------------
@pytest.mark.parametrize(("module", "folder"), [("convert", ROOT), ("mlx_qwen3next.convert", None)])
def test_as_a_module(tmp_path, module, folder):
    command = [sys.executable, "-m", module, "--hf-path", BASE, "--mlx-path", tmp_path / "out"]
    if folder is None:
        result = forked.run(command, cwd=tmp_path)
    else:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.endswith(f"\n{tmp_path / 'out'}: 16.012 bits per weight\n")
    (tmp_path / "out" / "norms.safetensors").unlink()
    result = forked.run(command, cwd=folder or tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {tmp_path / 'out'} exists already; move it away or choose another --mlx-path\n"
    )
