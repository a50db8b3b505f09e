"""Qwen3-Next on Apple Silicon: the hybrid stack in MLX, with its own MTP head."""

import os
import platform

if platform.system() == "Darwin":
    # MLX counts a whole expert tensor against its command buffer's size, so its defaults cut a
    # decoding step into many buffers. Read once, when MLX first touches the GPU; what the user
    # has set stays.
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "1024")
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "1000")

from .generation import generate, generate_step, stream_generate
from .load import load, load_model

__all__ = ["generate", "generate_step", "load", "load_model", "stream_generate"]
