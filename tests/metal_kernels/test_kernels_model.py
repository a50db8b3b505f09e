"""Whole models whose every kernel is executed from its source text."""

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import relative_error
from helpers_metal import KERNELS, by_host, executed
from mlx_lm.utils import dequantize_model

from mlx_qwen3next import generate_step, load, load_model
from mlx_qwen3next.compute import cpu_matmul, proof
from mlx_qwen3next.metal_kernels import kernel
from mlx_qwen3next.model.cache import Round
from mlx_qwen3next.model.packed.packing import pack

pytestmark = pytest.mark.metal

PROMPT = "import os\nimport sys\n\ndef main(argv):\n"
LINEAR, ATTENTION = 3, 1  # layers of the demo model
ROUTED = LINEAR + ATTENTION
OF_PROMPTS = {"choose", "combine"}  # launched where rows are many
STACKED = {"expert_gate_up", "expert_down"}
APART = {f"{name}_shared" for name in STACKED}  # where the shared expert is stored otherwise


MIX = {"switch_mlp.down": (32, 5), "switch_mlp": (64, 3), "": (64, 8)}  # the first that fits


def mixed(path, module):
    group_size, bits = next(how for part, how in MIX.items() if part in path)
    return hasattr(module, "to_quantized") and {"group_size": group_size, "bits": bits}


@cache
def demo(bits):
    """The demo model in float32 at 4 bits, as it is stored, in a mix of bits, or unquantized."""
    if bits == 4:
        return pack(load_model(dtype=mx.float32, pack=False))
    model = dequantize_model(load_model(dtype=mx.float32, pack=False))
    if bits == "mixed":
        nn.quantize(model, class_predicate=mixed)
    model.eval()
    return pack(model)


@cache
def prompt():
    return load()[1].encode(PROMPT)


def tokens(model, mtp):
    steps = generate_step(prompt(), model, max_tokens=7, mtp=mtp)
    return [(step.token, step.from_draft) for step in steps]


@pytest.mark.parametrize("bits", [4, "mixed", 16])
def test_speculation_gives_the_same_tokens(bits):
    expected = tokens(demo(bits), 3)
    with executed() as launches:
        assert tokens(demo(bits), 3) == expected
    used = {of.name for of in KERNELS}
    # Rounds follow each other: no plain step, and no replay but in the next round's launch.
    assert launches.keys() == used - {"gated_delta_replay"} - OF_PROMPTS - (
        STACKED if bits == "mixed" else APART
    )
    assert len({from_draft for _, from_draft in expected}) == 2


def test_plain_decoding_gives_the_same_tokens():
    expected = tokens(demo(4), "off")
    with executed(build="fma", sums="sequential", jitter=True) as launches:
        assert tokens(demo(4), "off") == expected
    assert launches["gated_delta_step"] % LINEAR == 0
    assert launches["expert_down"] * LINEAR == launches["gated_delta_step"] * ROUTED


def test_launches_of_a_step():
    model = demo(4)
    cache = model.make_cache()
    mx.eval(model(mx.array([prompt()]), cache))
    with executed() as launches:
        mx.eval(model(mx.array([[5]]), cache))
    assert launches == {
        "rms_norm": ROUTED + 1,  # before a layer, and the last
        "gated_delta_step": LINEAR,
        "attention_heads": ATTENTION,
        "attention_gate": ATTENTION,
        "add_rms_norm": ROUTED,
        "router": ROUTED,
        "expert_gate_up": ROUTED,
        "expert_down": ROUTED,
    }


@pytest.mark.parametrize("keep", [0, 1, 3, 4])
def test_a_round_and_what_follows(keep):
    """Whether the next forward replays, or the cache is settled for others, bit for bit."""
    model = demo(4)
    after = {}
    for settled in (False, True):
        cache = model.make_cache()
        mx.eval(model(mx.array([prompt()]), cache))
        with executed() as launches:
            with Round(cache, 4) as last:
                mx.eval(model(mx.array([[7, 8, 9, 10]]), cache))
                last.commit(keep)
            if settled:
                [c.state for c in cache]
            logits = model(mx.array([[11]]), cache)
            mx.eval(logits, [c.state for c in cache])
        after[settled] = logits
        assert launches["gated_delta_replay"] == (LINEAR if settled and keep else 0)
    assert mx.array_equal(after[False], after[True]).item()

    cache = model.make_cache()
    mx.eval(model(mx.array([prompt()]), cache))
    for token in [7, 8, 9, 10][:keep]:
        model(mx.array([[token]]), cache)
    assert relative_error(after[True], model(mx.array([[11]]), cache)) < 1e-5


