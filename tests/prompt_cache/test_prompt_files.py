"""Prompt caches on disk: a restart, other processes, and what happens when writing fails."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from helpers_prompt_cache import (
    ENOUGH,
    LONG,
    OTHER,
    SHORT,
    check,
    fake,
    files,
    keep,
    texts,
    warnings,
)

from mlx_qwen3next.prompt_cache import files as prompt_files
from mlx_qwen3next.prompt_cache import pieces
from mlx_qwen3next.prompt_cache.store import PromptCache
from mlx_qwen3next.prompt_cache.tree import tree


# --- a restart -----------------------------------------------------------------------------------
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_restart(opened, caplog, head, quantized):
    before = keep(opened(), SHORT, LONG, OTHER, head=head, quantized=quantized)
    after = opened()
    assert texts(after) == {SHORT, LONG, OTHER} and after.nbytes == before.nbytes
    assert not after.save_next()
    for text in (SHORT, LONG, OTHER):
        check(after, text, head, quantized)
    assert warnings(caplog) == []


def test_a_node_a_call_parents_first(opened, folder, tmp_path):
    cache = opened()
    assert not cache.save_next()
    for text in (SHORT, LONG, OTHER):  # 1 2, then 3 and 9, then 4 5
        cache.insert(text, fake(text))
    for n in range(1, 5):
        assert cache.save_next() and len(files(folder)) == n
        shutil.copytree(tmp_path / "kept", tmp_path / str(n))
        known = texts(opened(directory=tmp_path / str(n)))
        assert known <= {SHORT, LONG, OTHER} and (LONG not in known or SHORT in known)
    assert not cache.save_next()
    assert texts(opened()) == {SHORT, LONG, OTHER}


def test_without_a_directory_nothing_is_saved():
    cache = PromptCache(max_bytes=ENOUGH)
    assert not keep(cache, SHORT).save_next()


def test_only_what_is_wanted_is_read(opened, monkeypatch):
    """Tokens at the start; of what comes before a checkpoint, keys and values, not the states."""
    keep(opened(), SHORT, LONG, OTHER)
    read, real = [], pieces.Stored.read

    def spy(stored):
        read.append(json.loads(stored.described)[1].removeprefix("0."))
        return real(stored)

    monkeypatch.setattr(pieces.Stored, "read", spy)
    cache = opened()
    assert read == ["tokens"] * 4
    read.clear()
    check(cache, LONG)
    assert sorted(name.split(".")[0] for name in read) == [
        *["checkpoint"] * 5,
        *["head"] * 6,  # of three nodes
        *["kv"] * 6,
    ]
    read.clear()
    check(cache, LONG)
    assert read == []
    cache = opened()
    read.clear()
    cache.trim(0)  # nothing is read to be dropped
    assert read == [] and len(cache) == 0


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happened_the_files_say_the_same(opened, folder, seed):
    """Inserts, drops and restarts in any order."""
    of, cache, inserted = random.Random(seed), opened(), []
    for _ in range(60):
        start = list(of.choice(inserted))[: of.randrange(8)] if inserted else []
        text = tuple(start + of.choices(range(3), k=of.randrange(2, 5)))
        inserted.append(text)
        cache.insert(text, fake(text, head=True))
        if of.random() < 0.3:
            cache.trim(cache.nbytes - 1)
        if of.random() < 0.5:
            cache.save_next()
        if of.random() < 0.2:
            cache.save()
            kept, size = texts(cache), cache.nbytes
            cache = opened()
            assert texts(cache) == kept and cache.nbytes == size
            for text in of.sample(sorted(kept), min(3, len(kept))):
                check(cache, text)
    cache.clear()
    assert files(folder) == []


def test_the_budget_holds_after_a_restart(opened, folder):
    before = keep(opened(), *[range(i, i + 20) for i in range(6)])
    half = before.nbytes // 2
    after = opened(max_bytes=half)
    assert 0 < after.nbytes <= half
    assert len(files(folder)) == len(after) == 3
    assert len(opened(max_sequences=2)) == len(files(folder)) == 2


def test_what_is_dropped_does_not_come_back(opened, folder):
    cache = keep(opened(), range(50), range(51), range(100), head=False)
    cache.trim(cache.nbytes - 1)  # the states after 51
    cache.save()
    assert texts(opened()) == {tuple(range(50)), tuple(range(100))}
    assert len(files(folder)) == 3
    cache.clear()
    assert files(folder) == [] and opened().nbytes == 0


@pytest.mark.parametrize("shift", range(6))
def test_a_stop_anywhere_within_a_split(opened, tmp_path, shift):
    """The files on disk stay readable at every moment, in any order of their names."""
    short, long, other = (tuple(t + shift for t in text) for text in (SHORT, LONG, OTHER))
    cache = keep(opened(), long, (*long, 6, 7))
    for text in (other, short):
        cache.insert(text, fake(text, head=True))
    moment = tmp_path / "moment"
    while cache.save_next():
        shutil.copytree(tmp_path / "kept", moment)
        after = opened(directory=moment)
        assert {long, (*long, 6, 7)} <= texts(after)
        for text in texts(after):
            check(after, text)
        after.save()
        found = after._folder.read().values()
        held = sum(node.piece.tokens.size for node in tree(after._root))
        assert sum(piece.tokens.size for _, piece in found) == held  # nothing twice
        for text in (other, short):
            after.insert(text, fake(text, head=True))
        after.save()
        again = opened(directory=moment)
        assert texts(again) == texts(cache) and not again.save_next()
        shutil.rmtree(moment)
    assert not opened().save_next()


# --- who else is there ---------------------------------------------------------------------------
def test_two_at_once(tmp_path, folder, caplog):
    """The second leaves the first's files alone, and is a cache in memory."""

    def opened():
        return PromptCache(max_bytes=ENOUGH, directory=tmp_path / "kept", fingerprint="model")

    first = keep(opened(), SHORT)
    second = opened()
    (warning,) = warnings(caplog)
    assert str(folder) in warning and "another" in warning
    assert second.nbytes == 0
    check(keep(second, LONG), LONG)
    second.clear()
    assert len(files(folder)) == 1
    del first  # which is all that it takes
    assert texts(opened()) == {SHORT}
    assert warnings(caplog) == []


