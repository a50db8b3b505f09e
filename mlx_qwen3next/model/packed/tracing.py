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
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...compute import proof

MOST_ROWS = 16  # of a step; a prompt's chunks have too many shapes, and pay for their graph

trace = mx.compile


def is_step(x: mx.array) -> bool:
    """Returns whether ``x`` ``[B, L, H]`` belongs to a step whose methods may be traced."""
    return x.shape[0] * x.shape[1] <= MOST_ROWS and proof.uses_kernels()


def traced(*without: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Traces a method ``method(module, numbers, *arguments)``, called with facts before them.

    ``without`` are the paths of parts whose parameters the method never reads. The others, which
    are a module's own and in no list, are arguments of the trace: each costs the host time at each
    call.

    The method is a pure function of its module's parameters and its arguments, which are arrays,
    constants, and tuples and lists of such, as its results are. Each value of a constant makes a
    trace of its own. ``numbers`` are ints that change from step to step, or arrays: a trace gets
    each as an array, ``[1]`` int32 of an int.

    Calls with equal ``facts`` run as the same kernels in all modules of a kind. The first of them
    is not traced, since kernels are proved by calls on real values.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(
            module: nn.Module,
            facts: tuple[Any, ...],
            numbers: tuple[int | mx.array, ...],
            *arguments: Any,
        ) -> Any:
            structure = structure_of(module, without)
            key = method, structure.kind, proof.mode(), facts
            function = _functions.get(key)
            if function is not None:
                return function(module, structure, numbers, *arguments)
            before = proof.compositions()
            result = method(module, numbers, *arguments)
            if key not in _functions:
                has_composition = proof.compositions() > before
                _functions[key] = None if has_composition else _Traced(method)
            return result

        return call

    return decorate


class _Traced:
    """A method as a function of parameters and arguments, which MLX traces at its first call."""

    def __init__(self, method: Callable[..., Any]):
        self._method = method
        # The module of this call, which the trace follows, and its structure.
        self._module: Any = None
        self._structure: Any = None
        self._function = trace(self._run)

    def __call__(
        self,
        module: nn.Module,
        structure: Structure,
        numbers: tuple[int | mx.array, ...],
        *arguments: Any,
    ) -> Any:
        self._module, self._structure = module, structure
        owners, names = structure.places
        parameters: Any = [*map(dict.get, owners, names)]
        arrays = [_array(n) if isinstance(n, int) else n for n in numbers]
        try:
            return self._function(parameters, arrays, *arguments)
        finally:
            self._module = self._structure = None

    def _run(self, parameters: list[mx.array], *arguments: Any) -> Any:
        """Runs the method on a module that has other parameters for a while."""
        owners, names = self._structure.places
        own: Any = list(map(dict.get, owners, names))
        try:
            _put(owners, names, parameters)
            return self._method(self._module, *arguments)
        finally:
            _put(owners, names, own)


def _put(owners: list[Any], names: list[Any], arrays: list[mx.array]) -> None:
    for owner, name, array in zip(owners, names, arrays, strict=True):
        owner[name] = array


@lru_cache(maxsize=64)
def _array(number: int) -> mx.array:
    return mx.array([number], mx.int32)


class Structure(NamedTuple):
    """All about a module but its parameters' values."""

    module: int  # its id: a copy of a module has that one's attributes
    kind: int  # the same for modules that differ in their parameters' values alone
    parts: list[tuple[Any, str, Any]]  # that modules have: the module's `get`, the name, the part
    places: tuple[list[Any], list[Any]]  # of the parameters: the owners, the names in them

    def holds(self, module: nn.Module) -> bool:
        """Returns whether no part was replaced."""
        # A loop over bound methods takes two thirds of what `map` takes.
        for get, name, part in self.parts:
            if get(name) is not part:
                return False
        return self.module == id(module)


def structure_of(module: nn.Module, without: tuple[str, ...] = ()) -> Structure:
    """Returns a module's structure, which is looked up once; ``without`` as :func:`traced`."""
    all_known = vars(module).get("_structures", {})
    known = all_known.get(without)
    if known is None or not known.holds(module):
        number = _kinds.setdefault(_described(module), len(_kinds))
        owners, names, parts = [], [], []
        for owner, name in _leaves(module, without):
            if isinstance(owner[name], mx.array):
                owners.append(owner)
                names.append(name)
            elif isinstance(owner, nn.Module):
                parts.append((owner.get, name, owner[name]))
        known = Structure(id(module), number, parts, (owners, names))
        vars(module)["_structures"] = {**all_known, without: known}  # a copy has the dict, too
    return known


_kinds: dict[Any, int] = {}
_functions: dict[Any, _Traced | None] = {}  # None for calls that are not traced


def _described(part: Any) -> Any:
    """Returns the classes, attributes and shapes of a module's parts, in their order."""
    if isinstance(part, mx.array):
        return part.shape, part.dtype
    if isinstance(part, (list, tuple)):
        return tuple(_described(item) for item in part)
    attributes = {k: v for k, v in vars(part).items() if k != "_structures" and not callable(v)}
    return type(part), repr(attributes), tuple((name, _described(part[name])) for name in part)


def _leaves(part: Any, without: tuple[str, ...], path: str = "") -> Iterator[tuple[Any, Any]]:
    """Yields the place of all that a part and its parts have: the owner, and its name in it."""
    for name in part if isinstance(part, dict) else range(len(part)):
        if f"{path}{name}" in without:
            continue
        yield part, name
        if not isinstance(part[name], mx.array):
            yield from _leaves(part[name], without, f"{path}{name}.")
