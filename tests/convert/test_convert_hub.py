"""The converter and the hub, over HTTP: streaming, the head alone, reports, uploads."""

import itertools
import json
import os
import shutil
from pathlib import Path

import checkpoints
import mlx.core as mx
import mlx_lm.utils
import pytest
from checkpoints import GOLDENS
from huggingface_hub import snapshot_download

from mlx_qwen3next import load, load_model
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.convert import convert, repository

OPTIONS = {"quantize": True, "q_group_size": 32}
REPO = "Qwen/Tiny-Next"
CARD = "---\nlicense: apache-2.0\n---\n# Tiny\n"


def sharded(directory, case="base", change=None):
    """The golden in four shards, the head in the last; a layer's experts are in two of them."""
    trunk, head = checkpoints.split(checkpoints.tensors(case))
    if change:
        change(trunk)
    names = sorted(trunk)
    third = len(names) // 3
    parts = [names[:third], names[third : 2 * third], names[2 * third :]]
    shards = [*({name: trunk[name] for name in part} for part in parts), head]
    files = {f"model-{i:05}-of-00004.safetensors": shard for i, shard in enumerate(shards, 1)}
    checkpoints.write(directory, checkpoints.config(case), files, index=True)
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture
def repo(hub, tmp_path):
    """(hub, the published directory)."""
    directory = sharded(tmp_path / "published")
    hub.add(REPO, directory)
    return hub, directory


def tensors(directory):
    return {
        f"{file.name}:{name}": array
        for file in directory.glob("*.safetensors")
        for name, array in mx.load(str(file)).items()
    }


def assert_same(result, reference):
    assert result.keys() == reference.keys()
    for name, array in reference.items():
        assert result[name].dtype == array.dtype and mx.array_equal(result[name], array), name


def shards_fetched(hub):
    """Names of the weight files that were sent as a whole, in order."""
    whole = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    return [Path(r.path).name for r in whole if r.range is None or r.range == "bytes=0-"]


# --- a repository as the source ------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_a_repository_gives_what_its_directory_gives(repo, tmp_path, stream):
    hub, directory = repo
    convert(str(directory), str(tmp_path / "local"), **OPTIONS)
    convert(REPO, str(tmp_path / "out"), stream=stream, **OPTIONS)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "local"))
    card = (tmp_path / "out/README.md").read_text()
    assert f"base_model: {REPO}" in card and "license: apache-2.0" in card
    assert hub.add(REPO, directory) in card
    assert len(shards_fetched(hub)) == 4
    cached = list((tmp_path / "huggingface").rglob("model-*.safetensors"))
    assert len(cached) == (0 if stream else 4)
    assert not list((tmp_path / "out").rglob("*source*"))


def test_streaming_keeps_one_file_at_a_time(repo, tmp_path, monkeypatch):
    """But where a piece needs rows of two; nothing is fetched twice."""
    hub, _ = repo
    most = []
    unlink = Path.unlink

    def counted(path, **arguments):
        if path.parent.name == "source" and path.exists():
            most.append(len(list(path.parent.glob("model-*.safetensors"))))
        return unlink(path, **arguments)

    monkeypatch.setattr(Path, "unlink", counted)
    monkeypatch.setattr("mlx_qwen3next.convert.weights._CHUNK", 1)
    monkeypatch.setattr("mlx_qwen3next.convert.weights._BATCH", 1)
    convert(REPO, str(tmp_path / "out"), stream=True, **OPTIONS)
    assert most == [1, 1, 1, 1]
    assert len(shards_fetched(hub)) == 4


