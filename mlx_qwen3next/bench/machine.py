"""Describes the machine and the model, for the heading of the report and the JSON file."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..model.capacity import GB

PACKAGES = ("mlx-qwen3next", "mlx-lm", "mlx")


def describe() -> dict[str, Any]:
    """Describes the machine: chip, memory in bytes, system and versions."""
    info: Mapping[str, str | int] = mx.device_info()
    return {
        "chip": _chip(info),
        "device": str(mx.default_device()),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _chip(info: Mapping[str, str | int]) -> str:
    """The name of the GPU as MLX gives it, or on a CPU that of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if mx.default_device() == mx.cpu and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return str(info.get("device_name") or platform.processor() or platform.machine())


def digest(directory: Path) -> str:
    """The digest of a model's config.json."""
    return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()[:12]


def heading(machine: Mapping[str, Any]) -> list[str]:
    """The first lines of the report, from the result of :func:`describe`."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    chip = f"{machine['chip']}, {machine['cores']} cores, {machine['memory'] / GB:.0f} GB"
    return [
        f"{versions}, Python {machine['python']}, {machine['os']}",
        f"{chip}, MLX on {'the CPU' if 'cpu' in machine['device'] else 'the GPU'}",
    ]
