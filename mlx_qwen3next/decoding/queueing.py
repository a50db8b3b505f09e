"""How much work is handed to the device at a time, and how much freed memory MLX keeps.

This matters on an Apple GPU, where this project has measured none of it yet: the values follow
others' measurements. ``python -m mlx_qwen3next.bench --host`` prints there the times with other
values.

**Command buffers** (:data:`COMMAND_BUFFERS`). A buffer is what the GPU gets at once. By MLX's
defaults it ends after 20 to 50 operations, or when the arrays that it reads have 40 to 50 "MB",
which MLX 0.32 counts in 2^20 elements, whole stacks of experts included: nearly every launch of
experts ends one. With 1,000 operations and 1,024 MB Coder-Next decoded 1.25 times as fast on
another project's M3 Max. Others take 200 to 400 operations without a limit of size to decode, but
50 operations and 50 MB to read prompts, where large buffers exhausted the memory: what is computed
between lives until its buffer is done. MLX reads both limits once, so one pair serves both. A layer
of the 80B model at 4 bits counts 245 MB. So a buffer ends within the fifth layer at the latest, in
a prompt as well, and 1,000 operations limit nothing. MLX's own defaults hold wherever the user
sets these variables, and outside of the commands.

**Layers at a time** (:func:`layers_at_once`). While the host builds a step, the layers that it has
built are handed over: after fewer layers the device begins earlier, after more there are fewer
buffers. One was best on a CPU. On a GPU eight is a guess. From :data:`CHUNK` tokens on it is one
layer, and the device ends it before it gets the next: MLX gives out the memory of all that is
queued, and one layer of a long chunk takes gigabytes. The host has built the next one by then.

**The cache of freed buffers** (:func:`limit_cache`). MLX keeps the memory of freed arrays for the
next ones, until all together reach 95 % of what macOS lets the GPU keep resident. These buffers
stay resident, other programs lack them, and in another project they grew to 15 GB where 10 were
meant. Only arrays of a like size use them again: those of the next step or chunk. A quarter
of what the model leaves is enough for them, beside the server's prompt cache with its half.

**Memory of malloc** (:func:`use_one_heap`, :func:`return_free_memory`). On a CPU MLX's arrays are
malloc's. glibc gives nearly every thread a heap of its own, and when a large block is freed it
raises the size from which on a block has pages of its own, up to 32 MB. From then on the arrays
of a prompt's chunks lie in these heaps, where kept caches hold the free space between them, and a
server's process grew for hours. So a server has one heap, and returns what is free in it when a
request has ended. With pages of its own for every array from 128 KB on a prompt would take 5 to
10 % more of the processor.

**Resident memory**: mlx-lm's way. While tokens are generated, all that macOS recommends is wired
(mlx_lm's ``wired_limit``, and its BatchGenerator).

Importing this module imports no MLX.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

COMMAND_BUFFERS = {"MLX_MAX_MB_PER_BUFFER": "1024", "MLX_MAX_OPS_PER_BUFFER": "1000"}
LAYERS_ON_CPU, LAYERS_ON_GPU = 1, 8
CHUNK = 256  # tokens
# Bytes of freed buffers: at least those of a decoding step, at most those of two full command
# buffers in bfloat16.
LEAST_CACHE, MOST_CACHE = 2**28, 2**32
M_ARENA_MAX = -8  # of mallopt, in glibc's malloc.h


def set_command_buffers() -> None:
    """Sets MLX's limits of a command buffer on a Mac, unless the user has set them.

    MLX reads these environment variables once, so a command must call this before importing MLX.
    """
    if platform.system() == "Darwin":
        for name, value in COMMAND_BUFFERS.items():
            os.environ.setdefault(name, value)


def layers_at_once(tokens: int = 1) -> int:
    """Returns after how many layers of a forward their work is handed to the device."""
    import mlx.core as mx

    is_single = tokens >= CHUNK or mx.default_device() == mx.cpu
    return LAYERS_ON_CPU if is_single else LAYERS_ON_GPU


def limit_cache() -> int | None:
    """Limits the memory that MLX keeps of freed arrays on a GPU, once the model is loaded.

    Returns:
        The limit in bytes; None on a CPU, where MLX keeps 32 MB by itself.
    """
    import mlx.core as mx

    from ..model import capacity

    if mx.default_device() == mx.cpu:
        return None
    limit = max(LEAST_CACHE, min(MOST_CACHE, capacity.spare() // 4))
    mx.set_cache_limit(limit)
    return limit


def use_one_heap() -> None:
    """Has glibc's malloc use one heap for all threads that begin later; does nothing elsewhere."""
    _malloc_function("mallopt")(M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Returns malloc's free memory to the system, on a CPU with glibc; does nothing elsewhere."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        _malloc_function("malloc_trim")(0)


def _malloc_function(name: str) -> Callable[..., Any]:
    """Returns a function of glibc; with another C library, one that does nothing."""
    return getattr(ctypes.CDLL(None), name, lambda *_: 0)


def settings() -> dict[str, Any]:
    """Describes what holds in this process.

    Returns:
        The variables of :data:`COMMAND_BUFFERS`, None where MLX's own limits hold;
        ``layers_at_once``; ``wired``: the bytes that are wired during generation, None off a Mac.
    """
    import mlx.core as mx

    wired: Any = mx.device_info().get("max_recommended_working_set_size")
    buffers = {name: os.environ.get(name) for name in COMMAND_BUFFERS}
    return {**buffers, "layers_at_once": layers_at_once(), "wired": wired}
