"""How well a model predicts Python it has never seen, beside what xz makes of it.

    python examples/heldout.py [--model DIR]

Prints bits per byte over the files that ``bundled/heldout.txt`` lists (read from the running
Python's standard library; the published figures are CPython 3.11's), the same of ``xz -9``, and how
many tokens a round of greedy speculation gives: the trunk's own one and, of three drafts of the MTP
head, those that are what the trunk chooses.
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
    """The held-out files that this Python has."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (BUNDLED / "heldout.txt").read_text().split()
    return [root / name for name in names if (root / name).exists()]


def tokens_of(tokenizer: TokenizerWrapper, file: Path) -> mx.array:
    """``[1, L]``; the end-of-text token before a document makes the model start from nothing."""
    return mx.array([tokenizer.encode("<|endoftext|>" + file.read_text(encoding="utf-8"))])


def windows(count: int) -> list[tuple[int, int, int]]:
    """(first token, first predicted, end), overlapping by half, each token predicted once."""
    half = CONTEXT // 2
    spans = [(0, 1, min(CONTEXT, count))]
    spans += [(at - half, at, min(at + half, count)) for at in range(CONTEXT, count, half)]
    return spans


def bits_per_byte(model: Model, tokenizer: TokenizerWrapper) -> float:
    """Over all of the files."""
    bits, size = 0.0, 0
    for file in tqdm(files(), "text", unit="file", leave=False):
        tokens = tokens_of(tokenizer, file)
        size += file.stat().st_size
        for start, first, end in windows(tokens.shape[1]):
            window = tokens[:, start:end]
            losses = nn.losses.cross_entropy(model(window[:, :-1]), window[:, 1:])
            bits += losses[:, first - start - 1 :].sum().item() / math.log(2)
    return bits / size


def acceptance(model: Model, tokenizer: TokenizerWrapper) -> list[float]:
    """How often the draft at each depth is the trunk's own choice, given that those before it are.

    At the first CONTEXT tokens of every file; deeper only where the text goes on as the trunk
    would, for else its choice is not known.
    """
    asked, right = [0] * DRAFTS, [0] * DRAFTS
    for file in tqdm(files(), "drafts", unit="file", leave=False):
        tokens = tokens_of(tokenizer, file)[:, :CONTEXT]
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
            cache[0].trim(cache[0].offset - (i + 1))  # the drafts' entries were provisional
    return [r / max(n, 1) for r, n in zip(right, asked, strict=True)]


def accept_length(rates: list[float]) -> float:
    """Tokens a round gives on average, from the acceptance at each depth."""
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
