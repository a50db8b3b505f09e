"""Prompt caches on disk with spoiled files: these are found and removed, and nothing else is."""

import os
import random
import shutil

import pytest
from helpers_prompt_cache import (
    LONG,
    OTHER,
    SHORT,
    check,
    fake,
    files,
    keep,
    paths,
    same,
    texts,
    warnings,
)
from mlx_lm.models.cache import save_prompt_cache

from mlx_qwen3next.prompt_cache import files as prompt_files


def test_a_byte_that_changed_is_found(opened, folder, caplog):
    """Wherever it is: length, header, tokens, keys, states."""
    keep(opened(), SHORT, LONG)
    originals = {file: file.read_bytes() for file in paths(folder)}
    of = random.Random(0)
    for file, original in originals.items():
        header = 8 + int.from_bytes(original[:8], "little")
        regions = range(8), range(8, header), range(header, len(original))
        for place in [
            i for r, n in zip(regions, (8, 100, 40), strict=True) for i in of.choices(r, k=n)
        ]:
            for other, whole in originals.items():
                other.write_bytes(whole)
            spoiled = bytearray(original)
            spoiled[place] ^= 1 << of.randrange(8)
            file.write_bytes(spoiled)
            cache = opened()
            fetched, n = cache.fetch([*LONG, 0])
            if n:
                # The header may say the same in other words.
                assert same(fetched, fake(LONG[:n], head=True)), (place, header)
            assert n == len(LONG) or warnings(caplog)
            texts(cache)
            caplog.clear()


@pytest.mark.parametrize(
    ("said", "instead"),
    [(b'"F32"', b'"I32"'), (b"[1,2,0,32]", b"[0,2,0,32]"), (b"0.kv.1.0", b"0.kv.1.4")],
    ids=["dtype", "shape", "name"],
)
def test_a_header_that_changed_is_found_at_once(opened, folder, caplog, said, instead):
    """Even if the data could still be read with it."""
    keep(opened(), (1, 2), (1, 3))
    changed = [file for file in paths(folder) if said in file.read_bytes()]
    assert changed
    for file in changed:
        file.write_bytes(file.read_bytes().replace(said, instead))
    cache = opened()
    assert texts(cache) <= {(1, 2), (1, 3)} and not any(file.exists() for file in changed)
    assert all(cache.fetch([1, t, 0])[0] is None for t in (2, 3))
    assert len(warnings(caplog)) == 3


def test_a_damaged_node_goes_with_what_follows_it(opened, folder, caplog):
    kept = keep(opened(), SHORT, LONG, (7, 8))
    name = next(n for n in kept._used if n.piece.end == 3).name
    file = folder / f"{name}.safetensors"
    spoiled = bytearray(file.read_bytes())
    spoiled[-1] ^= 1
    file.write_bytes(spoiled)
    cache = opened()
    assert len(cache) == 3  # it has not been read yet
    assert cache.fetch([*SHORT, 0]) == (None, 0)
    (warning,) = warnings(caplog)
    assert str(file) in warning and "damaged" in warning
    assert texts(cache) == {(7, 8)} and len(files(folder)) == 1
    check(cache, (7, 8))


@pytest.mark.parametrize("action", ["fetch", "insert", "split", "save", "export"])
@pytest.mark.parametrize("damage", ["vanished", "truncated"])
def test_a_file_that_is_lost_while_in_use(opened, folder, tmp_path, caplog, action, damage):
    keep(opened(), LONG)
    cache = opened()
    (file,) = paths(folder)
    if damage == "vanished":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 3)
    if action == "fetch":
        assert cache.fetch([*LONG, 0]) == (None, 0)
    elif action == "insert":  # what comes after it does not need it, until it is fetched
        cache.insert([*LONG, 6], fake([*LONG, 6]))
        assert cache.fetch([*LONG, 6, 0]) == (None, 0)
    elif action == "split":
        cache.insert(OTHER, fake(OTHER, head=True))
        assert texts(cache) == {OTHER}
        check(cache, OTHER)
    elif action == "save":
        cache.insert([*LONG, 6], fake([*LONG, 6], head=True))
        cache.trim(cache.nbytes - 1)
        cache.save()
        assert opened().fetch([*LONG, 6, 0])[1] in (0, 6)
        return
    else:
        cache.export(LONG, tmp_path / "file")
        assert not (tmp_path / "file").exists()
    assert len(warnings(caplog)) == 1
    keep(cache, LONG)
    check(opened(), LONG)


@pytest.mark.parametrize("size", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_removed(opened, folder, caplog, size):
    keep(opened(), LONG, (7, 8))
    spoiled = next(f for f in paths(folder))
    os.truncate(spoiled, size if size >= 0 else spoiled.stat().st_size - 1)
    cache = opened()
    assert len(texts(cache)) == 1 and not spoiled.exists()
    (warning,) = warnings(caplog)
    assert str(spoiled) in warning


def test_what_does_not_belong_there_is_removed(opened, folder, caplog, monkeypatch):
    """Files of another version or model, of mlx-lm, without tensors, and without a beginning."""
    keep(opened(), SHORT)
    own = files(folder)
    monkeypatch.setattr(prompt_files, "_VERSION", "0")
    keep(opened(directory=folder / "version"), OTHER)
    monkeypatch.undo()
    keep(opened(directory=folder / "model", fingerprint="other"), OTHER)
    keep(opened(directory=folder / "orphan"), LONG, (*LONG, 6))
    for i, part in enumerate(["version/model", "model/other", "orphan/model"]):
        largest = max(paths(folder / part), key=lambda f: f.stat().st_size)
        for file in paths(folder / part):
            if part != "orphan/model" or file != largest:
                file.rename(folder / (file.name if i == 2 else f"foreign{i}.safetensors"))
        shutil.rmtree(folder / part.split("/")[0])
    save_prompt_cache(str(folder / "mlx.safetensors"), fake(SHORT)[:1])
    (folder / "text.safetensors").write_text("some text, but no safetensors file")
    shutil.copyfile(folder / own[0], folder / "renamed.safetensors")
    caplog.clear()
    assert len(files(folder)) == 7
    cache = opened()
    assert len(warnings(caplog)) == 6
    assert files(folder) == own
    check(cache, SHORT)


def test_nothing_else_is_touched(opened, folder, tmp_path, caplog):
    """The directory may be anywhere."""
    strange = {
        tmp_path / "kept" / "model.safetensors": b"weights",
        tmp_path / "kept" / "x.part": b"a download",
        tmp_path / "kept" / "other" / "0.safetensors": b"another model's",
        folder / "notes.txt": b"notes",
        folder / "folder.txt" / "x.safetensors": b"deeper",
    }
    for file, data in strange.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    cache = keep(opened(), SHORT, LONG)
    opened(max_bytes=1)
    cache = keep(opened(), SHORT, LONG)
    cache.clear()
    assert {f: f.read_bytes() for f in (tmp_path / "kept").rglob("*.*") if f.is_file()} == strange
    assert warnings(caplog) == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "."])
def test_a_fingerprint_that_is_no_name_is_refused(opened, name):
    with pytest.raises(ValueError, match="fingerprint"):
        opened(fingerprint=name)
