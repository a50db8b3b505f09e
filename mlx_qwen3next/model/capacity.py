"""The memory that a model needs and the memory that this machine has for it."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from .cache import slots
from .config import Config
from .quantized_kv import NOT_QUANTIZED, KVQuantization

GB = 1e9
# The part of a Mac's memory that macOS lets the GPU keep resident by default.
GPU_SHARE = 0.75


def cache_bytes(
    config: Config,
    context: int,
    *,
    mtp: bool,
    itemsize: int,
    quantization: KVQuantization = NOT_QUANTIZED,
) -> int:
    """Returns the bytes of one sequence's cache at ``context`` tokens.

    Args:
        mtp: whether the MTP head's own keys and values count too.
        itemsize: bytes per element of the model's dtype; states are float32.
        quantization: of keys and values, but not of the MTP head's.
    """
    linear = config.layer_types.count("linear_attention")
    attention = len(config.layer_types) - linear
    state = config.linear_value_dim * config.linear_key_head_dim * 4
    rows = (config.linear_conv_kernel_dim - 1) * config.linear_conv_dim * itemsize
    kv = 2 * config.num_key_value_heads * config.head_dim * slots(context)
    of_trunk = int(kv * quantization.itemsize(itemsize, context))
    return linear * (state + rows) + attention * of_trunk + mtp * kv * itemsize


def check(weights: int, cache: int, context: int) -> None:
    """Compares the resident size with the machine's memory.

    Args:
        weights: bytes of the weights as they will be held.
        cache: bytes of the cache at ``context`` tokens.

    Raises:
        ValueError: the machine cannot hold it; the message names remedies.
    """
    need = weights + cache
    total, comfortable = _capacity()
    sizes = (
        f"the model needs {need / GB:.1f} GB (weights {weights / GB:.1f}, "
        f"cache at {context} tokens {cache / GB:.1f})"
    )
    if need > total:
        raise ValueError(
            f"{sizes}, but this machine has {total / GB:.1f} GB for it. "
            "Use a smaller quantization (mlx_qwen3next.convert with fewer --q-bits), a shorter "
            "context, or a converted model with its experts on disk (experts_in_memory='auto')."
        )
    if need > comfortable:
        megabytes = int(min(need * 1.1, total) / 2**20)
        warnings.warn(
            f"{sizes}, more than the {comfortable / GB:.1f} GB macOS lets the GPU keep resident, "
            "so it may be slow or fail. To raise the limit: "
            f"sudo sysctl iogpu.wired_limit_mb={megabytes}",
            stacklevel=3,
        )


def spare() -> int:
    """Returns the bytes that fit into memory well beside the arrays that MLX holds now."""
    _, comfortable = _capacity()
    if platform.system() == "Darwin" or mx.default_device() == mx.gpu:
        comfortable -= mx.get_active_memory()  # a CPU's reading leaves them out already
    return max(int(comfortable), 0)


def _capacity() -> tuple[float, float]:
    """Returns (bytes that can be held at all, bytes that can be held well)."""
    info: Mapping[str, str | int] = mx.device_info()
    if platform.system() == "Darwin":
        total = float(info.get("memory_size", os.sysconf("SC_PAGE_SIZE") * _pages()))
        return total, float(info.get("max_recommended_working_set_size", total))
    if mx.default_device() == mx.gpu and "total_memory" in info:
        total = float(info["total_memory"])
        return total, total
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total = float(fields["MemAvailable"].split()[0]) * 1024
    else:
        total = float(os.sysconf("SC_PAGE_SIZE") * _pages())
    return total, total


def _pages() -> int:
    return os.sysconf("SC_PHYS_PAGES")
