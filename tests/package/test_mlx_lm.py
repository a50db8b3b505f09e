"""mlx-lm's own tools on our model: its generators, batching, caches, perplexity and LoRA."""

import math
import shutil
import types

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from float64 import relative_error
from helpers_generate import (
    GOLDENS,
    arrays,
    bundled,
    float32,
    forced,
    forward_cache,
    golden,
    golden_tokens,
    greedy,
    predictable_at_4_bits,
    same,
    tokens_of,
)
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import batch_generate
from mlx_lm import stream_generate as mlx_lm_stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.perplexity import eval_ppl
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_qwen3next import generate_step, load_model, stream_generate
from mlx_qwen3next.compute import attention, reference
from mlx_qwen3next.model import gated_delta_net, qwen3_next
from mlx_qwen3next.model.cache import Round, tokens_held
from mlx_qwen3next.model.qwen3_next import DecoderLayer

CASES = ["base", "eps", "dense", "permutation"]
NOISE = 1e-4  # relative, between two right ways to compute the same in float32


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_mlx_lms_own_model(case, tmp_path):
    directory = shutil.copytree(GOLDENS / case, tmp_path / case)
    (directory / "expected.safetensors").unlink()
    theirs, _ = mlx_lm_load_model(float32(directory))
    tokens = golden(case)[1]["tokens"][None]
    assert relative_error(golden(case)[0](tokens), theirs(tokens)) < NOISE


# --- generating ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2048, 4])
@pytest.mark.parametrize("case", CASES)
def test_mlx_lms_stream_generate(case, step):
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    cache = make_prompt_cache(model)
    options = {"max_tokens": 12, "prompt_cache": cache, "prefill_step_size": step}
    responses = list(mlx_lm_stream_generate(model, bundled()[1], prompt, **options))
    assert tokens_of(responses) == expected[:12]
    # Ours goes on from the cache that mlx-lm filled.
    assert tokens_held(cache) == len(prompt) + 12
    assert greedy(model, [expected[12]], 5, prompt_cache=cache) == expected[13:18]


def test_responses_are_mlx_lms():
    model, tokenizer = bundled()
    script = tokenizer.encode("os.path.join(a,\n    b)")
    options = {
        "max_tokens": len(script) + 5,
        "logits_processors": [
            forced([*script, tokenizer.eos_token_id], len(tokenizer.encode("x = ")))
        ],
    }
    ours, theirs = (
        [
            (r.text, r.token, r.prompt_tokens, r.generation_tokens, r.finish_reason)
            for r in function(model, tokenizer, "x = ", **options)
        ]
        for function in (stream_generate, mlx_lm_stream_generate)
    )
    assert ours == theirs


@pytest.mark.parametrize("case", CASES)
def test_batches_of_changing_size(case):
    model, expected = golden(case)
    tokens = expected["tokens"].tolist()
    # (step at which it joins, prompt, tokens to generate)
    requests = [
        (0, tokens[:1], 5),
        (0, tokens[:2], 14),
        (0, tokens[5:42], 9),
        (4, tokens[:10], 11),
        (4, tokens[50:63], 1),
        (9, tokens[:70], 9),
        (9, tokens[3:7], 8),
    ]
    generator = BatchGenerator(
        model, prefill_batch_size=2, completion_batch_size=3, prefill_step_size=8
    )
    responses, step, generated = {}, 0, []
    while len(responses) < len(requests) or generated:
        joining = [request for request in requests if request[0] == step]
        if joining:
            _, prompts, lengths = zip(*joining, strict=True)
            generator.insert([list(prompt) for prompt in prompts], list(lengths))
        generated = generator.next_generated()
        for response in generated:
            responses.setdefault(response.uid, []).append(response)
        step += 1
    for uid, (_, prompt, n) in enumerate(requests):
        alone = list(generate_step(prompt, model, max_tokens=n, mtp="off"))
        assert tokens_of(responses[uid]) == tokens_of(alone)
        logprobs = [mx.stack([s.logprobs for s in steps]) for steps in (responses[uid], alone)]
        assert same([logprobs[0]], [logprobs[1]], NOISE)


@pytest.mark.parametrize("case", CASES)
def test_batch_generate_continues_its_caches(case):
    model, tokens = golden(case)[0], golden(case)[1]["tokens"].tolist()
    prompts, more = (
        [tokens[:10], tokens[20:21], tokens[30:53]],
        [tokens[:1], tokens[5:9], tokens[7:9]],
    )
    lengths = [4, 9, 6]
    options = {"max_tokens": lengths, "return_token_ids": True}
    first = batch_generate(model, bundled()[1], prompts, return_prompt_caches=True, **options)
    second = batch_generate(model, bundled()[1], more, prompt_caches=first.caches, **options)
    for i, n in enumerate(lengths):
        assert first.token_ids[i] == greedy(model, prompts[i], n)
        whole = prompts[i] + first.token_ids[i] + more[i]
        assert second.token_ids[i] == greedy(model, whole, n)


