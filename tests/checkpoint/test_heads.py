"""The MTP head of another checkpoint, at loading and beside a converted model."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import mlx.core as mx
import pytest
from helpers_generate import PROMPT, endless, tokens_of

from mlx_qwen3next import generate, generate_step, load, load_model
from mlx_qwen3next.cli import fingerprint_of, load_options
from mlx_qwen3next.convert import convert
from mlx_qwen3next.generate import main, parser
from mlx_qwen3next.server import command

# Coder-Next's differs from Instruct's in rope_theta.
SISTER = checkpoints.config("base") | {"rope_theta": 100.0}


@pytest.fixture
def coder(tmp_path):
    """`base` without its head, in 4 bits as mlx-lm converts it."""
    return checkpoints.convert(tmp_path / "coder", group_size=32, bits=4)


def sister(directory, config=SISTER, change=lambda trunk, head: None):
    """A published checkpoint, `base` with another config, in two shards, the head in the last."""
    trunk, head = checkpoints.split(checkpoints.tensors("base"))
    change(trunk, head)
    files = {"model-00001-of-00002.safetensors": trunk, "model-00002-of-00002.safetensors": head}
    return checkpoints.write(directory, config, files, index=True)


def outputs(model):
    """The head's, at several positions, independent of the trunk's embedding."""
    mx.random.seed(0)
    hidden, tokens = mx.random.normal((1, 9, 64)), mx.arange(9)[None]
    head = model.mtp
    head.embed = lambda tokens: mx.broadcast_to(tokens[..., None] / 9, (1, 9, 64))
    return head(hidden, tokens)


def assert_same_head(model, reference):
    result, expected = (checkpoints.parameters(m.mtp) for m in (model, reference))
    assert result.keys() == expected.keys()
    assert all(mx.array_equal(result[name], array) for name, array in expected.items())
    assert mx.array_equal(outputs(model), outputs(reference))


def shards_fetched(hub):
    """Names of the weight files that were asked for."""
    paths = [r.path for r in hub.requests if r.method == "GET"]
    return {Path(path).name for path in paths if path.endswith(".safetensors")}


# --- loading -------------------------------------------------------------------------------------
def test_a_sisters_head_is_loaded_as_in_its_own_model(coder, tmp_path):
    """It keeps its own rope_theta, and is not packed with the trunk's."""
    directory = sister(tmp_path / "sister")
    model = load_model(coder, dtype=mx.float32, mtp_from=directory)
    own = load_model(directory, dtype=mx.float32)
    assert_same_head(model, own)
    assert model.args.rope_theta == checkpoints.config("base")["rope_theta"]
    other = load_model(checkpoints.GOLDENS / "base", dtype=mx.float32)
    assert checkpoints.relative_error(outputs(other), outputs(own)) > 1e-3  # rope_theta matters


def test_a_sisters_head_has_the_trunks_scaling(coder, tmp_path):
    """And not its own config's: positions are the same in both."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    directory = sister(tmp_path / "sister")
    scaled = sister(tmp_path / "scaled", SISTER | {"rope_scaling": yarn})
    own = load_model(directory, dtype=mx.float32)
    for head in directory, scaled:
        assert_same_head(load_model(coder, dtype=mx.float32, mtp_from=head), own)
    model, own = (
        load_model(trunk, dtype=mx.float32, mtp_from=head, rope_scaling=yarn)
        for trunk, head in ((coder, directory), (directory, None))
    )
    assert model.mtp.layers[0].self_attn.rope.scaling == model.args.rope_scaling
    assert_same_head(model, own)


def test_of_a_local_sister_only_the_heads_shard_need_be_there(coder, tmp_path):
    directory = sister(tmp_path / "sister")
    whole = load_model(coder, mtp_from=directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    assert_same_head(load_model(coder, mtp_from=directory), whole)


@pytest.mark.parametrize("form", ["published", "converted", "single"])
def test_of_a_repository_only_the_heads_files_are_fetched(hub, coder, tmp_path, form):
    directory = sister(tmp_path / "sister")
    files = {"model-00002-of-00002.safetensors"}
    if form == "converted":
        convert(str(directory), str(tmp_path / "converted"), quantize=True, q_group_size=32)
        directory, files = tmp_path / "converted", {"mtp.safetensors"}
    elif form == "single":
        weights = {"model.safetensors": checkpoints.tensors("base")}
        directory = checkpoints.write(tmp_path / "single", SISTER, weights)
        files = {"model.safetensors"}
    hub.add("Qwen/Sister", directory)
    assert_same_head(load_model(coder, mtp_from="Qwen/Sister"), load_model(directory))
    assert shards_fetched(hub) == files


def test_a_dense_head_keeps_its_layout_beside_a_converted_trunk(tmp_path):
    """Nothing in the head's tensors shows whether its norms are zero-centred."""
    golden = checkpoints.GOLDENS / "dense"
    trunk, _ = checkpoints.split(checkpoints.tensors("dense"))
    checkpoints.write(tmp_path / "hub", checkpoints.config("dense"), {"model.safetensors": trunk})
    convert(str(tmp_path / "hub"), str(tmp_path / "trunk"))
    model = load_model(tmp_path / "trunk", dtype=mx.float32, mtp_from=golden)
    reference = load_model(golden, dtype=mx.float32)
    assert mx.array_equal(model.mtp.norm.weight, reference.mtp.norm.weight)


