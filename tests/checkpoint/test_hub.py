"""The stand-in of the Hugging Face hub answers the unmodified client as the hub does."""

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hub import TOKEN, Hub, connected, environment
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    ModelCard,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

# the client's own, when it sends a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO, TARGET = "maker/model", "tester/converted"
SHARD = "model-00002-of-00002.safetensors"
BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "BF16": 16, "U32": 32, "I64": 64}


def safetensors(tensors, bytes_of_header=0):
    """The content of a file with such tensors, each a dtype and a shape."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).ljust(bytes_of_header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(i * i % 251 for i in range(end))


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with a model in two shards."""
    shards = {
        "model-00001-of-00002.safetensors": {"a": ("BF16", [100, 50]), "b": ("I64", [])},
        SHARD: {"c": ("BF16", [300, 500])},
    }
    directory = tmp_path / "checkpoint"
    (directory / "original").mkdir(parents=True)
    for name, tensors in shards.items():
        (directory / name).write_bytes(safetensors(tensors))
    index = {"weight_map": {tensor: name for name in shards for tensor in shards[name]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    (directory / "config.json").write_text('{"model_type": "qwen3_next"}')
    (directory / "original" / "params ü.json").write_text("{}")
    return directory


@pytest.fixture
def commit(hub, checkpoint):
    """The commit of the checkpoint at the hub."""
    return hub.add(REPO, checkpoint)


def contents(directory):
    """What is in a directory, by path, without what the client keeps there for itself."""
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in paths.items()
        if path.is_file() and not name.startswith(".cache/")
    }


def calls(hub):
    """Methods and last parts of the paths of all requests since the last time."""
    result = [f"{request.method} {request.path.rsplit('/')[-1]}" for request in hub.requests]
    hub.requests.clear()
    return result


# --- downloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["main", None, "commit"])
def test_a_snapshot_has_the_wanted_files_and_only_these_are_sent(
    hub, checkpoint, commit, tmp_path, revision
):
    revision = commit if revision == "commit" else revision
    got = Path(snapshot_download(REPO, revision=revision, allow_patterns=["*.json"]))
    cache = tmp_path / "huggingface" / "hub"
    assert got == cache / "models--maker--model" / "snapshots" / commit
    wanted = {path: data for path, data in contents(checkpoint).items() if path.endswith(".json")}
    assert len(wanted) == 3  # the pattern holds below directories, too
    assert contents(got) == wanted
    assert hub.sent(".safetensors") == 0
    assert hub.sent("config.json") == len(wanted["config.json"])


def test_a_file_goes_to_a_directory_and_is_sent_once(hub, checkpoint, commit, tmp_path):
    target = tmp_path / "target"
    for _ in range(2):
        hf_hub_download(REPO, SHARD, revision=commit, local_dir=target)
    assert contents(target) == {SHARD: (checkpoint / SHARD).read_bytes()}
    assert calls(hub) == [f"HEAD {SHARD}", f"GET {SHARD}"]


def test_a_broken_download_is_taken_up_where_it_broke_off(
    hub, checkpoint, commit, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # less than one is lost
    hub.cut_after(SHARD, 123_456)
    hf_hub_download(REPO, SHARD, local_dir=tmp_path / "target")
    assert contents(tmp_path / "target") == {SHARD: (checkpoint / SHARD).read_bytes()}
    ranges = [request.range for request in hub.requests if request.method == "GET"]
    assert ranges == [None, "bytes=123000-"]
    assert hub.sent(SHARD) == (checkpoint / SHARD).stat().st_size + 456


def test_a_download_that_always_breaks_off_fails(hub, commit, tmp_path):
    hub.cut_after(SHARD, 1000, times=6)
    with pytest.raises(Exception, match="received 1000 bytes"):
        hf_hub_download(REPO, SHARD, local_dir=tmp_path / "target")
    assert contents(tmp_path / "target") == {}
    assert calls(hub) == [f"HEAD {SHARD}"] + [f"GET {SHARD}"] * 6


def test_the_client_does_not_notice_an_altered_byte(hub, checkpoint, commit):
    hub.alter(SHARD)
    got = Path(hf_hub_download(REPO, SHARD)).read_bytes()
    true = (checkpoint / SHARD).read_bytes()
    assert len(got) == len(true)
    assert [i for i in range(len(true)) if got[i] != true[i]] == [len(true) - 1]
    info = HfApi().model_info(REPO, files_metadata=True)
    [announced] = [file.lfs.sha256 for file in info.siblings if file.rfilename == SHARD]
    assert announced == hashlib.sha256(true).hexdigest() != hashlib.sha256(got).hexdigest()


def test_an_earlier_commit_stays(hub, checkpoint, commit):
    (checkpoint / "README.md").unlink()
    later = hub.add(REPO, checkpoint)
    assert later != commit
    assert model_info(REPO).sha == later
    assert model_info(REPO, revision=commit).sha == commit
    assert "README.md" in HfApi().list_repo_files(REPO, revision=commit)
    assert "README.md" not in HfApi().list_repo_files(REPO)
    got = Path(hf_hub_download(REPO, "config.json", revision=commit))
    assert got.read_bytes() == (checkpoint / "config.json").read_bytes()


def test_another_process_downloads_too(hub, checkpoint, commit, tmp_path):
    script = "import huggingface_hub, sys; print(huggingface_hub.hf_hub_download(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, REPO, "config.json"],
        env=os.environ | environment(hub, tmp_path / "other"),
        capture_output=True,
        text=True,
        check=True,
    )
    got = Path(done.stdout.strip())
    assert got.is_relative_to(tmp_path / "other")
    assert got.read_bytes() == (checkpoint / "config.json").read_bytes()


# --- what the hub tells about a repository -------------------------------------------------------


def test_the_information_on_a_model(hub, checkpoint, commit):
    for revision in (None, "main", commit):
        info = HfApi().model_info(REPO, revision=revision, files_metadata=True)
        assert info.sha == commit
        files = {file.rfilename: file for file in info.siblings}
        assert {name: file.size for name, file in files.items()} == {
            name: len(data) for name, data in contents(checkpoint).items()
        }
        assert files["config.json"].lfs is None
        assert files[SHARD].lfs.size == (checkpoint / SHARD).stat().st_size
        digest = hashlib.sha256((checkpoint / SHARD).read_bytes()).hexdigest()
        assert files[SHARD].lfs.sha256 == digest
    assert HfApi().model_info(REPO).siblings[0].size is None
    assert [entry.path for entry in HfApi().list_repo_tree(REPO, "original")] == [
        "original/params ü.json"
    ]


def test_what_is_not_there_is_named_as_the_hub_names_it(hub, commit):
    assert HfApi().repo_exists(REPO)
    assert not HfApi().repo_exists("maker/other")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("maker/other")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("maker/other")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(REPO, revision="v2")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "tokenizer.json")