@pytest.mark.parametrize("chunk", [13, 5, 1])
@pytest.mark.parametrize("case", CASES)
def test_left_padded_batch(case, chunk):
    model, tokens = golden(case)[0], golden(case)[1]["tokens"]
    padding, length = [0, 12, 7], 13
    rows = [tokens[10 * i : 10 * i + length - n] for i, n in enumerate(padding)]
    # What stands in the padding must not matter: another row's tokens.
    batch = mx.stack(
        [mx.concatenate([tokens[100 : 100 + n], row]) for n, row in zip(padding, rows, strict=True)]
    )
    cache = model.make_cache(left_padding=padding)
    logits = mx.concatenate(
        [model(batch[:, i : i + chunk], cache) for i in range(0, length, chunk)], axis=1
    )
    for i, n in enumerate(padding):
        assert relative_error(logits[i, n:], model(rows[i][None])[0]) < NOISE


# --- saved caches -------------------------------------------------------------------------------


def of_a_prompt(model, tokens):
    return forward_cache(model, tokens)


def after_a_round(model, tokens):
    """The same sequence, its last tokens kept from a round that drafted more."""
    cache = forward_cache(model, tokens[:-3])
    with Round(cache, 5) as r:
        model.model(mx.array([[*tokens[-3:], 1, 2]]), cache)
        r.commit(3)
    return cache


@pytest.mark.parametrize("make", [of_a_prompt, after_a_round])
@pytest.mark.parametrize("case", CASES)
def test_saved_cache_continues(case, make, tmp_path):
    model, expected = golden(case)
    tokens = expected["tokens"].tolist()
    file = str(tmp_path / "cache.safetensors")
    cache = make(model, tokens[:37])
    save_prompt_cache(file, cache, {"model": case})
    loaded, metadata = load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": case}
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    assert same(arrays(loaded), arrays(cache))
    rest = mx.array([tokens[37:60]])
    logits = model(rest, loaded)
    assert mx.array_equal(logits, model(rest, cache))
    assert relative_error(logits[0], expected["logits"][37:60]) < NOISE


# --- perplexity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_perplexity(case, capsys):
    model, expected = golden(case)
    tokens = expected["tokens"]
    # Two rows that begin with the same tokens, so that the expected logits serve for both.
    data = mx.stack([tokens[:64], mx.concatenate([tokens[:63], tokens[80:81]])])
    perplexity, standard_error = eval_ppl(model, data, batch_size=1)
    logits = np.array(expected["logits"][:63], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.stack([logprobs[np.arange(63), np.array(row)[1:]] for row in data])
    assert perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    error = perplexity * losses.std(ddof=1) / math.sqrt(losses.size)
    assert standard_error == pytest.approx(error, rel=1e-4)


# --- training -----------------------------------------------------------------------------------


class Losses:
    """A training callback of mlx-lm's trainer that keeps the losses."""

    def __init__(self):
        self.train, self.validation = [], []

    def on_train_loss_report(self, info):
        self.train.append(info["train_loss"])

    def on_val_loss_report(self, info):
        self.validation.append(info["val_loss"])


class Dataset(list):
    def process(self, tokens):
        return tokens, 0


def fresh(name):
    if name == "4 bits":
        return predictable_at_4_bits()
    return load_model(GOLDENS / name, dtype=mx.float32, pack=False)


def train(model, directory, **changes):
    """Trains with mlx_lm.lora's own function on two sequences; returns the losses."""
    vocabulary = model.args.vocab_size
    data = Dataset([[(i * i + k) % min(vocabulary, 90) for i in range(24)] for k in (3, 4)])
    args = CONFIG_DEFAULTS | {
        "adapter_path": str(directory),
        "num_layers": len(model.layers),
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 10.0},
        "batch_size": 2,
        "iters": 3,
        "learning_rate": 3e-3,
        "steps_per_report": 1,
        "val_batches": 1,
    }
    losses = Losses()
    mx.disable_compile()  # which takes far longer than the few steps, on the CPU
    try:
        train_model(types.SimpleNamespace(**args | changes), model, data, data, losses)
    finally:
        mx.enable_compile()
    model.eval()
    return losses


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("base", {}),
        ("base", {"grad_checkpoint": True}),
        ("dense", {}),
        ("4 bits", {}),
        ("base", {"fine_tune_type": "full"}),
    ],
    ids=["lora", "grad-checkpoint", "dense", "qlora", "full"],
)
def test_fine_tuning(name, changes, tmp_path, monkeypatch):
    # Gradient checkpointing replaces the class's method for good.
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)
    model = fresh(name)
    losses = train(model, tmp_path, **changes)
    assert losses.train[-1] < losses.train[0] - 0.1
    assert losses.validation[-1] < losses.validation[0] - 0.1

    saved = mx.load(str(tmp_path / "adapters.safetensors"))
    parts = {path.split(".", 3)[3] for path in saved}
    if "fine_tune_type" not in changes:
        # Every projection has an adapter, and a gradient has moved it.
        for part in (
            "self_attn.q_proj",
            "self_attn.o_proj",
            "linear_attn.in_proj_qkvz",
            "linear_attn.in_proj_ba",
            "linear_attn.out_proj",
            "mlp.gate",
            "mlp.switch_mlp.gate_proj",
            "mlp.switch_mlp.down_proj",
            "mlp.shared_expert.up_proj",
        ):
            assert f"{part}.lora_b" in parts
        assert all(w.abs().max().item() > 0 for path, w in saved.items() if "lora_b" in path)

    tokens = mx.array([[*range(20)]])
    loaded = fresh(name)
    before = loaded(tokens)
    load_adapters(loaded, str(tmp_path))
    loaded.eval()
    assert mx.array_equal(loaded(tokens), model(tokens))
    assert relative_error(loaded(tokens), before) > 100 * NOISE
    # Trained models generate: the cached forward uses the adapters too.
    cache = forward_cache(loaded, [*range(12)])
    assert relative_error(loaded(tokens[:, 12:], cache), model(tokens)[:, 12:]) < NOISE


