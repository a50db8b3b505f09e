"""The choice between an operation's two forms: a Metal kernel, or MLX's own operations.

A kernel runs only after it has proved itself on this machine: at the first call of a kind, kernel
and composition are run on that call's own arguments, compared with the composition in float32,
and timed in turns. The findings are kept in a small file, for this chip, this version of MLX and
these kernels; where it is deleted, all is proved anew. So an unknown GPU makes the model plain, not
wrong, and not slower than two short measurements can tell.

:mod:`mlx_qwen3next.decoding.preparation` makes such calls before the first answer.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from .. import metal_kernels
from ..errors import first_line
from ..storage.replacing import write_text

Mode = Literal["auto", "on", "off"]

# A kernel's relative error (L2) may be twice that of the composition in the same dtype, or this:
# rounding is below 2e-5 in float32, the smallest mistake in a formula above 1e-2.
TOLERANCE = 1e-4
TIMED, MOST_CALLS, REPEATS = 2e-3, 10, 5  # seconds at once, calls in them at most; in turns

logger = logging.getLogger("mlx_qwen3next")


@dataclass(frozen=True)
class Finding:
    """The finding about a kernel for one kind of call.

    Attributes:
        used: whether the kernel is used.
        reason: why, in words, with the figures.
        seconds, plain_seconds: of a call, as a kernel and as MLX's own operations; None where the
            kernel does not compute what it should.
    """

    used: bool
    reason: str
    seconds: float | None
    plain_seconds: float | None

    @classmethod
    def fault(cls, reason: str) -> Finding:
        """Makes the finding about a kernel that does not compute what it should."""
        return cls(False, reason, None, None)


def _as_called(*args: Any) -> tuple[Any, ...]:
    return args


@dataclass(frozen=True)
class Operation:
    """An operation in two forms of the same arguments and results."""

    name: str
    kernel: Callable[..., Any]
    composition: Callable[..., Any]
    # Returns the facts of a call's arguments that decide whether the kernel takes them. Cheap,
    # since it is asked every time.
    facts: Callable[..., tuple[Any, ...]]
    # Returns the kind of call that has these facts, in words; None if the kernel does not take it.
    kind: Callable[..., str | None]
    # The form that the proof holds both against, in float32, if not the composition.
    exact: Callable[..., Any] | None = None
    # Returns the arguments of the proof for those of a call.
    proof: Callable[..., tuple[Any, ...]] = _as_called

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the form that is used for these arguments."""
        if not uses_kernels():
            return self._compose(*args, **options)
        facts = self.name, *self.facts(*args, **options)
        use = _choices.get(facts)
        if use is None:
            use = self._choose(facts, args, options)
        return (self.kernel if use else self._compose)(*args, **options)

    def _compose(self, *args: Any, **options: Any) -> Any:
        global _compositions
        _compositions += 1
        return self.composition(*args, **options)

    def _choose(self, facts: tuple[Any, ...], args: Sequence[Any], options: dict[str, Any]) -> bool:
        kind = self.kind(*facts[1:])
        if kind is None or _mode == "on":
            return _choices.setdefault(facts, kind is not None)
        key, findings = f"{self.name} {kind}", _findings()
        if key not in findings:
            finding = _prove(self, self.proof(*args), options)
            if finding is None:
                return False
            findings[key] = finding
            _save(findings)
            _report(key, finding)
        return _choices.setdefault(facts, findings[key].used)


def _warn(key: str, finding: Finding) -> None:
    if not finding.used:
        logger.warning("kernel %s is not used: %s", key, finding.reason)


_mode: Mode = "auto"
_choices: dict[tuple[Any, ...], bool] = {}  # whether to use the kernel, by name and facts
_report: Callable[[str, Finding], None] = _warn  # takes each new finding
_proofs = 0
_compositions = 0  # calls that ran MLX's own operations


def set_kernels(mode: Mode) -> None:
    """Chooses between Metal kernels and MLX's own operations, for all models of this process.

    Args:
        mode: "auto" uses a kernel where it proved right and fast on this machine, "on" wherever
            there is one, "off" nowhere.

    Raises:
        ValueError: ``mode`` is another, or "on" where no kernel can run.
    """
    global _mode
    if mode not in get_args(Mode):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if mode == "on" and not metal_kernels.available():
        raise ValueError(
            "kernels are 'on', but there is no Metal GPU in use here; choose 'auto' or 'off'"
        )
    _mode = mode
    _choices.clear()


def mode() -> Mode:
    """Returns the choice made by :func:`set_kernels`."""
    return _mode


def uses_kernels() -> bool:
    """Returns whether operations may run as kernels, here and now."""
    return _mode != "off" and metal_kernels.available()


def compositions() -> int:
    """Returns the number of operations so far that have run as compositions."""
    return _compositions


def findings() -> dict[str, Finding]:
    """Returns the findings about the kernels on this machine, by name and kind of call."""
    return dict(_findings()) if metal_kernels.available() else {}


