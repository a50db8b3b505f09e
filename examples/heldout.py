"""How well the bundled model predicts Python it has never seen, beside what xz makes of it.

    python examples/heldout.py [--model DIR]

Prints bits per byte over the files that ``bundled/heldout.txt`` lists (read from the running
Python's standard library; the published figures are CPython 3.11's), the same of ``xz -9``, and how
often the MTP head's draft is the token that the trunk itself chooses.
"""

import argparse
import lzma
import math
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_qwen3next import load
from mlx_qwen3next.load import BUNDLED

CONTEXT = 512


def windows(count: int) -> list[tuple[int, int, int]]:
    """(first token, first predicted, end), overlapping by half, each token predicted once."""
    half = CONTEXT // 2
    spans = [(0, 1, min(CONTEXT, count))]
    spans += [(at - half, at, min(at + half, count)) for at in range(CONTEXT, count, half)]
    return spans


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another model directory (default: the bundled one)")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / name for name in (BUNDLED / "heldout.txt").read_text().split()]
    files = [file for file in files if file.exists()]

    bits, drafted, right = 0.0, 0, 0
    for file in tqdm(files, unit="file", leave=False):
        # The end-of-text token before a document is where the model starts from nothing.
        tokens = mx.array(tokenizer.encode("<|endoftext|>" + file.read_text(encoding="utf-8")))
        for start, first, end in windows(tokens.size):
            window = tokens[None, start:end]
            hidden = model.model(window[:, :-1])
            logits = model.logits(hidden)
            losses = nn.losses.cross_entropy(logits, window[:, 1:])
            bits += losses[:, first - start - 1 :].sum().item() / math.log(2)
            if model.mtp is not None and end - start > 2:
                drafts = model.logits(model.mtp(hidden[:, :-1], window[:, 1:-1])).argmax(axis=-1)
                hits = drafts == logits[:, 1:].argmax(axis=-1)
                hits = hits[:, max(0, first - start - 2) :]
                drafted, right = drafted + hits.size, right + hits.sum().item()

    texts = [file.read_bytes() for file in files]
    size = sum(map(len, texts))
    packed = len(lzma.compress(b"".join(texts), preset=9))
    print(f"{len(files)} files, {size} bytes")
    print(f"model   {bits / size:.4f} bits per byte")
    print(f"xz -9   {8 * packed / size:.4f} bits per byte (all files in one)")
    if drafted:
        print(f"drafts  {right / drafted:.3f} of the MTP head's are the trunk's own choice")


if __name__ == "__main__":
    main()