def test_fused_adapters_compute_the_same(tmp_path):
    model = fresh("base")
    train(model, tmp_path)
    tokens = mx.array([[*range(20)]])
    expected = model(tokens)
    model.update_modules(
        tree_unflatten(
            [(path, m.fuse()) for path, m in model.named_modules() if hasattr(m, "fuse")]
        )
    )
    assert not any("lora" in path for path, _ in tree_flatten(model.parameters()))
    assert relative_error(model(tokens), expected) < NOISE


def gradients(model, tokens):
    """Gradients of the mean next-token loss, by parameter."""

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))


def route(logits, top_k, normalise):
    """The reference's routing, with gradients through the weights alone."""
    experts, _ = reference.route(mx.stop_gradient(logits), top_k, normalise)
    weights = mx.take_along_axis(mx.softmax(logits, axis=-1), experts, axis=-1)
    return experts, weights / weights.sum(-1, keepdims=True) if normalise else weights


@pytest.mark.parametrize("length", [5, 70])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(case, length, monkeypatch):
    model, expected = load_model(GOLDENS / case, pack=False), golden(case)[1]
    model.mtp = None  # not part of the loss
    tokens = expected["tokens"][None, : length + 1]
    found = gradients(model, tokens)
    monkeypatch.setattr(gated_delta_net, "gated_delta_rule", reference.gated_delta_rule)
    for module in (qwen3_next, attention):
        monkeypatch.setattr(module, "rms_norm", reference.rms_norm)
    monkeypatch.setattr(gated_delta_net, "gated_rms_norm", reference.gated_rms_norm)
    monkeypatch.setattr(gated_delta_net, "l2norm", lambda x, scale=1.0: scale * reference.l2norm(x))
    monkeypatch.setattr(gated_delta_net, "decay", reference.decay)
    monkeypatch.setattr(qwen3_next, "route", route)
    exact = gradients(model, tokens)
    assert exact.keys() == found.keys()
    assert any("in_proj_ba" in path for path in exact)
    for path, gradient in exact.items():
        assert mx.linalg.norm(gradient).item() > 0, path
        assert relative_error(found[path], gradient) < 1e-3, path


@pytest.mark.parametrize(
    "path",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.linear_attn.A_log",
        "model.layers.0.linear_attn.conv1d.weight",
        "model.layers.0.linear_attn.norm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.linear_attn.in_proj_qkvz.weight",
        "model.layers.1.mlp.switch_mlp.down_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ],
)
def test_gradients_are_finite_differences(path):
    model, expected = load_model(GOLDENS / "base", pack=False), golden("base")[1]
    tokens = expected["tokens"][None, :71]
    weight = dict(tree_flatten(model.parameters()))[path]
    gradient = gradients(model, tokens)[path]
    direction = gradient / mx.linalg.norm(gradient)

    def loss(step):
        model.load_weights([(path, weight + step * direction)], strict=False)
        logits = np.array(model(tokens[:, :-1])[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -logprobs[np.arange(70), np.array(tokens[0, 1:])].mean()

    step = 3e-4  # small enough that no token changes its experts
    slope = (loss(step) - loss(-step)) / (2 * step)
    # The absolute part is float32's noise in the losses, divided by the step.
    assert slope == pytest.approx(mx.linalg.norm(gradient).item(), rel=1e-2, abs=2e-3)
