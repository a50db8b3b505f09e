"""Makes the tokens of the prompts: text that the demo model was not trained on, or random ids."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..checkpoint.hub import BUNDLED

SEED = 0


def tokens(directory: Path, count: int, vocab: int) -> tuple[list[int], str]:
    """Makes a prompt for a model.

    The text is that of the files of Python's library that ``bundled/heldout.txt`` lists, repeated
    if it is too short. A model without a tokenizer gets random ids, the same in every run.

    Args:
        directory: the directory of the model.
        count: the number of tokens.
        vocab: the size of the vocabulary.

    Returns:
        ``count`` token ids, and a description of them.
    """
    if (directory / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        ids: list[int] = []
        for file in _files():
            ids += tokenizer.encode(file.read_text(encoding="utf-8")).ids
            if len(ids) >= count:
                break
        if ids:
            repeated = ids * -(-count // len(ids))
            return repeated[:count], "Python library files"
    random = np.random.default_rng(SEED)
    return random.integers(0, vocab, count).tolist(), "random tokens"


def _files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    names = (BUNDLED / "heldout.txt").read_text().split()
    return [root / name for name in names if (root / name).exists()]
