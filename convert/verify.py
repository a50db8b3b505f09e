"""``--verify``: reading a conversion again and measuring its distance from the source."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlx_qwen3next.model.mtp_head import MTPHead
from mlx_qwen3next.model.qwen3_next import DecoderLayer, RMSNorm
from mlx_qwen3next.storage import safetensors

from . import weights
from .layers import Reader, in_model_dtype, load_part, reader
from .plan import Conversion
from .repository import Repository
from .weights import TRUNK, File, Parameter

PROMPTS = (
    "How do I use itertools.chain?",
    "def fibonacci(n: int) -> int:\n    ",
    "The capital of France is Paris. The capital of Italy is",
)


def verify(conversion: Conversion, folder: Path) -> str:
    """The relative errors (L2) of all weights by kind, and of the logits on some prompts.

    Args:
        folder: the converted model's.

    Raises:
        ValueError: a file cannot be read.
    """
    files = conversion.files(folder)
    lines = ["relative error of the weights, by kind", *_compare_weights(conversion, files)]
    if TRUNK in conversion.parameters:
        if isinstance(conversion.source, Repository) and conversion.source.streamed:
            lines.append("logits are not compared with --stream: they need the source as a whole")
        else:
            lines += ["logits on demo prompts", *_compare_logits(conversion, files, folder)]
    return "\n".join(lines)


def _kind(path: str) -> str:
    """The parameter's path without the number of its layer."""
    return re.sub(r"^(model|mtp)\.(layers\.\d+\.)?", lambda m: f"{m[1]}.", path)


def _stored(parameter: Parameter, file: File, first: int, last: int) -> mx.array:
    """Rows ``first:last`` of a parameter of the output, in float32."""
    parts = [safetensors.read_rows(file.places[name], first, last) for name in parameter.contents]
    return parameter.restore(parts)


def _compare_weights(conversion: Conversion, files: list[File]) -> list[str]:
    source = conversion.source
    owners = {id(parameter): file for file in files for parameter in file.parameters.values()}
    squares: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    work = weights.chunks(files, source)
    last_use = {file: i for i, chunk in enumerate(work) for file in chunk.files}
    for i, chunk in enumerate(tqdm(work, "comparing", unit="piece", leave=False)):
        for file in chunk.files:
            source.fetch(file)
        parameter = chunk.parameter
        expected = parameter.origin.rows(source.read, chunk.first, chunk.last).astype(mx.float32)
        result = _stored(parameter, owners[id(parameter)], chunk.first, chunk.last)
        q = parameter.quantization
        how = f"{q['mode']} {q['bits']} bits" if q else str(parameter.dtype).rpartition(".")[2]
        sums = squares[_kind(parameter.path), how]
        sums[0] += float(mx.square(result - expected).sum())
        sums[1] += float(mx.square(expected).sum())
        for file in chunk.files:
            if last_use[file] == i:
                source.release(file)
    return [
        f"  {kind:48} {how:16} {math.sqrt(error / max(norm, 1e-45)):.2e}"
        for (kind, how), (error, norm) in sorted(squares.items())
    ]


def _compare_logits(conversion: Conversion, files: list[File], folder: Path) -> list[str]:
    places = {p.path: (p, file) for file in files for p in file.parameters.values()}

    def converted(path: str) -> mx.array:
        parameter, file = places[path]  # a norm's exact one, whose file comes last
        return in_model_dtype(path, _stored(parameter, file, 0, parameter.shape[0]))

    for file in conversion.source.files():
        conversion.source.fetch(file)
    tokens = mx.array([_tokens(conversion, folder)])
    (a, drafts_a), (b, drafts_b) = (
        _run(conversion, tokens, reader(conversion)),
        _run(conversion, tokens, converted),
    )
    lines = ["  trunk: " + _difference(a, b)]
    if drafts_a is not None and drafts_b is not None:
        lines.append("  drafts: " + _difference(drafts_a, drafts_b))
    return lines


def _tokens(conversion: Conversion, folder: Path) -> list[int]:
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(folder).encode("\n".join(PROMPTS))
    return [7 * i % conversion.source.config.vocab_size for i in range(32)]


def _run(
    conversion: Conversion, tokens: mx.array, read: Reader
) -> tuple[mx.array, mx.array | None]:
    """The logits of trunk and head ``[1, L, vocab]``, with one layer in memory at a time."""
    config = conversion.source.config
    load = partial(load_part, conversion, read)
    table = read("model.embed_tokens.weight")
    x = table[tokens]
    mask = create_attention_mask(x)
    for i in tqdm(range(config.num_hidden_layers), "running", unit="layer", leave=False):
        linear = config.is_linear(i)
        layer = DecoderLayer(config, linear=linear, sparse=config.is_sparse(i))
        x = load(layer, f"model.layers.{i}.")(x, None if linear else mask)
        mx.eval(x)
        del layer
    x = load(RMSNorm(config.hidden_size, config.rms_norm_eps), "model.norm.")(x)
    out = table if config.tie_word_embeddings else read("lm_head.weight")
    logits = x @ out.T
    if conversion.model.mtp is None:
        return logits, None
    head = load(MTPHead(config, lambda tokens: table[tokens]), "mtp.")
    return logits, head(x[:, :-1], tokens[:, 1:]) @ out.T


def _difference(reference: mx.array, result: mx.array) -> str:
    a, b = reference.astype(mx.float32), result.astype(mx.float32)
    error = (mx.linalg.norm(b - a) / mx.linalg.norm(a)).item()
    same = (a.argmax(-1) == b.argmax(-1)).astype(mx.float32).mean().item()
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    divergence = (mx.exp(p) * (p - q)).sum(-1).mean().item()
    return (
        f"relative error {error:.2e}, same choice {same:.1%}, "
        f"Kullback-Leibler divergence {divergence:.4f} nats"
    )
