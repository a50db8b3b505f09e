"""Helpers of the tests of generation: models, forced tokens and copies of the bundled model."""

import contextlib
import functools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import forked
import long_text
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen3next import generate_step, load, load_model, stream_generate
from mlx_qwen3next.checkpoint.files import MTP_FILE
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model import mtp_head
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.packed.packing import pack
from mlx_qwen3next.model.qwen3_next import Model

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPT = 10  # the goldens' `greedy` continues tokens[:PROMPT]
NARROW = {
    **{"hidden_size": 32, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    **{"shared_expert_intermediate_size": 16, "num_hidden_layers": 3, "full_attention_interval": 3},
    **{"quantization": None, "quantization_config": None},
}


@functools.cache
def golden(case):
    """(model in float32, expected tensors) of a golden case."""
    return load_model(GOLDENS / case, dtype=mx.float32), mx.load(
        str(GOLDENS / case / "expected.safetensors")
    )


def golden_tokens(case):
    """(prompt, what greedy decoding says after it), as lists."""
    _, expected = golden(case)
    return expected["tokens"][:PROMPT].tolist(), expected["greedy"].tolist()


@functools.cache
def bundled():
    """(model in float32, tokenizer) of the bundled demo model."""
    return load(dtype=mx.float32)


def predictable(**changes):
    """A model of random weights with its head, as deep as the bundled one and narrow.

    About half of its tokens follow from the one before alone, and its head knows which: so half of
    the drafts are right, and the other tokens show what went wrong in a cache.

    Args:
        changes: other entries of the config.
    """
    mx.random.seed(0)
    config = json.loads((BUNDLED / "config.json").read_text()) | NARROW | changes
    model = Model(Config.from_dict(config))
    head, (tokens, width) = mtp_head.attach(model), model.lm_head.weight.shape
    words = mx.random.normal((tokens, width))
    model.model.embed_tokens.weight = 0.3 * words
    model.lm_head.weight = words[mx.random.permutation(tokens)]
    _, of_hidden = mx.split(head.fc.weight, 2, axis=1)
    head.fc.weight = mx.concatenate([mx.eye(width), of_hidden], axis=1)
    mx.eval(model.parameters())
    return model.eval()


def predictable_at_4_bits():
    """The same, as narrow as groups of 64 let it be."""
    widths = "hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"
    model = predictable(**dict.fromkeys(widths, 64))
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


@functools.cache
def narrow():
    """A predictable model, packed, and its tokenizer, the bundled one's; caches have the sizes of
    the bundled model's, and long prompts are read ten times as fast."""
    model = pack(predictable())
    mx.eval(model.parameters())  # by the thread that made them
    return model, bundled()[1]


@functools.cache
def interleaved():
    """A packed model of random weights with an MTP head, and with attention in the middle as well:
    what any token meets reaches the end."""
    mx.random.seed(1)
    model = Model(Config.from_dict(long_text.CONFIG | {"full_attention_interval": 2}))
    mtp_head.attach(model)
    return pack(model.eval())


def tokens_of(steps):
    """The token ids of generate_step's tokens or stream_generate's responses."""
    return [step.token for step in steps]


def greedy(model, prompt, n, **options):
    """The n tokens greedy decoding says after a prompt."""
    return tokens_of(generate_step(prompt, model, max_tokens=n, **options))


def forced(script, prompt_length):
    """A logits processor that makes the model say the token ids of ``script``, then the last."""

    def processor(tokens, logits):
        token = script[min(len(tokens) - prompt_length, len(script) - 1)]
        return mx.where(mx.arange(logits.shape[-1]) == token, 0.0, -mx.inf) + 0 * logits

    return processor


def forward_cache(model, tokens):
    """A cache after a plain forward over the tokens."""
    cache = model.make_cache()
    mx.eval(model(mx.array([tokens]), cache))
    return cache


def arrays(cache):
    """The contents of a cache as a flat list: arrays, numbers and None."""

    def flat(x):
        return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else [x]

    return flat([entry.state for entry in cache])


def same(a, b, tolerance=0.0):
    """Whether two flat lists of arrays and numbers agree, arrays by relative L2 error."""

    def numbers(x):
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, np.float64)

    return len(a) == len(b) and all(
        np.linalg.norm(numbers(x) - (expected := numbers(y)))
        <= tolerance * np.linalg.norm(expected)
        if isinstance(x, mx.array) and isinstance(y, mx.array) and x.shape == y.shape
        else x is y or (not isinstance(x, mx.array) and x == y)
        for x, y in zip(a, b, strict=True)
    )


UNUSED = 4095  # a token that the model of `endless` never says


@functools.cache
def _endless_weights():
    """(trunk, head) by name."""
    model = predictable()
    model.lm_head.weight[UNUSED] = 0.0  # the likeliest of so many tokens have logits of 20
    return checkpoints.split(checkpoints.parameters(model))


def endless(directory, **config):
    """Writes the predictable model to ``directory`` with the bundled tokenizer and without stop
    tokens, so that only max_tokens and the context end it.

    Args:
        config: other entries of its config.json.
    """
    trunk, head = _endless_weights()
    whole = json.loads((BUNDLED / "config.json").read_text()) | NARROW | {"eos_token_id": UNUSED}
    files = {"model.safetensors": trunk, MTP_FILE: head}
    checkpoints.write(directory, whole | config, files)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(BUNDLED / name, directory / name)
    tokenizer = json.loads((BUNDLED / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [UNUSED]}))
    return directory


def float32(directory):
    """Rewrites a model's floating-point tensors in float32, in place, so that mlx-lm's own model
    computes in it too."""
    for file in directory.glob("*.safetensors"):
        tensors, metadata = mx.load(str(file), return_metadata=True)
        exact = {
            name: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
            for name, x in tensors.items()
        }
        mx.eval(exact)
        mx.save_safetensors(str(file), exact, metadata)
    return directory


@contextlib.contextmanager
def process(*command, cold=False):
    """A running command, with pipes; Ctrl-C is not ignored in it, whatever started the tests.

    Args:
        cold: starts Python for it, where its imports or its start are what is tested.
    """
    start = subprocess.Popen if cold else forked.Popen
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = start([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


RAW = ("--ignore-chat-template", "-p", "import os\n")


def library_answer(directory, prompt, n, **options):
    """The library's answer to a prompt as plain text, without a chat template."""
    model, tokenizer = load(directory)
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    return "".join(r.text for r in stream_generate(model, tokenizer, tokens, n, **options))


def message(content):
    return {"role": "user", "content": content}
