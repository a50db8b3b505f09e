"""Counts the operations that a decoding step queues, in its unevaluated graph."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

# Primitives that describe memory in another way and compute nothing.
VIEWS = {
    *("Reshape", "Flatten", "Unflatten", "Squeeze", "ExpandDims", "Transpose", "Slice", "Split"),
    *("Broadcast", "StopGradient", "Depends", "View", "AsStrided", "NumberOfElements", "Full"),
    "Arange",
}


def count(arrays: Sequence[mx.array]) -> Counter[str]:
    """Counts the primitives of the unevaluated graph of ``arrays`` by name, without views."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        names = re.findall(r'\[label ?="([^"]+)", shape=rectangle\]', path.read_text())
    # A view's name may have its dtype behind it.
    return Counter(name for name in names if name.split()[0] not in VIEWS)


def arrays_of(value: Any) -> list[mx.array]:
    """Lists all arrays that a cache refers to."""
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in arrays_of(item)]
    return arrays_of(list(vars(value).values())) if hasattr(value, "__dict__") else []
