"""Makes MLX's compiling for the CPU cheaper: the same libraries, from a precompiled header.

MLX runs ``g++`` for each function that it compiles, and nearly all of that time goes into headers
that are the same for all. A ``g++`` put before the machine's own finds them precompiled.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

CACHE = Path(__file__).parents[2] / "build" / "mlx_jit"
INCLUDE = Path(mx.__file__).parent / "include"
HEADER = "mlx/backend/cpu/compiled_preamble.h"
FLAGS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]  # as MLX has them


def precompile():
    """Puts that ``g++`` on this process's path and its children's, where MLX would run one."""
    compiler = shutil.which("g++") if sys.platform == "linux" else None
    if compiler is None or not (INCLUDE / HEADER).exists():
        return
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(version + f"{compiler} {INCLUDE} {mx.__version__}".encode()).hexdigest()
    place = CACHE / key[:24]
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            made = Path(directory) / "made"
            precompiled = made / f"{HEADER}.gch"
            precompiled.parent.mkdir(parents=True)
            header = ["-w", "-I", INCLUDE, "-x", "c++-header", INCLUDE / HEADER]
            subprocess.run([compiler, *FLAGS, *header, "-o", precompiled], check=True)
            command = made / "bin" / "g++"
            command.parent.mkdir()
            command.write_text(f'#!/bin/sh\nexec {compiler} -I {place} "$@"\n')
            command.chmod(0o755)
            made.rename(place)
    os.environ["PATH"] = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