def test_streaming_goes_on_where_it_was(repo, tmp_path, monkeypatch):
    hub, directory = repo
    convert(str(directory), str(tmp_path / "whole/out"), **OPTIONS)
    fetch = repository.hf_hub_download

    def broken(repo, name, **arguments):
        if "00003" in name:
            raise ConnectionError("the network is down")
        return fetch(repo, name, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(repository, "hf_hub_download", broken)
        with pytest.raises(ValueError, match=f"{REPO}.*cannot be fetched: the network is down"):
            convert(REPO, str(tmp_path / "out"), stream=True, **OPTIONS)
    assert not (tmp_path / "out").exists()
    before = shards_fetched(hub)
    hub.requests.clear()
    convert(REPO, str(tmp_path / "out"), stream=True, **OPTIONS)
    assert "model-00001-of-00004.safetensors" in before
    assert "model-00001-of-00004.safetensors" not in shards_fetched(hub)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole/out"))


def test_verifying_what_was_streamed(repo, tmp_path, capsys):
    """Fetches all again, and leaves nothing of it."""
    hub, _ = repo
    convert(REPO, str(tmp_path / "out"), stream=True, verify=True, **OPTIONS)
    assert len(shards_fetched(hub)) == 8
    report = capsys.readouterr().out
    assert "in_proj_qkvz" in report and "logits are not compared with --stream" in report
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_arrives_altered_is_refused(repo, tmp_path, stream):
    hub, _ = repo
    hub.alter("model-00002-of-00004.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00004.safetensors arrived altered"):
        convert(REPO, str(tmp_path / "out"), stream=stream, **OPTIONS)
    kept = [*tmp_path.glob("huggingface/**/*"), *(tmp_path / "out.partial").rglob("*")]
    assert not [file for file in kept if file.name == "model-00002-of-00004.safetensors"]


def test_everything_is_checked_before_the_first_shard(repo, tmp_path, monkeypatch):
    """Missing tensors, full disks, foreign outputs: found by headers, not after 160 GB."""
    hub, _ = repo
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="foreign"):
        convert(REPO, str(tmp_path / "foreign"), **OPTIONS)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match="more on disk"):
            convert(REPO, str(tmp_path / "out"), stream=True, **OPTIONS)
    lacking = sharded(tmp_path / "lacking", change=lambda trunk: trunk.pop("lm_head.weight"))
    hub.add("Qwen/Lacking", lacking)
    with pytest.raises(ValueError, match=r"Lacking.*lm_head\.weight is missing"):
        convert("Qwen/Lacking", str(tmp_path / "out"), **OPTIONS)
    assert shards_fetched(hub) == []


def test_dry_run_fetches_headers_only(repo, tmp_path, capsys):
    hub, _ = repo
    convert(REPO, str(tmp_path / "out"), dry_run=True, **OPTIONS)
    assert shards_fetched(hub) == []
    report = capsys.readouterr().out
    assert "MTP head: yes" in report and "bits per weight" in report and "download" in report
    assert not list(tmp_path.glob("out*"))


def test_revision(hub, tmp_path):
    first = hub.add(REPO, sharded(tmp_path / "first"))
    double = sharded(
        tmp_path / "second",
        change=lambda trunk: trunk.update({"lm_head.weight": 2 * trunk["lm_head.weight"]}),
    )
    second = hub.add(REPO, double)
    assert first != second
    for name, revision in [("first", first), ("second", None)]:
        convert(REPO, str(tmp_path / f"{name}-out"), revision=revision, dtype="float32")
        result = load_model(tmp_path / f"{name}-out", dtype=mx.float32).lm_head.weight
        reference = load_model(tmp_path / name, dtype=mx.float32).lm_head.weight
        assert mx.array_equal(result, reference)


@pytest.mark.parametrize("repo_id", ["Qwen/Unknown", "Qwen/Tiny-Next@no"])
def test_unknown_repository_or_revision(repo, tmp_path, repo_id):
    name, _, revision = repo_id.partition("@")
    with pytest.raises(ValueError, match=name) as caught:
        convert(name, str(tmp_path / "out"), revision=revision or None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


# --- the head alone ------------------------------------------------------------------------------
@pytest.fixture
def stock(tmp_path):
    """`base` as mlx-lm converts it to 4 bits, without a head."""
    return checkpoints.convert(tmp_path / "stock", group_size=32, bits=4)


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_attach_fetches_only_the_heads_shard(repo, stock, tmp_path, bits):
    hub, directory = repo
    before = {file.name: file.read_bytes() for file in stock.iterdir()}
    convert(REPO, str(stock), attach_mtp=True, mtp_bits=bits)
    assert shards_fetched(hub) == ["model-00004-of-00004.safetensors"]
    assert hub.sent("00001-of-00004.safetensors") < 120_000  # its header, some small tensors
    after = {file.name: file.read_bytes() for file in stock.iterdir()}
    assert after.keys() - before.keys() == {"mtp.safetensors"}
    assert all(after[name] == content for name, content in before.items())

    convert(str(directory), str(tmp_path / "whole"), mtp_bits=bits, quantize=True)
    whole, result = load_model(tmp_path / "whole"), load_model(stock)
    assert_same(checkpoints.parameters(result.mtp), checkpoints.parameters(whole.mtp))
    assert getattr(result.mtp.fc, "bits", 16) == (bits or 4)
    mlx_lm.utils.load_model(stock)


def test_attach_to_a_repository_in_the_cache(repo, stock):
    hub, _ = repo
    hub.add("mlx-community/Tiny-Next-4bit", stock)
    cached = Path(snapshot_download("mlx-community/Tiny-Next-4bit"))
    convert(REPO, "mlx-community/Tiny-Next-4bit", attach_mtp=True)
    assert load_model("mlx-community/Tiny-Next-4bit").mtp is not None
    assert (cached / "mtp.safetensors").is_file()


def test_attach_twice(repo, stock, capsys):
    hub, _ = repo
    convert(REPO, str(stock), attach_mtp=True)
    head = (stock / "mtp.safetensors").read_bytes()
    hub.requests.clear()
    convert(REPO, str(stock), attach_mtp=True)
    assert "there already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mtp\.safetensors exists already"):
        convert(REPO, str(stock), attach_mtp=True, mtp_bits=8)
    assert (stock / "mtp.safetensors").read_bytes() == head
    assert shards_fetched(hub) == []
    assert sorted(p.name for p in stock.iterdir() if "partial" in p.name) == []


