"""Rules on the kernels' text that no compiler knows."""

import re

import pytest
from helpers_metal import KERNELS

from mlx_qwen3next.metal_kernels.kernel import text

INEXACT = re.compile(
    r"(?<!precise::)\b(a?(?:sin|cos|tan)h?|exp(?:2|10)?|log(?:2|10)?|r?sqrt|powr?|divide)\("
)
FAMILIES = sorted({kernel.family for kernel in KERNELS} | {"common"})


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_are_the_precise_ones(family):
    """On the CPU both kinds are the same, so that no result would show it."""
    code = re.sub(r"//.*", "", text(family))
    assert [found.group() for found in INEXACT.finditer(code)] == []


@pytest.mark.parametrize("call", ["metal::exp(x)", "fast::cos(x)", "rsqrt(x)", "metal::log2(x)"])
def test_the_rule_finds(call):
    assert INEXACT.search(call)


def test_every_file_is_part_of_a_kernel():
    """And is installed with the package: it is read from there."""
    assert FAMILIES == ["attention", "common", "experts", "gated_delta", "norms", "router"]
    assert all(f"inline {kind}" in text("common") for kind in ("float load", "float sigmoid"))
