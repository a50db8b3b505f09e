"""The DFlash drafter: against its authors' implementation, through the loop, and its loading."""

import json
import shutil
from functools import partial

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import GOLDENS, relative_error
from helpers_generate import PROMPT, forced, golden, tokens_of

from mlx_qwen3next import generate_step, load_model
from mlx_qwen3next.decoding.drafters import speculation
from mlx_qwen3next.decoding.drafters.dflash import DFlashDrafter
from mlx_qwen3next.decoding.speculative import forward
from mlx_qwen3next.generate import main
from mlx_qwen3next.model.dflash import DFlashConfig, spread_layers
from mlx_qwen3next.prompt_cache.store import PromptCache

DRAFTER = GOLDENS / "dflash"
BLOCK = 6


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDENS / "base", dtype=mx.float32, draft_model=DRAFTER)


@pytest.fixture(scope="module")
def expected():
    return mx.load(str(DRAFTER / "expected.safetensors"))


def recorded(model, drafter, point, depth=BLOCK - 1):
    """The logits of drafts after tokens[:point + 1], whose last is not read yet, and them."""
    tokens = golden("base")[1]["tokens"].astype(mx.uint32)
    logits = []

    def choose(row, drafts):
        logits.append(row[0])
        return row.argmax(-1).astype(mx.uint32)

    drafts = drafter.propose(tokens[point : point + 1], depth, choose)
    return mx.stack(logits), mx.concatenate(drafts)


def recorded_drafters(monkeypatch):
    """The DFlash drafters that are made from now on."""
    made = []

    def drafter(*given):
        made.append(DFlashDrafter(*given))
        return made[-1]

    monkeypatch.setattr(speculation, "DFlashDrafter", drafter)
    return made


# --- against the reference -----------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_drafts_are_the_references(model, expected, chunk):
    """With the trunk's own states, however many come at once, at each point in turn."""
    tokens = golden("base")[1]["tokens"].astype(mx.uint32)
    drafter, cache, read = DFlashDrafter(model), model.make_cache(), 0
    for i, point in enumerate(expected["points"].tolist()):
        while read < point:
            piece = tokens[read : min(read + chunk, point)]
            _, states = forward(model, cache, piece, [drafter])
            drafter.committed(piece, states)
            read += piece.size
        logits, drafts = recorded(model, drafter, point)
        assert relative_error(logits, expected["logits"][i]) < 1e-4
        assert drafts.tolist() == expected["logits"][i].argmax(-1).tolist()


def test_fewer_drafts_are_the_first_of_a_whole_block(model, expected):
    tokens = golden("base")[1]["tokens"].astype(mx.uint32)[: expected["points"][3].item()]
    drafter = DFlashDrafter(model)
    drafter.committed(tokens, forward(model, model.make_cache(), tokens, [drafter])[1])
    for depth in (1, 3):
        logits, _ = recorded(model, drafter, tokens.size, depth)
        assert relative_error(logits, expected["logits"][3, :depth]) < 1e-4


def test_the_layers_that_a_drafter_reads_where_none_are_named():
    """As the reference's build_target_layer_ids spreads them."""
    assert spread_layers(48, 8) == [1, 7, 14, 20, 26, 32, 39, 45]
    assert spread_layers(48, 5) == [1, 12, 23, 34, 45]
    assert spread_layers(36, 1) == [18]


# --- through the loop ----------------------------------------------------------------------------
@pytest.mark.parametrize("mtp", [1, 3, 5, 8])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_drafts_change_no_token(model, mtp, temp):
    prompt = golden("base")[1]["tokens"][:PROMPT].tolist()

    def steps(mtp):
        mx.random.seed(3)
        return list(generate_step(prompt, model, max_tokens=16, mtp=mtp, temp=temp))

    drafted = steps(mtp)
    assert tokens_of(drafted) == tokens_of(steps("off"))
    assert {step.drafted for step in drafted} >= {min(mtp, BLOCK - 1)}