def test_a_lock_goes_with_its_process(opened, folder, caplog):
    keep(opened(), SHORT)
    opened(directory=folder / "other")  # releases it
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
        "print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, folder / "lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        held = opened()
        other.kill()
    assert held.nbytes == 0 and len(warnings(caplog)) == 1
    assert texts(opened()) == {SHORT}
    assert warnings(caplog) == []


def test_what_others_have_left_is_logged(opened, tmp_path, caplog):
    """Folders of a prompt cache and of nothing else, which are not touched."""
    caplog.set_level("INFO", "mlx_qwen3next")
    for name in ("old", "mixed", "empty", "model"):
        keep(opened(fingerprint=name), *[SHORT, LONG][: name != "empty"])
    left = tmp_path / "kept" / "old" / "0.safetensors.0.part"
    left.write_bytes(b"half")
    (tmp_path / "kept" / "mixed" / "notes").write_text("notes")
    (tmp_path / "kept" / "weights").mkdir()
    mx.save_safetensors(str(tmp_path / "kept" / "weights" / "x.safetensors"), {"x": mx.zeros(3)})
    (tmp_path / "kept" / "file").write_text("")
    caplog.clear()
    assert texts(opened()) == {SHORT}
    (logged,) = warnings(caplog)
    assert f"0.0 GB in {tmp_path / 'kept'} (old)" in logged
    assert left.exists() and len(files(left.parent)) == 2


# --- when writing fails --------------------------------------------------------------------------
def test_a_full_disk(opened, folder, caplog, monkeypatch):
    """One warning, nothing half-written, nothing lost; another attempt after a minute."""
    cache, now = opened(), 1000.0
    keep(cache, (7, 8))
    monkeypatch.setattr(prompt_files, "monotonic", lambda: now)
    attempts = []

    def full(descriptor):
        attempts.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        cache.insert(LONG, fake(LONG, head=True))
        for _ in range(3):
            assert not cache.save_next()
            cache.save()
        assert len(attempts) == 1 and len(files(folder)) == 1
        now += 59
        assert not cache.save_next() and len(attempts) == 1
        now += 2
        assert not cache.save_next() and len(attempts) == 2
        (warning,) = warnings(caplog)
        assert "No space left" in warning and str(folder) in warning
    check(cache, LONG)
    assert not cache.save_next()
    now += 61
    assert cache.save_next() and len(files(folder)) == 2
    check(opened(), LONG)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        cache.insert(OTHER, fake(OTHER))
        cache.save()
    assert len(warnings(caplog)) == 1  # it is full again


@pytest.mark.parametrize("where", ["kept", "kept/model"])
def test_a_directory_that_is_none(opened, tmp_path, caplog, where):
    file = tmp_path / where
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file")
    cache = keep(opened(), SHORT, LONG)
    cache.trim(1)
    cache = keep(cache, SHORT, LONG)
    check(cache, LONG)
    assert len(warnings(caplog)) == 1 and file.read_text() == "a file"


def test_an_interrupt_while_writing(opened, folder, monkeypatch):
    cache = keep(opened(), (7, 8))
    cache.insert(LONG, fake(LONG))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.save_next()
    assert len(files(folder)) == 1
    cache.save()
    assert len(texts(opened())) == 2


def test_what_a_killed_process_left_is_removed(opened, folder):
    """Killed within a write: the unfinished file is all there is of it."""
    keep(opened(), SHORT)
    left = folder / f"{'0' * 32}.safetensors.{'1' * 32}.part"
    left.write_bytes(b"half")
    assert texts(opened()) == {SHORT}
    assert not left.exists() and len(files(folder)) == 1
