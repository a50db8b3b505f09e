"""Launches of the package's kernels, executed by metal_host instead of a GPU."""

from collections import Counter
from contextlib import contextmanager

import metal_host
import mlx.core as mx
import pytest

from mlx_qwen3next import dispatch, metal_kernels


def capture(kernel, **arguments):
    """A launch of one of the package's kernels."""
    mx.eval(arguments["inputs"])
    return metal_host.capture(metal_kernels.compiled(kernel), **arguments)


@contextmanager
def executed(*, build="fast", **options):
    """While active, kernels run on the CPU from their source text, wherever there is one.

    Yields a Counter of the launches by kernel.
    """
    launches = Counter()

    def launch(kernel, **arguments):
        launches[kernel.name] += 1
        return metal_host.run(capture(kernel, **arguments), build, **options).outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal_kernels, "launch", launch)
        patch.setattr(metal_kernels, "available", lambda: True)
        dispatch.set_kernels("on")
        try:
            yield launches
        finally:
            dispatch.set_kernels("auto")