@contextmanager
def collected() -> Iterator[dict[str, Finding]]:
    """While active, new findings are collected for the caller to report, and not logged."""
    global _report
    found: dict[str, Finding] = {}
    before, _report = _report, found.__setitem__
    try:
        yield found
    finally:
        _report = before


def forget() -> None:
    """Forgets the findings that this process knows, so that it proves and saves all anew."""
    _findings().clear()
    _choices.clear()


def proofs() -> int:
    """Returns the number of proofs made by this process; a step with one is no step to time."""
    return _proofs


# --- the proof -----------------------------------------------------------------------------------
def _prove(operation: Operation, args: Sequence[Any], options: dict[str, Any]) -> Finding | None:
    """Compares and times the forms; None where these arguments prove nothing."""
    global _proofs
    _proofs += 1
    first, *rest = args

    def kernel(x: mx.array) -> list[mx.array]:
        return _arrays(operation.kernel(x, *rest, **options))

    def composition(x: mx.array) -> list[mx.array]:
        return _arrays(operation.composition(x, *rest, **options))

    plain = composition(first)
    judge = operation.exact or operation.composition
    exact = _arrays(judge(*_widened(args), **_widened(options)))
    try:
        finite = all(mx.isfinite(a).all().item() for a in (*plain, *exact))
    except ValueError:  # a function transformation is under way, which has no values yet
        return None
    if not finite:
        return None
    try:
        ours = kernel(first)
        mx.eval(ours)
    except Exception as error:  # Metal's compiler's, or any other
        return Finding.fault(f"it does not run: {first_line(error)}")
    if len(ours) != len(plain):
        return Finding.fault(f"it is wrong: {len(ours)} results, not {len(plain)}")
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        off, bound = _error(a, c), max(2 * _error(b, c), TOLERANCE)
        if not off <= bound:  # a NaN is not
            return Finding.fault(f"result {i} is wrong: error {off:.1e}, bound {bound:.1e}")
    del ours, plain, exact

    seconds: dict[Callable[[mx.array], list[mx.array]], list[float]] = {kernel: [], composition: []}
    calls = max(1, min(MOST_CALLS, int(TIMED / _time(composition, first, 1))))
    for _ in range(REPEATS):
        for form, times in seconds.items():
            times.append(_time(form, first, calls))
    ours_takes, plain_takes = map(statistics.median, seconds.values())
    figures = f"{ours_takes * 1e6:.1f} µs, MLX's own operations {plain_takes * 1e6:.1f} µs"
    return Finding(ours_takes <= plain_takes, figures, ours_takes, plain_takes)


def _arrays(result: Any) -> list[mx.array]:
    """Returns the arrays of a result, which may be a tuple of such tuples."""
    if isinstance(result, mx.array):
        return [result]
    parts = result if isinstance(result, (tuple, list)) else ()
    return [array for part in parts for array in _arrays(part)]


def _widened(value: Any) -> Any:
    """Returns ``value`` with every floating-point array in it as float32."""
    if isinstance(value, mx.array):
        return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
    if isinstance(value, dict):
        return {name: _widened(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_widened, value))
    return type(value)(map(_widened, value)) if isinstance(value, (list, tuple)) else value


def _error(a: mx.array, b: mx.array) -> float:
    """Returns the relative error (L2) of ``a`` beside ``b``; infinite if the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    norm = mx.linalg.norm(b).item()
    return float(mx.linalg.norm(a - b).item()) / max(float(norm), 1e-30)  # type: ignore[arg-type]


def _time(form: Callable[[mx.array], list[mx.array]], x: mx.array, calls: int) -> float:
    """Returns the seconds of a call; each call waits for the one before, as layers do."""
    start = time.perf_counter()
    results: list[mx.array] = []
    for _ in range(calls):
        if results:
            (x,) = mx.depends([x], results)
        results = form(x)
    mx.eval(results)
    return (time.perf_counter() - start) / calls


# --- the file ------------------------------------------------------------------------------------
def _file() -> Path:
    return Path.home() / ".cache" / "mlx_qwen3next" / "kernels.json"


@cache
def _machine() -> str:
    chip = mx.device_info().get("device_name", "unknown")
    return f"{chip}, MLX {version('mlx')}, kernels {metal_kernels.source_hash()}"


@cache
def _findings() -> dict[str, Finding]:
    return _load(_machine())


def _load(machine: str) -> dict[str, Finding]:
    """Returns the file's findings for this machine; none if it cannot be read or is another's."""
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
        if content["machine"] != machine:
            return {}
        loaded = {key: Finding(**finding) for key, finding in content["findings"].items()}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {key: f for key, f in loaded.items() if isinstance(f.used, bool)}


def _save(findings: dict[str, Finding]) -> None:
    """Adds to the file. It is no harm if it cannot be written."""
    machine = _machine()
    known = _load(machine) | dict(findings)  # another process may have learned more
    content = {"machine": machine, "findings": {key: vars(f) for key, f in known.items()}}
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, ensure_ascii=False), ending=f".{os.getpid()}")
    except (OSError, RuntimeError):  # the latter where there is no home
        pass