@pytest.mark.parametrize("length", [17, 64, 100])
def test_a_prompt(length):
    """Longer than a step's chunk in threadgroup memory, and than the experts' kernels take."""
    model, text = demo(4), mx.array([[*range(length)]])
    expected, cache, theirs = model(text), model.make_cache(), model.make_cache()
    model(text, theirs)
    with executed() as launches:
        assert relative_error(model(text, cache), expected) < 1e-5
    assert (launches["gated_delta_step"], launches["router"]) == (LINEAR, 0)
    assert launches["choose"] == launches["combine"] == ROUTED
    for ours, other in zip(cache[:LINEAR], theirs[:LINEAR], strict=True):
        assert relative_error(ours.cache[1], other.cache[1]) < 1e-5


def test_a_ragged_batch():
    model = demo(4)
    rows = mx.array([[0, 0, 0, *range(20, 30)], [*range(40, 53)]])

    def decoded():
        cache = model.make_cache(left_padding=[3, 0])
        model(rows, cache)
        return [model(mx.array([[5], [6]]), cache), model(mx.array([[7, 8], [9, 10]]), cache)]

    expected = decoded()
    with executed() as launches:
        for ours, theirs in zip(decoded(), expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5
    assert launches["gated_delta_step"] == 3 * LINEAR  # 13 tokens fit into one, too


def test_in_bfloat16():
    """As on a GPU by default. Twice the composition's own error is the bound."""
    text = mx.array([prompt()])

    def logits(model):
        cache = model.make_cache()
        model(text[:, :-8], cache)
        steps = [model(text[:, i : i + 1], cache) for i in range(-8, -1)]
        return mx.concatenate(steps, axis=1).astype(mx.float32)

    exact, model = logits(demo(4)), load_model(dtype=mx.bfloat16)
    plain = relative_error(logits(model), exact)
    with executed() as launches:
        ours = relative_error(logits(model), exact)
    assert launches["expert_down"] >= 7 * ROUTED
    assert ours <= 2 * plain < 0.1


@by_host
def test_the_check_finds_nothing():
    """Steps and rounds after each other, with races, bounds and initial values checked."""
    model = demo(4)
    cache = model.make_cache()
    mx.eval(model(mx.array([prompt()]), cache))
    with executed(build="check", order=4) as launches:
        mx.eval(model(mx.array([[5]]), cache), [c.state for c in cache])
        for _ in range(2):
            with Round(cache, 3) as last:
                mx.eval(model(mx.array([[7, 8, 9]]), cache))
                last.commit(2)
        mx.eval(model(mx.array([[5]]), cache))
        with Round(cache, 2) as last:
            mx.eval(model(mx.array([[7, 8]]), cache))
            last.commit(1)
        mx.eval([c.state for c in cache])
    assert launches.keys() == {of.name for of in KERNELS} - OF_PROMPTS - APART


def test_a_model_whose_weights_are_turned_around(monkeypatch):
    """Loaded for the CPU, then used on a GPU: no kernel for its experts, all the others."""
    monkeypatch.setattr(cpu_matmul, "_measure", lambda bits: 2.0)
    model = load_model(dtype=mx.float32)
    expected = tokens(model, 3)
    with executed() as launches:
        assert tokens(model, 3) == expected
    experts = {"router"} | STACKED | APART | OF_PROMPTS
    assert launches.keys() == {of.name for of in KERNELS} - experts - {"gated_delta_replay"}


def test_a_mistake_would_be_found(monkeypatch):
    """The executions above run the text of the .metal files, nothing else."""
    text = kernel.text

    def spoilt(family):
        return text(family).replace("total / H", "total / (H + 1)")

    model, token = demo(4), mx.array([[5]])
    expected = model(token)
    monkeypatch.setattr(kernel, "text", spoilt)
    kernel.compiled.cache_clear()
    try:
        with executed():
            assert relative_error(model(token), expected) > 1e-3
    finally:
        kernel.compiled.cache_clear()


@by_host
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_every_proof_succeeds(dtype, monkeypatch, caplog):
    """In "auto", on the model's own arguments; as if kernels took half the time."""
    model = pack(load_model(dtype=dtype, pack=False))
    proof._findings.cache_clear()
    monkeypatch.setattr(proof, "_time", lambda form, *_: 2.0 - (form.__name__ == "kernel"))
    with executed() as launches:
        proof.set_kernels("auto")
        steps = list(generate_step(prompt() * 2, model, max_tokens=8, mtp=3))
        findings = proof.findings()
    proof._findings.cache_clear()
    assert len(steps) == 8 and caplog.messages == []
    assert all(finding.used for finding in findings.values())
    kinds = {key.split()[0] for key in findings}
    assert kinds >= {"rms_norm", "gated_delta_step", "attention_heads", "sparse_experts"}
    assert kinds >= OF_PROMPTS
    assert any("round replay" in key for key in findings)
    assert launches["expert_down"] > len(findings)
