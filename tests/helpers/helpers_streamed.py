"""Models whose experts are on disk, with a given number of them a layer in memory."""

import math

import mlx.core as mx

from mlx_qwen3next import load_model
from mlx_qwen3next.checkpoint import files
from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model import layouts
from mlx_qwen3next.model.streamed.slots import passing_at_a_time


def gigabytes(directory, size, dtype=mx.float32):
    """The ``experts_in_memory`` that holds so many experts a layer."""
    tensors = files.read_headers(files.find_files(directory))
    routed = {n: t for n, t in tensors.items() if ".switch_mlp." in n and not layouts.is_mtp(n)}
    layers = sum(name.endswith("up_proj.weight") for name in routed)
    experts = next(iter(routed.values())).shape[0]
    sizes = [(4 if t.dtype == "U32" else dtype.size) * math.prod(t.shape) for t in routed.values()]
    row = sum(sizes) / experts
    passing = 2 * passing_at_a_time(experts) * row / layers
    return ((size + 0.5) * row + passing) / 1e9


def streamed(size, directory=BUNDLED, dtype=mx.float32, **options):
    """The model of a directory with ``size`` experts a layer in slots."""
    gb = gigabytes(directory, size, dtype)
    model = load_model(directory, dtype=dtype, experts_in_memory=gb, **options)
    assert {of.size for of in model.streamed.slots} == {size}
    return model


def reading_ahead(size, directory=BUNDLED, dtype=mx.float32):
    """As :func:`streamed`; the next layer's experts are always read ahead."""
    model = streamed(size, directory, dtype)
    ahead = model.streamed.ahead
    ahead.is_on, ahead.note = True, lambda *layer: None
    return model
