"""``--rope-scaling`` of generate and of the server: limits, prompt caches and converted models."""

import json
from functools import partial

import checkpoints
import mlx.core as mx
import mlx_lm.utils
import pytest
from checkpoints import relative_error
from helpers_generate import bundled, endless, forward_cache
from mlx_lm.models.cache import save_prompt_cache

from mlx_qwen3next import load_model
from mlx_qwen3next.cli import load_options
from mlx_qwen3next.convert import convert
from mlx_qwen3next.generate import main
from mlx_qwen3next.group import ALONE
from mlx_qwen3next.server.command import _load
from mlx_qwen3next.server.flags import parser

YARN = ("--rope-scaling", "yarn:2")
SETTING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small model without stop tokens and with a context of 64."""
    return str(endless(tmp_path_factory.mktemp("model") / "short", max_position_embeddings=64))


@pytest.fixture
def run(call, model_dir):
    return partial(call, main, "--model", model_dir, "--ignore-chat-template")


def test_a_longer_prompt_is_taken(run):
    prompt = "import os\n" * 30
    status, _, err = run("-p", prompt, "-m", 2)
    assert status == 2 and "max_position_embeddings is 64" in err
    status, out, err = run("-p", prompt, "-m", -1, *YARN)
    assert (status, err) == (0, "")
    assert f"Generation: {128 - 90} tokens" in out
    status, _, err = run("-p", prompt * 2, *YARN)
    assert status == 2 and "max_position_embeddings is 128" in err


def test_a_prompt_cache_has_one_scaling(run, tmp_path):
    file = tmp_path / "chat.safetensors"
    flags = ("-m", 2, "-p", "import os", "--prompt-cache-file", file)
    assert run(*flags, *YARN)[0] == 0
    assert "belongs to another model" in run(*flags)[2]
    assert run(*flags, *YARN)[0] == 0
    of_mlx_lm = tmp_path / "mlx_lm.safetensors"
    save_prompt_cache(str(of_mlx_lm), forward_cache(bundled()[0], [1, 2]))
    status, _, err = run("--prompt-cache-file", of_mlx_lm, *YARN)
    assert status == 2 and "--rope-scaling needs a new --prompt-cache-file" in err


@pytest.mark.parametrize(
    "value", ["4", "linear:2", "yarn", "yarn:", "yarn:x", "yarn:0.5", "yarn:1e9"]
)
def test_what_is_no_scaling_is_refused(run, value):
    status, out, err = run("--rope-scaling", value)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "factor must be" in err if value == "yarn:1e9" else "must be yarn:FACTOR" in err


def test_the_server_serves_the_longer_context(model_dir):
    args = parser().parse_args(["--model", model_dir, *YARN])
    model, _ = _load(args, ALONE, load_options(args, 1))
    assert model.args.max_position_embeddings == 128
    assert model.model.layers[-1].self_attn.rope.scaling.factor == 2


@pytest.mark.parametrize("dialect", [dict, checkpoints.transformers5], ids=["hub", "transformers"])
def test_a_converted_model_keeps_its_scaling(tmp_path, dialect):
    """For mlx-lm as well, which reads the hub's dialect alone."""
    raw = checkpoints.config("base") | {"rope_scaling": SETTING, "rope_theta": 100}
    raw["max_position_embeddings"] = 16
    weights = {"model.safetensors": checkpoints.tensors("base")}
    source = checkpoints.write(tmp_path / "in", dialect(raw), weights)
    convert(str(source), str(tmp_path / "out"), dtype="float32")
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 6])
    model = load_model(tmp_path / "out")
    assert model.args.max_position_embeddings == 64
    expected = load_model(source)(tokens)
    assert relative_error(model(tokens), expected) < 1e-5
    stock, _ = mlx_lm.utils.load_model(tmp_path / "out")
    assert relative_error(stock(tokens), expected) < 1e-4


def test_a_head_is_attached_to_a_model_of_another_scaling(tmp_path):
    stock = checkpoints.convert(tmp_path / "stock")
    file = stock / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": SETTING}))
    convert(str(checkpoints.GOLDENS / "base"), str(stock), attach_mtp=True, dtype="float32")
    assert load_model(stock).mtp.layers[0].self_attn.rope.scaling.factor == 4
