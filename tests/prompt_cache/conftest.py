"""Fixtures of prompt caches on disk."""

import pytest
from helpers_prompt_cache import ENOUGH

from mlx_qwen3next.prompt_cache.store import PromptCache


@pytest.fixture
def opened(tmp_path):
    """A cache in a directory, as after a start: what was opened before has no lock any more."""
    before = []

    def opened(max_bytes=ENOUGH, directory=tmp_path / "kept", **options):
        options = {"fingerprint": "model"} | options
        while before:
            before.pop().release()
        cache = PromptCache(max_bytes=max_bytes, directory=directory, **options)
        if cache._folder is not None:
            before.append(cache._folder)
        return cache

    return opened


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept" / "model"