# --- parts of files ------------------------------------------------------------------------------


def test_headers_of_all_shards(hub, checkpoint, commit):
    metadata = HfApi().get_safetensors_metadata(REPO, revision=commit)
    first, second = sorted(metadata.files_metadata)
    tensors = metadata.files_metadata[first].tensors
    assert (tensors["a"].dtype, tensors["a"].shape) == ("BF16", [100, 50])
    assert (tensors["a"].data_offsets, tensors["b"].data_offsets) == ((0, 10_000), (10_000, 10_008))
    assert metadata.files_metadata[second].tensors["c"].shape == [300, 500]
    assert metadata.weight_map == {"a": first, "b": first, "c": second}
    assert {each.range for each in hub.requests if each.path.endswith(SHARD)} == {"bytes=0-100000"}
    assert hub.sent(SHARD) == 100_001


@pytest.mark.parametrize("dtype", BITS)
def test_headers_of_every_dtype(hub, tmp_path, dtype):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(safetensors({"a": (dtype, [4, 6])}))
    hub.add(REPO, tmp_path / "one")
    [metadata] = HfApi().get_safetensors_metadata(REPO).files_metadata.values()
    assert (metadata.tensors["a"].dtype, metadata.tensors["a"].shape) == (dtype, [4, 6])
    assert metadata.tensors["a"].data_offsets == (0, 24 * BITS[dtype] // 8)
    assert metadata.parameter_count == {dtype: 24}


def test_a_long_header_takes_a_second_request(hub, tmp_path):
    data = safetensors({"a": ("BF16", [4])}, bytes_of_header=150_000)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(data)
    hub.add(REPO, tmp_path / "one")
    HfApi().get_safetensors_metadata(REPO)
    ranges = [request.range for request in hub.requests if request.method == "GET"]
    assert ranges == ["bytes=0-100000", "bytes=8-150007"]


def test_reading_from_an_open_file_sends_a_block(hub, checkpoint, commit):
    files = HfFileSystem(endpoint=hub.url, token=TOKEN, skip_instance_cache=True)
    with files.open(f"{REPO}@{commit}/{SHARD}", "rb", block_size=1000) as file:
        file.seek(200_000)
        got = file.read(16)
    assert got == (checkpoint / SHARD).read_bytes()[200_000:200_016]
    assert hub.sent(SHARD) == 16 + 1000
    last = [request.path.split("/")[-2:] for request in hub.requests]
    assert last == [["revision", commit], ["tree", commit], [commit, SHARD]]


def test_the_ways_to_read_some_bytes(hub, checkpoint, commit):
    expected = (checkpoint / SHARD).read_bytes()
    path = f"{REPO}@{commit}/{SHARD}"

    # as such, all that is within 5 MB after the bytes is sent, too
    files = HfFileSystem(skip_instance_cache=True)
    assert files.cat_file(path, 1000, 1016) == expected[1000:1016]
    assert hub.sent(SHARD) == len(expected) - 1000
    assert len(calls(hub)) == 3

    # without the cache, it is just the bytes, and one request for all but the first time
    assert files.cat_file(path, 1000, 1016, cache_type="none") == expected[1000:1016]
    assert hub.sent() == 16
    assert len(calls(hub)) == 1

    # by hand, even the first time
    url = hf_hub_url(REPO, SHARD, revision=commit)
    headers = build_hf_headers() | {"Range": "bytes=1000-1015"}
    response = get_session().get(url, headers=headers)
    assert (response.status_code, response.content) == (206, expected[1000:1016])
    assert hub.sent() == 16
    assert len(calls(hub)) == 1


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("0-0", 0, 1), ("5-", 5, None), ("-7", -7, None), ("10-99999999", 10, None)],
)
def test_ranges(hub, checkpoint, commit, asked, start, stop):
    expected = (checkpoint / "config.json").read_bytes()
    url = hf_hub_url(REPO, "config.json")
    response = get_session().get(url, headers={"Range": f"bytes={asked}"})
    assert response.content == expected[start:stop]
    first = start % len(expected)
    last = first + len(response.content) - 1
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/{len(expected)}"


