"""Measures how fast copies make real edits, on a model whose next row is nearly free.

    LD_PRELOAD=libopenblas.so.0 python examples/edit_speed.py [--files N] [--tokens N]

On a Mac a step is bound by the bytes of the weights, so that a few more rows cost little. A CPU
behaves like that with wide dense layers in float32 and a good BLAS (Debian:
``libopenblas0-pthread``). So this model has dense layers of random weights, and its logits are
replaced by those of the edited file. Each edit is decoded plainly and with copies, in turns,
after one that is not counted: it times the depths.
"""

import argparse
import json
import statistics
import time

import mlx.core as mx
from edit_corpus import Turn, history, whole_file
from mlx_lm.models.cache import KVCache
from tqdm import tqdm

from mlx_qwen3next import generate_step, load
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.packed.packing import pack
from mlx_qwen3next.model.qwen3_next import Model

LAYERS = 8
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": LAYERS,
    "mlp_only_layers": list(range(LAYERS)),
}


def wide() -> Model:
    """Makes a model of the demo model's vocabulary, nearly all of whose weights are its MLPs'."""
    config = json.loads((BUNDLED / "config.json").read_text())
    model = Model(Config.from_dict(config | WIDE))
    mx.eval(model.parameters())
    return pack(model.eval())


def decode(model: Model, turn: Turn, lookup: str, tokens: int) -> tuple[float, float]:
    """The seconds a token after the first one, and the tokens a pass of the trunk."""
    text, cache = mx.array(turn.prompt + turn.answer), model.make_cache()
    attention = next(entry for entry in cache if isinstance(entry, KVCache))

    def say(hidden: mx.array) -> mx.array:
        """The logits of the text, which wait for the model's own."""
        rows = hidden.shape[1]
        following = text[attention.offset - rows + 1 : attention.offset + 1]
        said = mx.arange(model.args.vocab_size) == following[:, None]
        return mx.where(said, 100.0, 0 * Model.logits(model, hidden))

    model.logits = say
    start, passes, said = 0.0, 0, []
    options = {"max_tokens": tokens, "mtp": "off", "lookup": lookup, "prompt_cache": cache}
    for step in generate_step(turn.prompt, model, **options):
        start = start or time.perf_counter()
        passes += not step.from_draft
        said.append(step.token)
    assert said == turn.answer[: len(said)]
    return (time.perf_counter() - start) / (len(said) - 1), len(said) / passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--files", type=int, default=5, help="edits, of this repository's history")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer at most")
    args = parser.parse_args()
    _, tokenizer = load()
    turns = [whole_file(edit, tokenizer)[0] for edit in history("HEAD", args.files + 1)]
    model, ratios, lengths = wide(), [], []
    for turn in tqdm(turns, "edits"):
        tokens = min(args.tokens, len(turn.answer))
        plain, _ = decode(model, turn, "off", tokens)
        copied, length = decode(model, turn, "auto", tokens)
        ratios.append(plain / copied)
        lengths.append(length)
    ratios, lengths = ratios[1:], lengths[1:]
    print(f"{'edit':>5}{'beside plain':>14}{'tokens a pass':>15}")
    for number, (ratio, length) in enumerate(zip(ratios, lengths, strict=True), 1):
        print(f"{number:5}{ratio:14.2f}{length:15.2f}")
    print(f"median {statistics.median(ratios):.2f} times as fast as plain")


if __name__ == "__main__":
    main()
