"""The bits per byte of a model on Python source that it has never seen, beside those of xz.

    python examples/heldout.py [--model DIR]

The program reads the files that ``mlx_qwen3next/bundled/heldout.txt`` lists from the running
Python's standard library (the published figures are for CPython 3.11). It prints the bits per byte
of the model and of ``xz -9``, and the number of tokens that a round of greedy speculation gives:
the trunk's own token and those of three drafts of the MTP head that equal the trunk's choice.
"""

import argparse
import lzma
import math
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_qwen3next import load
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.qwen3_next import Model

CONTEXT = 512
DRAFTS = 3


def files() -> list[Path]:
    """The held-out files that exist in this Python."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (BUNDLED / "heldout.txt").read_text().split()
    return [root / name for name in names if (root / name).exists()]


def tokens_of(tokenizer: TokenizerWrapper, file: Path) -> mx.array:
    """The tokens ``[1, L]`` of a file; an end-of-text token before it starts the model anew."""
    return mx.array([tokenizer.encode("<|endoftext|>" + file.read_text(encoding="utf-8"))])


def windows(count: int) -> list[tuple[int, int, int]]:
    """Windows (first token, first predicted token, end) that overlap by half.

    Together they predict each token once.
    """
    half = CONTEXT // 2
    spans = [(0, 1, min(CONTEXT, count))]
    spans += [(at - half, at, min(at + half, count)) for at in range(CONTEXT, count, half)]
    return spans


def bits_per_byte(model: Model, tokenizer: TokenizerWrapper, limit: int | None = None) -> float:
    """The model's bits per byte over all held-out files, or their first ``limit`` tokens."""
    bits, size = 0.0, 0
    for file in tqdm(files(), "text", unit="file", leave=False):
        tokens = tokens_of(tokenizer, file)[:, :limit]
        size += len(tokenizer.decode(tokens[0, 1:].tolist()).encode())
        for start, first, end in windows(tokens.shape[1]):
            window = tokens[:, start:end]
            losses = nn.losses.cross_entropy(model(window[:, :-1]), window[:, 1:])
            bits += losses[:, first - start - 1 :].sum().item() / math.log(2)
    return bits / size


def acceptance(model: Model, tokenizer: TokenizerWrapper, limit: int = CONTEXT) -> list[float]:
    """The share of drafts at each depth that equal the trunk's choice, if all drafts before do.

    It is measured on the first ``limit`` tokens of every file. A deeper draft counts only where the
    text continues with the trunk's own choice, because otherwise the next choice is not known.
    """
    asked, right = [0] * DRAFTS, [0] * DRAFTS
    for file in tqdm(files(), "drafts", unit="file", leave=False):
        tokens = tokens_of(tokenizer, file)[:, :limit]
        hidden = model.model(tokens)
        chosen = model.logits(hidden)[0].argmax(axis=-1).tolist()
        text, cache = tokens[0].tolist(), model.mtp.make_cache()
        for i in range(len(text) - DRAFTS):
            m = model.mtp(hidden[:, i : i + 1], tokens[:, i + 1 : i + 2], cache)
            for depth in range(DRAFTS):
                if text[i + 1 + depth] != chosen[i + depth]:
                    break
                draft = model.logits(m).argmax(axis=-1)
                asked[depth] += 1
                if draft.item() != chosen[i + 1 + depth]:
                    break
                right[depth] += 1
                if depth + 1 < DRAFTS:
                    m = model.mtp(m, draft, cache)
            cache[0].trim(cache[0].offset - (i + 1))  # removes the entries of the drafts
    return [r / max(n, 1) for r, n in zip(right, asked, strict=True)]


def accept_length(rates: list[float]) -> float:
    """The mean number of tokens a round, from the acceptance at each depth."""
    return 1 + sum(math.prod(rates[: depth + 1]) for depth in range(len(rates)))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another model directory (default: the bundled one)")
    args = parser.parse_args()
    model, tokenizer = load(args.model)

    texts = [file.read_bytes() for file in files()]
    size = sum(map(len, texts))
    packed = len(lzma.compress(b"".join(texts), preset=9))
    print(f"{len(texts)} files, {size} bytes")
    print(f"xz -9   {8 * packed / size:.4f} bits per byte (all files in one)")
    print(f"model   {bits_per_byte(model, tokenizer):.4f} bits per byte")
    if model.mtp is not None:
        rates = acceptance(model, tokenizer)
        depths = ", ".join(f"{rate:.3f}" for rate in rates)
        print(f"drafts  {accept_length(rates):.3f} tokens a round (accepted by depth: {depths})")


if __name__ == "__main__":
    main()