# --- exactness -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """(the narrow model without its head, a spoiled copy of it with one)."""
    folder = tmp_path_factory.mktemp("narrow")
    for name in ("trunk", "sister"):
        endless(folder / name)
    (folder / "trunk" / "mtp.safetensors").unlink()
    file = folder / "sister" / "mtp.safetensors"
    head, metadata = mx.load(str(file), return_metadata=True)
    head["mtp.norm.weight"] = head["mtp.norm.weight"] * mx.where(mx.arange(32) % 6, 1, -1)
    mx.save_safetensors(str(file), head, metadata)
    return folder / "trunk", folder / "sister"


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_a_mismatched_head_changes_no_token(narrow, temp):
    trunk, other = narrow
    plain = load_model(trunk, dtype=mx.float32)
    model = load_model(trunk, dtype=mx.float32, mtp_from=other)
    prompt = list(range(300, 300 + PROMPT))

    def steps(model, mtp):
        mx.random.seed(5)
        return list(generate_step(prompt, model, max_tokens=40, mtp=mtp, temp=temp))

    drafted = steps(model, 3)
    assert tokens_of(drafted) == tokens_of(steps(plain, "off"))
    assert 0 < sum(step.from_draft for step in drafted) < 25  # some are right, some wrong


# --- refusals ------------------------------------------------------------------------------------
def test_a_model_with_a_head_takes_no_other(tmp_path):
    directory = sister(tmp_path / "sister")
    with pytest.raises(ValueError, match="has an MTP head of its own; mtp_from is for models wi"):
        load_model(directory, mtp_from=checkpoints.GOLDENS / "base")


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 97), ("hidden_size", 96), ("num_key_value_heads", 1), ("num_experts", 9)],
)
def test_a_head_that_does_not_fit_is_refused(coder, tmp_path, key, value):
    directory = sister(tmp_path / "sister", SISTER | {key: value})
    ours = SISTER[key]
    message = f"does not fit this model: {key} is {value} there, {ours} here"
    with pytest.raises(ValueError, match=message):
        load_model(coder, mtp_from=directory)
    with pytest.raises(ValueError, match=message):
        convert(str(directory), str(coder), attach_mtp=True, any_trunk=True)


def spoil_shape(trunk, head):
    head["mtp.fc.weight"] = head["mtp.fc.weight"][:, 1:]


def spoil_values(trunk, head):
    head["mtp.fc.weight"] = head["mtp.fc.weight"] * mx.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda trunk, head: head.clear(), r"sister has no MTP head \(no tensor named mtp\.\*\)"),
        (lambda trunk, head: head.pop("mtp.fc.weight"), "sister: the tensor mtp.fc.weight is miss"),
        (spoil_shape, r"mtp\.fc\.weight has shape \[64, 127\]"),
        (spoil_values, "mtp.fc.weight holds NaN"),
        (lambda trunk, head: head.update({"mtp.x.weight": mx.ones(3)}), "mtp.x.weight has no"),
    ],
)
def test_a_damaged_head_is_refused(coder, tmp_path, change, said):
    directory = sister(tmp_path / "sister", change=change)
    with pytest.raises(ValueError, match=said) as caught:
        load_model(coder, mtp_from=directory)
    assert "\n" not in str(caught.value)


