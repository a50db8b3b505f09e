"""Methods of packed modules that MLX traces once for all modules of a kind.

A step of few rows queues hundreds of operations, and building them one by one, each custom kernel
with its whole text, takes the host longer than the GPU needs to run them. A :func:`traced` method
is a pure function of its module's weights and of its arguments, so that one trace
(``mx.compile``) serves all layers of a kind, at every step.

Only what runs as kernels altogether is traced: fusing a composition's operations could change its
bits, and a replay must give those of the round. Where no kernel can run nothing is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..compute import proof

MOST_ROWS = 16  # of a step; a prompt's chunks have too many shapes, and pay for their graph

trace = mx.compile
_is_tracing = False


def traced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a method ``method(module, x, *arrays, number=…, flag=…)``.

    The method is a pure function of its module's parameters and its arguments, and returns an array
    or a tuple of arrays. ``x`` is ``[B, L, H]``. ``number`` is an int that changes from step to
    step, so a trace gets it as an array ``[1]`` int32, or it is an array already. For each value of
    ``flag``, a bool, there is a trace. Both may be missing.

    The first call of a kind runs as it is, since kernels are proved by calls on real values.
    """

    @wraps(method)
    def call(module: nn.Module, x: mx.array, *arrays: mx.array, **options: Any) -> Any:
        shape = x.shape
        if _is_tracing or not proof.uses_kernels() or shape[0] * shape[1] > MOST_ROWS:
            return method(module, x, *arrays, **options)
        facts = kind(module), shape, x.dtype, len(arrays), options.get("flag")
        key = method, proof.mode(), facts
        function = _functions.get(key)
        if function is not None:
            return function(module, x, *arrays, **options)
        before = proof.compositions()
        result = method(module, x, *arrays, **options)
        if key not in _functions:
            has_composition = proof.compositions() > before
            _functions[key] = None if has_composition else _Traced(method)
        return result

    return call


class _Traced:
    """A method as a function of parameters and arguments, which MLX traces at its first call."""

    def __init__(self, method: Callable[..., Any]):
        self._method = method
        self._module: Any = None  # the one of this call, whose structure the trace follows
        self._function = trace(self._run)

    def __call__(
        self, module: nn.Module, *arrays: mx.array, number: Any = None, flag: Any = None
    ) -> Any:
        number = _array(number) if isinstance(number, int) else number
        self._module = module
        try:
            return self._function(module, *arrays, number=number, flag=flag)
        finally:
            self._module = None

    def _run(self, parameters: dict[str, Any], *arrays: mx.array, **options: Any) -> Any:
        global _is_tracing
        _is_tracing = True
        options = {name: value for name, value in options.items() if value is not None}
        try:
            with _lent(self._module, parameters):
                return self._method(self._module, *arrays, **options)
        finally:
            _is_tracing = False


@lru_cache(maxsize=64)
def _array(number: int) -> mx.array:
    return mx.array([number], mx.int32)


@contextmanager
def _lent(module: nn.Module, parameters: dict[str, Any]) -> Iterator[None]:
    """Gives a module other parameters for a while."""
    pairs = list(_pairs(module, parameters))
    own = [owner[name] for owner, name, _ in pairs]
    try:
        for owner, name, value in pairs:
            owner[name] = value
        yield
    finally:
        for (owner, name, _), value in zip(pairs, own, strict=True):
            owner[name] = value


def _pairs(owner: Any, values: Any) -> Iterator[tuple[Any, Any, mx.array]]:
    """Yields each array of ``values`` with the part of ``owner`` that has its name."""
    for name in values if isinstance(values, dict) else range(len(values)):
        if isinstance(values[name], mx.array):
            yield owner, name, values[name]
        else:
            yield from _pairs(owner[name], values[name])


def kind(module: nn.Module) -> int:
    """Returns a number, the same for modules that differ in their parameters' values alone."""
    known = vars(module).get("_kind")
    if known is None or known[0] != id(module):  # a copy of a module has that one's
        number = _kinds.setdefault(_described(module), len(_kinds))
        known = vars(module)["_kind"] = id(module), number
    return known[1]


_kinds: dict[Any, int] = {}
_functions: dict[Any, _Traced | None] = {}  # None for calls that are not traced


def _described(part: Any) -> Any:
    """Returns the classes, attributes and shapes of a module's parts, in their order."""
    if isinstance(part, mx.array):
        return part.shape, part.dtype
    if isinstance(part, (list, tuple)):
        return tuple(_described(item) for item in part)
    attributes = {name: value for name, value in vars(part).items() if name != "_kind"}
    return type(part), repr(attributes), tuple((name, _described(part[name])) for name in part)
