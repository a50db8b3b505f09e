"""Compiles the runtime, the precompiled shim and kernels, each once: by hash in build/metal_host.

Everything is written beside its place and renamed, so several processes can build at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import translate
from .capture import Launch

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "metal_host"
HEADERS = ("shim.h", "shim_vector.h", "shim_math.h", "shim_simd.h", "runtime.h")
RUNTIME = ("runtime.cpp", "switch.cpp", "memory.cpp", "arithmetic.cpp")
RUNTIME_HEADERS = ("scheduler.h", "guards.h", "runtime.h")

_COMMON = [
    # With more optimization kernels take longer to compile, and run no faster.
    *["-std=c++20", "-fPIC", "-O1", "-mf16c", "-fno-exceptions", "-fno-rtti"],
    *["-fno-strict-aliasing", "-fno-math-errno", "-Werror=vla", "-Werror=return-type"],
    *["-Wno-attributes", "-Wno-unknown-pragmas"],
]
# A literal such as 1.0 is a float in Metal, and half operations round to half every time.
_COMPILER = {
    "g++": ["-fsingle-precision-constant", "-fexcess-precision=16"],
    "clang++": ["-Xclang", "-cl-single-precision-constant", "-Wno-everything"],
}
_UNDEFINED = (
    "alignment,shift,integer-divide-by-zero,signed-integer-overflow,bounds,float-cast-overflow,"
    "unreachable,return,bool"
)
_SANITIZE = ["-fsanitize=thread", f"-fsanitize={_UNDEFINED}", "-fno-sanitize-recover=all"]
_CHECK = {
    "g++": ["--param=tsan-instrument-func-entry-exit=0"],
    "clang++": [
        *["-mllvm", "-tsan-instrument-func-entry-exit=0"],
        *["-mllvm", "-tsan-instrument-read-before-write=1"],
    ],
}
BUILDS = {
    "fast": ["-ffp-contract=off"],
    # Contraction is one of the expensive optimizations.
    "fma": ["-ffp-contract=fast", "-mfma", "-fexpensive-optimizations"],
    # Variables that the kernel does not set hold a pattern, far from any sensible number.
    "check": ["-ffp-contract=off", "-g1", "-ftrivial-auto-var-init=pattern", *_SANITIZE],
}


class KernelError(RuntimeError):
    """A mistake in a kernel: found by the compiler, by a check at run time, or after the run."""


@functools.cache
def compiler() -> str:
    """The name of the host compiler."""
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return name
    raise RuntimeError("running Metal kernels on the host needs g++ or clang++")


def flags(build: str) -> list[str]:
    """The compiler's flags for one build of a kernel."""
    name = compiler()
    extra = _CHECK[name] if build == "check" else []
    return [*_COMMON, *_COMPILER[name], *BUILDS[build], *extra]


@functools.cache
def _digest_of_files(names: tuple[str, ...]) -> str:
    return hashlib.sha256(b"\0".join((HERE / name).read_bytes() for name in names)).hexdigest()


@functools.cache
def _version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_version(), *parts)).encode()).hexdigest()[:24]


def _compile(arguments: list[str], target: Path, name: str = "", text: str = "") -> None:
    """Runs the compiler, with `text` in a file `name`; what it makes becomes `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / "made"
        if name:
            (Path(directory) / name).write_text(text)
        command = [compiler(), *arguments, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
        if done.returncode:
            raise KernelError(f"the kernel does not compile:\n{done.stderr[:6000]}")
        made.replace(target)


@functools.cache
def runtime() -> ctypes.CDLL:
    """The loaded runtime. Kernels find its functions in the process, hence RTLD_GLOBAL."""
    options = ["-std=c++20", "-O2", "-fPIC", "-shared"]
    digest = _digest_of_files((*RUNTIME, *RUNTIME_HEADERS))
    target = CACHE / f"runtime-{_key(*options, digest)}.so"
    if not target.exists():
        _compile([*options, *(str(HERE / name) for name in RUNTIME)], target)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    library.rt_error.restype = ctypes.c_char_p
    library.rt_failed_at.restype = ctypes.c_void_p
    library.rt_buffer.restype = ctypes.c_void_p
    library.rt_image.restype = ctypes.c_uint64
    library.rt_first_unwritten.restype = ctypes.c_int64
    return library


@functools.cache
def _shim(build: str) -> list[str]:
    """The flags that include the shim, compiled beforehand for this build."""
    key = _key(*flags(build), _digest_of_files(HEADERS), str(HERE))
    forms = {"g++": (".h.gch", "-include"), "clang++": (".pch", "-include-pch")}
    suffix, option = forms[compiler()]
    target = CACHE / f"shim-{build}-{key}{suffix}"
    if not target.exists():
        _compile([*flags(build), "-x", "c++-header", str(HERE / "shim.h")], target)
    return [option, str(target).removesuffix(".gch")]


def _library_path(launch: Launch, build: str) -> Path:
    return CACHE / f"{build}-{_key(*flags(build), _digest_of_files(HEADERS), launch.source)}.so"


def _make_library(launch: Launch, build: str) -> Path:
    target = _library_path(launch, build)
    if not target.exists():
        text = translate.translation_unit(launch.source)
        link = ["-shared", "-nostdlib", "-x", "c++", "kernel.metal", "-x", "none", "-lgcc"]
        # Linked without the sanitizers' libraries: the runtime receives their calls.
        _compile([*flags(build), *_shim(build), *link], target, "kernel.metal", text)
    return target


@functools.lru_cache(maxsize=4096)
def _load(path: Path) -> ctypes.CDLL:
    runtime()
    return ctypes.CDLL(str(path))


def library(launch: Launch, build: str) -> ctypes.CDLL:
    """The loaded kernel, compiled if need be."""
    return _load(_make_library(launch, build))


def prepare(wanted: Iterable[tuple[Launch, str]]) -> None:
    """Compiles what is missing of these (launch, build) pairs, in parallel."""
    missing = {}
    for launch, build in wanted:
        path = _library_path(launch, build)
        if not path.exists():
            missing[path] = (launch, build)
    runtime()
    for build in {build for _, build in missing.values()}:
        _shim(build)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: _make_library(*pair), missing.values()))
