"""Launches of the package's kernels: on a Mac on its GPU, elsewhere executed by metal_host."""

from collections import Counter
from contextlib import contextmanager

import metal_host
import mlx.core as mx
import numpy as np
import pytest
from float64 import relative_error

from mlx_qwen3next import metal_kernels
from mlx_qwen3next.compute import proof
from mlx_qwen3next.metal_kernels import Kernel, attention, experts, gated_delta, norms, router
from mlx_qwen3next.metal_kernels import kernel as kernel_module
from mlx_qwen3next.model.packed import tracing

ON_GPU = metal_kernels.available()
by_host = pytest.mark.skipif(ON_GPU, reason="about machines without a GPU")

FAMILIES = (attention, experts, gated_delta, norms, router)
KERNELS = [of for file in FAMILIES for of in vars(file).values() if isinstance(of, Kernel)]
DTYPES = (mx.float32, mx.bfloat16, mx.float16)

# Between two right computations in float32, twice the largest measured: sums of 640 products in
# another order, for 4-bit weights of terms several times as large as the result.
FLOOR = 1.5e-6
JITTER_FLOOR = 5e-6  # exp is off by up to 4 units, one way, for each of 16 tokens: 16 * 4 * 2^-24

SCHEDULES = (9, 2, 12)  # beside 0: lanes, simdgroups and threadgroups in other orders
ROUNDINGS = (  # what Metal leaves open, beside the contraction of the fma build
    {"sums": "sequential", "flush": True},
    {"sums": "halves", "jitter": True},
)
BUILDS = ("fma", "check")  # beside fast


def new_process():
    """Forgets all findings that are not in the file, as a new process knows no others."""
    proof._machine.cache_clear()
    proof._findings.cache_clear()
    proof.set_kernels("auto")


def capture(kernel, **arguments):
    """A launch of one of the package's kernels."""
    mx.eval(arguments["inputs"])
    return metal_host.capture(kernel_module.compiled(kernel), **arguments)


@contextmanager
def launching(launch):
    """While active, ``launch`` is what launches kernels, wherever there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", launch)
        patch.setattr(tracing, "trace", lambda function: function)  # a launch is to be seen
        patch.setattr(metal_kernels, "available", lambda: True)
        before = proof._mode
        proof.set_kernels("on")
        try:
            yield
        finally:
            proof.set_kernels(before)


@contextmanager
def executed(*, build="fast", **options):
    """While active, kernels run, wherever there is one. ``build`` and options are metal_host's.

    Yields a Counter of the launches by kernel.
    """
    launches, on_gpu = Counter(), Kernel.launch

    def launch(kernel, **arguments):
        launches[kernel.name] += 1
        if ON_GPU:
            return on_gpu(kernel, **arguments)
        return metal_host.run(capture(kernel, **arguments), build, **options).outputs

    with launching(launch):
        yield launches


def mistakes_in_text(*calls):
    """The findings of type check and lint for all kernels that the calls launch; runs none.

    The lint reads a kernel once: another instance has the same text.
    """
    kernels = {}

    def launch(kernel, **arguments):
        kernels[capture(kernel, **arguments).source] = kernel
        shapes = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    with launching(launch):
        for call in calls:
            call()
    once = {kernel: source for source, kernel in kernels.items()}
    mistakes = metal_host.type_check(*kernels)
    return mistakes + [mistake for source in once.values() for mistake in metal_host.lint(source)]


def in_turns(*chosen):
    """``BUILDS`` for one in three combinations of values, each given with the list it is from.

    Every value meets every build; what contraction or an access does wrong hardly depends on both
    the sizes and the dtype.
    """
    turn = sum(values.index(value) for values, value in chosen) % 3
    return BUILDS if turn == 0 else ()


def ids(dtypes):
    return [str(dtype).rpartition(".")[2] for dtype in dtypes]


def normal(*shape, dtype=mx.float32):
    return mx.random.normal(shape).astype(dtype)


def assert_close(name, result, expected, floor=FLOOR):
    """``expected`` is float32's result; ``result`` may be off by its rounding, once, and the floor.

    To round twice costs 1.4 times as much.
    """
    assert result.shape == expected.shape, name
    rounded, exact, result = (
        np.array(x.astype(mx.float32), np.float64)
        for x in (expected.astype(result.dtype), expected, result)
    )
    error = relative_error(result, exact) if exact.any() else np.linalg.norm(result)
    bound = 1.2 * relative_error(rounded, exact) + floor if exact.any() else 0
    assert error <= bound, f"{name}: relative L2 error {error:.1e}, bound {bound:.1e}"


def assert_same_bits(name, result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype, name
    a, b = (mx.contiguous(x).view(mx.uint8) for x in (result, expected))
    assert mx.array_equal(a, b), f"{name}: not the same bits"


def prove(call, expected, builds=BUILDS):
    """Runs ``call``, whose results belong to the names in ``expected``, in every way there is.

    Each way of rounding must stay close to the expected values; each schedule and the check build
    must give the same bits. Returns the results.
    """

    def results(**options):
        with executed(**options):
            return dict(zip(expected, call(), strict=True))

    plain = results()
    if ON_GPU:
        for name, result in plain.items():
            assert_close(name, result, expected[name])
        return plain
    for options in ({}, *ROUNDINGS, *({"build": build} for build in builds)):
        same = options.get("build") == "check"
        floor = JITTER_FLOOR if "jitter" in options else FLOOR
        for name, result in (results(**options) if options else plain).items():
            if same:
                assert_same_bits(f"{name} {options}", result, plain[name])
            assert_close(f"{name} {options}", result, expected[name], floor)
    for order in SCHEDULES:
        for name, result in results(order=order).items():
            assert_same_bits(f"{name} in order {order}", result, plain[name])
    return plain
