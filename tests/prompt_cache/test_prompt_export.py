"""A prompt cache in one file, and what tells one model's from another's."""

import mlx.core as mx
import pytest
from helpers_generate import golden, golden_tokens, greedy
from helpers_prompt_cache import ENOUGH, LONG, OTHER, SHORT, check, fake, files, keep, paths, texts
from mlx_lm.models.cache import save_prompt_cache
from reference_reader import assert_reads_the_same

from mlx_qwen3next.prompt_cache import files as prompt_files
from mlx_qwen3next.prompt_cache.files import is_ours
from mlx_qwen3next.prompt_cache.store import PromptCache


# --- one file ------------------------------------------------------------------------------------
def test_one_file(tmp_path):
    """A checkpoint with those of its beginnings, and nothing else."""
    file = tmp_path / "chat.safetensors"
    kept = keep(PromptCache(max_bytes=ENOUGH, fingerprint="a"), SHORT, LONG, OTHER)
    kept.export(LONG, file)
    assert is_ours(file)
    cache = PromptCache.load(file, max_bytes=ENOUGH, fingerprint="a")
    assert texts(cache) == {SHORT, LONG}
    kept.export([*SHORT, 0], file)  # as far as it is known; the cache read goes without the file
    assert files(tmp_path) == [file.name]
    check(cache, LONG)
    check(cache, SHORT)
    assert texts(PromptCache.load(file, max_bytes=ENOUGH, fingerprint="a")) == {SHORT}
    assert texts(PromptCache.load(file, max_bytes=0, fingerprint="a")) == set()


@pytest.mark.parametrize("quantized", [False, True])
def test_the_reference_library_reads_a_file(tmp_path, quantized):
    file = tmp_path / "chat.safetensors"
    cache = PromptCache(max_bytes=ENOUGH, fingerprint="a")
    cache.insert(LONG, fake(LONG, head=True, quantized=quantized))
    cache.export(LONG, file)
    assert_reads_the_same(file)


def test_one_file_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "chat.safetensors"
    keep(PromptCache(max_bytes=ENOUGH, fingerprint="a"), LONG).export(LONG, file)
    with pytest.raises(ValueError, match=r"chat\.safetensors belongs to another model"):
        PromptCache.load(file, max_bytes=ENOUGH, fingerprint="b")
    with monkeypatch.context() as patch:
        patch.setattr(prompt_files, "_VERSION", "0")
        with pytest.raises(ValueError, match=r"chat\.safetensors is .* another version"):
            PromptCache.load(file, max_bytes=ENOUGH, fingerprint="a")
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"chat\.safetensors is damaged"):
        PromptCache.load(file, max_bytes=ENOUGH, fingerprint="a")
    with pytest.raises(ValueError, match="missing"):
        PromptCache.load(tmp_path / "missing", max_bytes=ENOUGH)
    keep(PromptCache(max_bytes=ENOUGH, directory=tmp_path, fingerprint="model"), OTHER)
    (part,) = paths(tmp_path / "model")
    with pytest.raises(ValueError, match="part of a prompt cache"):
        PromptCache.load(part, max_bytes=ENOUGH, fingerprint="model")


def test_one_file_that_cannot_be_written(tmp_path):
    kept = keep(PromptCache(max_bytes=ENOUGH), LONG)
    (tmp_path / "file").write_text("")
    kept.export(SHORT, tmp_path / "x")  # there is nothing to write
    with pytest.raises(ValueError, match="x cannot be written: Not a directory"):
        kept.export(LONG, tmp_path / "file" / "x")
    assert files(tmp_path) == ["file"]


def test_mlx_lms_files_are_told_apart(tmp_path):
    file = tmp_path / "mlx.safetensors"
    save_prompt_cache(str(file), fake(LONG), {"model": "x"})
    assert not is_ours(file)
    file.write_text("no safetensors")
    assert not is_ours(file) and not is_ours(tmp_path / "missing") and not is_ours(tmp_path)


def test_a_models_cache_through_files(tmp_path):
    model, (prompt, expected) = golden("base")[0], golden_tokens("base")
    kept, live = PromptCache(max_bytes=ENOUGH), model.make_cache() + model.mtp.make_cache()
    mx.eval(model(mx.array([prompt]), live[:-1]))
    kept.insert(prompt, live)
    kept.export(prompt, tmp_path / "x")
    cache, n = PromptCache.load(tmp_path / "x", max_bytes=ENOUGH).fetch([*prompt, expected[0]])
    assert n == len(prompt)
    assert greedy(model, expected[:1], 10, prompt_cache=cache) == expected[1:11]