@pytest.mark.parametrize("name", ["pwrite", "replace"])
def test_attaching_interrupted_at_any_call(stock, monkeypatch, name):
    convert(str(GOLDENS / "base"), str(stock), attach_mtp=True)
    head = (stock / "mtp.safetensors").read_bytes()
    names = {file.name for file in stock.iterdir()}
    original = getattr(os, name)
    for fail_at in range(3):
        (stock / "mtp.safetensors").unlink()
        calls = itertools.count()

        def counted(*arguments, calls=calls, fail_at=fail_at):
            if next(calls) == fail_at:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, counted)
            convert(str(GOLDENS / "base"), str(stock), attach_mtp=True)
        assert not (stock / "mtp.safetensors").exists()
        load_model(stock)  # as before
        convert(str(GOLDENS / "base"), str(stock), attach_mtp=True)
        assert (stock / "mtp.safetensors").read_bytes() == head
        assert {file.name for file in stock.iterdir()} == names


def nudge(name):
    """Makes a tensor differ in one number, by some steps of bfloat16."""

    def change(trunk):
        flat = trunk[name].flatten()
        flat[3] = flat[3] + 0.03
        trunk[name] = flat.reshape(trunk[name].shape)

    return change


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.0.linear_attn.A_log",
        "model.layers.0.linear_attn.dt_bias",
        "model.layers.0.linear_attn.conv1d.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.self_attn.q_norm.weight",
    ],
)
def test_the_head_of_another_model_is_refused(hub, stock, tmp_path, name):
    """One of the same shapes, such as Thinking's for Instruct."""
    hub.add("Qwen/Other", sharded(tmp_path / "other", change=nudge(name)))
    message = rf"head of Qwen/Other does not belong to this model: {name} differs"
    with pytest.raises(ValueError, match=message):
        convert("Qwen/Other", str(stock), attach_mtp=True)
    assert shards_fetched(hub) == []
    assert not (stock / "mtp.safetensors").exists()


@pytest.mark.parametrize("key, value", [("rope_theta", 5e6), ("rms_norm_eps", 1e-5)])
def test_the_head_under_another_config_is_refused(hub, stock, tmp_path, key, value):
    directory = sharded(tmp_path / "other")
    raw = checkpoints.config("base") | {key: value}
    (directory / "config.json").write_text(json.dumps(raw))
    hub.add("Qwen/Other", directory)
    with pytest.raises(ValueError, match=f"does not belong to this model: {key} is"):
        convert("Qwen/Other", str(stock), attach_mtp=True)


def test_attach_without_a_head(hub, stock, tmp_path):
    trunk, _ = checkpoints.split(checkpoints.tensors("base"))
    coder = tmp_path / "coder"
    checkpoints.write(coder, checkpoints.config("base"), {"model.safetensors": trunk})
    hub.add("Qwen/Coder", coder)
    with pytest.raises(ValueError, match=r"Qwen/Coder has no MTP head"):
        convert("Qwen/Coder", str(stock), attach_mtp=True)


def test_attach_from_a_directory_to_an_unquantized_model(tmp_path):
    """Neither needs the hub; the head stays unquantized, too, and the result is the source."""
    stock = checkpoints.convert(tmp_path / "stock")
    convert(str(GOLDENS / "base"), str(stock), attach_mtp=True, dtype="float32")
    result = load_model(stock, dtype=mx.float32).mtp
    reference = load_model(GOLDENS / "base", dtype=mx.float32).mtp
    assert_same(checkpoints.parameters(result), checkpoints.parameters(reference))


# --- upload --------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_upload(hub, tmp_path):
    """The uploaded files equal the local ones, and load from the hub."""
    convert(str(BUNDLED), str(tmp_path / "out"), dequantize=True, upload_repo="me/tiny")
    here = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    assert hub.uploaded("me/tiny") == here
    assert "# me/tiny" in here["README.md"].decode()
    shutil.rmtree(tmp_path / "out")
    model, tokenizer = load("me/tiny")
    assert model.mtp is not None
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_upload_of_what_is_there_already(hub, tmp_path):
    convert(str(GOLDENS / "base"), str(tmp_path / "out"))
    convert(str(GOLDENS / "base"), str(tmp_path / "out"), upload_repo="me/tiny")
    here = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()}
    assert hub.uploaded("me/tiny") == here
