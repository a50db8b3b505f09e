"""Qwen3-Next on Apple Silicon: the hybrid stack in MLX, with its own MTP head."""

import sys
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.loading import load, load_model
    from .decoding.generation import generate, generate_step, stream_generate

__all__ = [
    "generate",
    "generate_step",
    "load",
    "load_model",
    "set_kernels",
    "stream_generate",
]

_HOMES = {
    "generate": "decoding.generation",
    "generate_step": "decoding.generation",
    "load": "checkpoint.loading",
    "load_model": "checkpoint.loading",
    "set_kernels": "compute.proof",
    "stream_generate": "decoding.generation",
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
