"""Launches of the package's kernels, executed by metal_host instead of a GPU."""

import re
from collections import Counter
from contextlib import contextmanager

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from float64 import relative_error

from mlx_qwen3next import dispatch, metal_kernels

DTYPES = (mx.float32, mx.bfloat16, mx.float16)

# Between two right computations in float32: sums of up to a thousand products in another order,
# and transcendental functions a few units in the last place off.
FLOOR = 1e-6

SCHEDULES = (9, 2, 5, 14)  # beside 0: between them, lanes, simdgroups and threadgroups in any order
ROUNDINGS = (  # what Metal leaves open
    {"build": "fma"},
    {"sums": "sequential"},
    {"sums": "halves"},
    {"jitter": True},
    {"flush": True},
)


def capture(kernel, **arguments):
    """A launch of one of the package's kernels."""
    mx.eval(arguments["inputs"])
    return metal_host.capture(metal_kernels.compiled(kernel), **arguments)


@contextmanager
def launching(launch):
    """While active, ``launch`` is what launches kernels, wherever there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal_kernels, "launch", launch)
        patch.setattr(metal_kernels, "available", lambda: True)
        patch.setattr(dispatch, "_mode", "on")
        yield


@contextmanager
def executed(*, build="fast", **options):
    """While active, kernels run on the CPU from their source text, wherever there is one.

    Yields a Counter of the launches by kernel.
    """
    launches = Counter()

    def launch(kernel, **arguments):
        launches[kernel.name] += 1
        return metal_host.run(capture(kernel, **arguments), build, **options).outputs

    with launching(launch):
        yield launches


def mistakes_in_text(*calls):
    """What the type check and the lint say of all kernels that the calls launch; runs none."""
    sources = {}

    def launch(kernel, **arguments):
        sources[capture(kernel, **arguments).source] = None
        shapes = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    with launching(launch):
        for call in calls:
            call()
    # Clang deduces a template's array from a reference only if the address space has its name.
    typed = metal_host.type_check(*(re.sub(r"\bthread\b", "__private", s) for s in sources))
    return typed + [mistake for source in sources for mistake in metal_host.lint(source)]


def ids(dtypes):
    return [str(dtype).rpartition(".")[2] for dtype in dtypes]


def normal(*shape, dtype=mx.float32):
    return mx.random.normal(shape).astype(dtype)


def assert_close(name, result, expected):
    """``expected`` is float32's result: ``result`` may be off by twice what rounding it once is."""
    assert result.shape == expected.shape, name
    rounded, exact, result = (
        np.array(x.astype(mx.float32), np.float64)
        for x in (expected.astype(result.dtype), expected, result)
    )
    error = relative_error(result, exact) if exact.any() else np.linalg.norm(result)
    bound = 2 * relative_error(rounded, exact) + FLOOR if exact.any() else 0
    assert error <= bound, f"{name}: relative L2 error {error:.1e}, bound {bound:.1e}"


def assert_same_bits(name, result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype, name
    a, b = (mx.contiguous(x).view(mx.uint8) for x in (result, expected))
    assert mx.array_equal(a, b), f"{name}: not the same bits"


def prove(call, expected, *, checked):
    """Runs ``call``, whose results belong to the names in ``expected``, in every way there is.

    Each way of rounding must stay close to the expected values, each schedule and, if asked for,
    the check build must give the same bits. Returns the results.
    """

    def results(**options):
        with executed(**options):
            return dict(zip(expected, call(), strict=True))

    plain = results()
    for options in ({}, *ROUNDINGS):
        for name, result in (results(**options) if options else plain).items():
            assert_close(f"{name} {options}", result, expected[name])
    same = [{"order": order} for order in SCHEDULES] + [{"build": "check"}] * checked
    for options in same:
        for name, result in results(**options).items():
            assert_same_bits(f"{name} {options}", result, plain[name])
    return plain