def test_an_fp8_head_is_refused_with_the_way_out(coder, tmp_path):
    directory = checkpoints.write_fp8(tmp_path / "fp8", "base", mx.float32)
    with pytest.raises(ValueError, match=r"mtp\..* is FP8, .* convert it first"):
        load_model(coder, mtp_from=directory)


def test_a_wrong_sister_is_refused_before_the_model_is_fetched(hub, coder):
    hub.add("me/coder", coder)
    hub.add("me/none", coder)
    with pytest.raises(ValueError, match="me/none has no MTP head"):
        load_model("me/coder", mtp_from="me/none")
    with pytest.raises(ValueError, match="me/missing"):
        load_model("me/coder", mtp_from="me/missing")
    assert shards_fetched(hub) == set()


# --- the commands --------------------------------------------------------------------------------
def test_the_commands_pass_the_sister_on(call, narrow, monkeypatch):
    trunk, other = narrow
    flags = ("--model", trunk, "-p", "x", "-m", 30, "--mtp", 2, "--verbose", "F")
    run = partial(call, main, *flags)
    status, out, err = run("--mtp-from", other)
    assert (status, err) == (0, "")
    model, tokenizer = load(trunk, mtp_from=other)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True
    )
    assert out[:-1] == generate(model, tokenizer, prompt, max_tokens=30, mtp="off")
    assert run("--mtp-from", trunk)[::2] == (
        2,
        f"error: {trunk} has no MTP head (no tensor named mtp.*)\n",
    )

    calls, loaded = [], (SimpleNamespace(streamed=None), 0)
    monkeypatch.setattr(command, "load", lambda *args, **options: calls.append(options) or loaded)
    monkeypatch.setattr(command, "prepare", lambda *args, **options: None)
    args = command.parser().parse_args(["--mtp-from", "owner/sister"])
    command._load(args, None, load_options(args, 1))
    assert calls[0]["mtp_from"] == "owner/sister"


def test_prompt_caches_with_other_heads_are_told_apart(narrow, tmp_path):
    """Two heads of the same shapes, too: a cache holds the head's keys and values."""
    trunk, other = narrow

    def of(*given):
        return fingerprint_of(parser().parse_args(["--model", str(trunk), *map(str, given)]))

    own = endless(tmp_path / "own")
    assert len({of(), of("--mtp-from", other), of("--mtp-from", own)}) == 3
    assert of("--mtp-from", other) == of("--mtp-from", other)


# --- beside a converted model --------------------------------------------------------------------
def test_attached_to_any_trunk_it_computes_with_its_own_config(coder, tmp_path, capsys):
    directory = sister(tmp_path / "sister")
    with pytest.raises(ValueError, match=r"rope_theta is .*; --any-trunk attaches it all the same"):
        convert(str(directory), str(coder), attach_mtp=True)
    convert(str(directory), str(coder), attach_mtp=True, any_trunk=True, mtp_bits=16)
    assert "drafts are less often right" in capsys.readouterr().err
    assert_same_head(load_model(coder, dtype=mx.float32), load_model(directory, dtype=mx.float32))

    # The head's config survives another conversion, and another attachment.
    convert(str(coder), str(tmp_path / "whole"), dequantize=True)
    again = load_model(tmp_path / "whole", dtype=mx.float32)
    assert mx.array_equal(outputs(again), outputs(load_model(directory, dtype=mx.float32)))
    bare = checkpoints.convert(tmp_path / "bare")
    from_attached = load_model(bare, dtype=mx.float32, mtp_from=tmp_path / "whole")
    assert mx.array_equal(outputs(from_attached), outputs(again))


def test_any_trunk_needs_attach_mtp(refusal):
    message = refusal(checkpoints.GOLDENS / "base", any_trunk=True)
    assert message == "--any-trunk needs --attach-mtp"


def test_a_heads_unusable_config_is_refused(coder, tmp_path):
    directory = sister(tmp_path / "sister")
    convert(str(directory), str(coder), attach_mtp=True, any_trunk=True)
    head, metadata = mx.load(str(coder / "mtp.safetensors"), return_metadata=True)
    mark = json.loads(metadata["mlx_qwen3next"])
    mark["head_config"]["vocab_size"] = "many"
    mx.save_safetensors(
        str(coder / "mtp.safetensors"), head, metadata | {"mlx_qwen3next": json.dumps(mark)}
    )
    with pytest.raises(ValueError, match=r"mtp\.safetensors: head_config .* vocab_size"):
        load_model(coder)
