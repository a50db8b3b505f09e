"""Executes, checks, type-checks and lints custom Metal kernels on Linux; see README.md."""

from .build import KernelError, prepare
from .capture import Launch, capture
from .execute import Result, Traffic, run
from .lint import lint
from .typecheck import type_check

__all__ = [
    "KernelError",
    "Launch",
    "Result",
    "Traffic",
    "capture",
    "lint",
    "prepare",
    "run",
    "type_check",
]
