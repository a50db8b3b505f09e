"""Qwen3-Next on Apple Silicon: the hybrid stack in MLX, with its own MTP head."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import generate, generate_step, stream_generate
    from .load import load, load_model

if platform.system() == "Darwin":
    # MLX counts a whole expert tensor against its command buffer's size, so its defaults cut a
    # decoding step into many buffers. Read once, when MLX first touches the GPU; what the user
    # has set stays.
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "1024")
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "1000")

__all__ = ["generate", "generate_step", "load", "load_model", "stream_generate"]

_HOMES = {
    "generate": "generation",
    "generate_step": "generation",
    "load": "load",
    "load_model": "load",
    "stream_generate": "generation",
}


class _Package(ModuleType):
    """Imports a function, and with it MLX, when it is asked for: ``generate --help`` needs none."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Python would put the modules generate and load, once imported, in the functions' places.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> Iterable[str]:
        return {*super().__dir__(), *__all__}


sys.modules[__name__].__class__ = _Package