def sometimes_forced(script):
    """A logits processor that says the script, for drafts too, but at every fourth position."""
    force = forced(script, PROMPT)

    def processor(tokens, logits):
        return logits if len(tokens) % 4 == 0 else force(tokens, logits)

    return processor


@pytest.mark.parametrize("mtp", [2, 5])
def test_after_right_and_wrong_drafts_it_knows_the_sequence(model, monkeypatch, mtp):
    """Its keys and values are those of a drafter that was told of the sequence at once."""
    prompt = golden("base")[1]["tokens"][:PROMPT].tolist()
    script = [7, 7, 19, 3, 42, 8, 8, 11] * 4
    made = recorded_drafters(monkeypatch)
    steps = list(
        generate_step(
            *(prompt, model),
            max_tokens=30,
            mtp=mtp,
            logits_processors=[sometimes_forced(script)],
        )
    )
    right = [step.from_draft for step in steps]
    assert 8 < sum(right) < 24
    tokens = mx.array(prompt + tokens_of(steps), mx.uint32)
    plain = DFlashDrafter(model)
    plain.committed(tokens, forward(model, model.make_cache(), tokens, [plain])[1])
    plain.settle()
    made[0].settle()
    for one, other in zip(made[0]._cache, plain._cache, strict=True):
        assert one.offset == other.offset == tokens.size
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            assert relative_error(x[..., : tokens.size, :], y[..., : tokens.size, :]) < 1e-5


@pytest.mark.parametrize("known", ["a cache", "a prompt cache"])
def test_it_begins_where_a_known_text_ends(model, monkeypatch, known):
    """Of the known tokens it has no states; the others are at their own positions."""
    tokens = golden("base")[1]["tokens"].tolist()
    first, second = tokens[:60], tokens[60:90]
    made = recorded_drafters(monkeypatch)
    run = partial(generate_step, model=model, max_tokens=12)
    if known == "a cache":
        cache = model.make_cache()
        before = tokens_of(run(first, prompt_cache=cache, mtp=3))
        answer = tokens_of(run(second, prompt_cache=cache, mtp=3))
    else:
        store = PromptCache(max_bytes=10**9)
        before = tokens_of(run(first, prompt_cache=store, mtp=3))
        whole = [*first, *before, *second]
        answer = tokens_of(run(whole, prompt_cache=store, mtp=3))
    assert answer == tokens_of(run([*first, *before, *second], mtp="off"))
    text = mx.array([*first, *before, *second, *answer], mx.uint32)
    whole = DFlashDrafter(model)
    whole.committed(text, forward(model, model.make_cache(), text, [whole])[1])
    held = made[1]._before
    assert len(first) <= held <= len(first) + len(before)
    made[1].settle()
    keys, all_keys = made[1]._cache[0].keys, whole._cache[0].keys
    n = text.size - held
    assert relative_error(keys[..., :n, :], all_keys[..., held : held + n, :]) < 1e-5


# --- loading -------------------------------------------------------------------------------------
def spoiled(directory, change=lambda weights: None, **config):
    """A copy of the drafter with other weights, or another config."""
    raw = json.loads((DRAFTER / "config.json").read_text()) | config
    weights = mx.load(str(DRAFTER / "model.safetensors"))
    change(weights)
    return checkpoints.write(directory, raw, {"model.safetensors": weights})