def test_a_range_behind_the_end_is_refused(hub, commit):
    url = hf_hub_url(REPO, "config.json")
    assert get_session().get(url, headers={"Range": "bytes=1000-"}).status_code == 416


# --- uploads -------------------------------------------------------------------------------------


def test_an_upload_arrives_byte_for_byte(hub, checkpoint, tmp_path):
    for _ in range(2):
        assert HfApi().create_repo(TARGET, exist_ok=True).repo_id == TARGET
    assert HfApi().list_repo_files(TARGET) == [".gitattributes"]
    assert hub.uploaded(TARGET) == {}
    result = HfApi().upload_folder(repo_id=TARGET, folder_path=checkpoint)
    expected = contents(checkpoint)
    assert hub.uploaded(TARGET) == expected
    assert contents(checkpoint) == expected
    assert not (checkpoint / ".cache").exists()
    assert HfApi().model_info(TARGET).sha == result.oid
    puts = {request.path for request in hub.requests if request.method == "PUT"}
    large = [data for name, data in expected.items() if name.endswith(".safetensors")]
    assert puts == {f"/lfs/{hashlib.sha256(data).hexdigest()}" for data in large}

    snapshot_download(TARGET, local_dir=tmp_path / "back", ignore_patterns=".gitattributes")
    assert contents(tmp_path / "back") == expected
    assert ModelCard.load(TARGET).data.license == "apache-2.0"


def test_a_second_upload_sends_only_what_is_new(hub, checkpoint):
    HfApi().create_repo(TARGET)
    HfApi().upload_folder(repo_id=TARGET, folder_path=checkpoint)
    hub.requests.clear()
    HfApi().upload_folder(repo_id=TARGET, folder_path=checkpoint)
    assert not [each for each in hub.requests if each.method == "PUT" or "/commit/" in each.path]

    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "original" / "params ü.json").unlink()
    HfApi().upload_folder(repo_id=TARGET, folder_path=checkpoint, delete_patterns="original/*")
    assert not [each for each in hub.requests if each.method == "PUT"]
    assert hub.uploaded(TARGET) == contents(checkpoint)
    assert len(hub.uploaded(TARGET)) == 5


def test_content_is_checked_on_its_way_in(hub):
    digest = hashlib.sha256(b"true").hexdigest()
    put = urllib.request.Request(f"{hub.url}/lfs/{digest}", b"false", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(put)


def test_uploads_need_the_token_and_a_repository(hub, checkpoint):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_other").create_repo(TARGET)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().upload_folder(repo_id=TARGET, folder_path=checkpoint)
    HfApi().create_repo(TARGET)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_other").upload_folder(repo_id=TARGET, folder_path=checkpoint)
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().create_repo(TARGET)
    assert hub.uploaded(TARGET) == {}


# --- the client ----------------------------------------------------------------------------------


def test_afterwards_the_client_is_as_it_was(tmp_path):
    before, variables = dict(vars(constants)), dict(os.environ)
    with Hub() as hub, connected(hub, tmp_path):
        assert hub.url == constants.ENDPOINT
        assert constants.HF_HUB_CACHE.startswith(str(tmp_path))
        assert not HfApi().repo_exists(REPO)
    assert vars(constants) == before
    assert dict(os.environ) == variables
    assert HfApi().endpoint == before["ENDPOINT"]