def test_four_bits(model, tmp_path):
    """A drafter that MLX has quantized drafts as its dequantized weights do."""
    quantized = load_model(GOLDENS / "base", dtype=mx.float32, draft_model=DRAFTER).dflash
    nn.quantize(quantized, group_size=32, bits=4)
    shutil.copyfile(DRAFTER / "config.json", tmp_path / "config.json")
    quantized.save_weights(str(tmp_path / "model.safetensors"))
    loaded = load_model(GOLDENS / "base", dtype=mx.float32, draft_model=tmp_path)
    assert loaded.dflash.fc.bits == 4

    def whole(weights):
        for path, module in quantized.named_modules():
            if hasattr(module, "bits"):
                parts = module.weight, module.scales, module.biases
                weights[f"{path}.weight"] = mx.dequantize(*parts, 32, 4)

    reference = load_model(
        GOLDENS / "base", dtype=mx.float32, draft_model=spoiled(tmp_path / "whole", whole)
    )
    results = []
    for target in (loaded, reference):
        drafter, tokens = DFlashDrafter(target), golden("base")[1]["tokens"][:20]
        tokens = tokens.astype(mx.uint32)
        drafter.committed(tokens, forward(target, target.make_cache(), tokens, [drafter])[1])
        results.append(recorded(target, drafter, 20)[0])
    assert relative_error(*results) < 1e-4


def test_weights_have_the_models_dtype_and_norms_are_float32():
    dflash = load_model(GOLDENS / "base", dtype=mx.bfloat16, draft_model=DRAFTER).dflash
    dtypes = {name: x.dtype for name, x in checkpoints.parameters(dflash).items()}
    assert {mx.float32 if "norm" in name else mx.bfloat16 for name in dtypes} == {*dtypes.values()}
    assert all((dtype == mx.float32) == ("norm" in name) for name, dtype in dtypes.items())


def test_the_models_own_parameters_are_without_the_drafters(model):
    assert checkpoints.parameters(model).keys() == checkpoints.parameters(golden("base")[0]).keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 96}, "drafts for another model: hidden_size is 96, .* has 64"),
        ({"vocab_size": 100}, "drafts for another model: vocab_size is 100"),
        ({"num_target_layers": 5}, "drafts for another model: num_target_layers is 5"),
        ({"dflash_config": None}, "this is no DFlash drafter: the config lacks dflash_config"),
        ({"dflash_config": {"mask_token_id": 96}}, "mask_token_id must be a token id, got 96"),
        ({"dflash_config": {"mask_token_id": 0, "target_layer_ids": [3]}}, "target_layer_ids must"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has others than full_attention"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'; a DFlash"),
        ({"block_size": 1}, "block_size must be at least 2, got 1"),
        ({"attention_bias": True}, "attention_bias is true"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said) as caught:
        load_model(GOLDENS / "base", draft_model=spoiled(tmp_path / "drafter", **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("fc.weight"), "the tensor fc.weight is missing"),
        (lambda w: w.update(fc=mx.ones(3)), "the tensor fc has no place in it"),
        (lambda w: w.update({"norm.weight": mx.ones(3)}), r"norm.weight has shape \[3\]"),
        (lambda w: w.update({"norm.weight": mx.full(64, mx.nan)}), "norm.weight holds NaN"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        load_model(GOLDENS / "base", draft_model=spoiled(tmp_path / "drafter", change))


def test_a_head_and_a_drafter_exclude_each_other():
    with pytest.raises(ValueError, match="mtp_from and draft_model exclude each other"):
        load_model(GOLDENS / "base", draft_model=DRAFTER, mtp_from=GOLDENS / "base")


def test_the_command(call, monkeypatch, tmp_path):
    seen = []

    def load(*args, **options):
        seen.append(options)
        raise ValueError("seen")

    monkeypatch.setattr("mlx_qwen3next.terminal.load", load)
    assert call(main, "--draft-model", "owner/drafter") == (2, "", "error: seen\n")
    assert seen[0]["draft_model"] == "owner/drafter"
    monkeypatch.undo()
    status, out, err = call(main, "--draft-model", DRAFTER)
    assert (status, out) == (2, "") and "drafts for another model" in err and err.count("\n") == 1


def test_the_config_of_the_golden():
    config = DFlashConfig.from_file(DRAFTER / "config.json")
    assert (config.block_size, config.mask_token_id, config.rope_theta) == (BLOCK, 95, 1000.0)
