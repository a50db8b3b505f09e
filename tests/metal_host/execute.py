"""Runs a compiled kernel, checks what it left behind and counts its traffic."""

from __future__ import annotations

import ctypes
import math
import subprocess
import threading
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import build as building
from . import translate
from .build import KernelError
from .capture import Launch

# The runtime holds one launch at a time, and a call of it lets other Python threads run.
_one_launch = threading.Lock()

SUMS = {"tree": 0, "sequential": 1, "halves": 2}


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("order", "sums", "jitter", "flush")]


_Three = ctypes.c_uint32 * 3


@dataclass(frozen=True)
class Traffic:
    """Bytes that a launch read from and wrote to one buffer.

    `read` and `written` count every access as the host compiler left it. `unique_*` count
    different bytes. `lines_*` count 128-byte lines, each once per threadgroup that touches it.
    """

    read: int
    written: int
    unique_read: int
    unique_written: int
    lines_read: int
    lines_written: int


@dataclass(frozen=True)
class Result:
    """The outputs of a launch; for the check build, the traffic of every buffer by name."""

    outputs: list[mx.array]
    counters: dict[str, Traffic] = field(default_factory=dict)


def _numpy_type(dtype: mx.Dtype) -> np.dtype:
    """NumPy's type with the same bytes."""
    if dtype == mx.bfloat16:
        return np.dtype(np.uint16)
    return np.dtype(str(dtype).rpartition(".")[2].rstrip("_"))


def _to_numpy(array: mx.array) -> np.ndarray:
    """The array's bytes in row-major order."""
    if array.dtype == mx.bfloat16:
        array = mx.contiguous(array).view(mx.uint16)
    return np.ascontiguousarray(np.asarray(array))


def _to_mlx(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def _shape_buffers(array: mx.array, wanted: tuple[bool, bool, bool]) -> list[np.ndarray]:
    """The arguments that MLX adds for an input whose shape, strides or ndim the kernel names."""
    if not array.ndim:
        return []
    strides = np.cumprod((1, *array.shape[:0:-1]), dtype=np.int64)[::-1]
    values: list[np.ndarray] = [
        np.array(array.shape, np.int32),
        np.ascontiguousarray(strides),
        np.array(array.ndim, np.int32),
    ]
    return [value for value, want in zip(values, wanted, strict=True) if want]


def _input_buffers(launch: Launch) -> list[np.ndarray]:
    buffers: list[np.ndarray] = []
    for array, wanted in zip(launch.inputs, launch.shape_infos, strict=True):
        buffers.append(_to_numpy(array))
        buffers += _shape_buffers(array, wanted)
    return buffers


class _Run:
    """One launch: its buffers in the runtime, by number, in the order of the signature."""

    def __init__(self, launch: Launch, build: str) -> None:
        self.launch = launch
        self.checked = build == "check"
        self.runtime = building.runtime()
        self.library = building.library(launch, build)
        self.names = translate.signature(launch.source).buffers
        self.addresses: list[int] = []

    def place(self) -> None:
        """Fills the buffers: inputs with values, outputs with 0xFF or the initial value."""
        self.runtime.rt_reset()
        for array in _input_buffers(self.launch):
            self._place(array, array.nbytes, is_output=False)
        self.first_output = len(self.addresses)
        for shape, dtype in self.launch.outputs:
            values: np.ndarray | None = None
            if self.launch.init_value is not None:
                values = _to_numpy(mx.full(shape, self.launch.init_value, dtype))
            self._place(values, math.prod(shape) * dtype.size, is_output=True)

    def _place(self, values: np.ndarray | None, size: int, *, is_output: bool) -> None:
        name = self.names[len(self.addresses)]
        address = self.runtime.rt_buffer(
            name.encode(),
            ctypes.c_void_p(None if values is None else values.ctypes.data),
            ctypes.c_size_t(size),
            is_output,
            values is not None,
            self.checked,
        )
        if not address:
            raise MemoryError(f"no room for the buffer '{name}' of {size} bytes")
        self.addresses.append(address)

    def execute(self, options: _Options) -> None:
        entry = ctypes.cast(self.library.msl_entry, ctypes.c_void_p)
        if self.checked:
            self.image = self.runtime.rt_image(entry)
        grid, threadgroup = _Three(*self.launch.grid), _Three(*self.launch.threadgroup)
        if self.runtime.rt_run(entry, grid, threadgroup, ctypes.byref(options)):
            raise KernelError(f"{self.launch.name}: {self._where()}{self._error()}")

    def _error(self) -> str:
        return self.runtime.rt_error().decode()

    def _where(self) -> str:
        """The failing line and its text, as far as the runtime or the line table know it."""
        line = self.runtime.rt_failed_line() or self._line_of(self.runtime.rt_failed_at())
        if not line:
            return ""
        return f"line {line} (`{self.launch.source.splitlines()[line - 1].strip()}`): "

    def _line_of(self, address: int | None) -> int:
        """The line that the call before `address` comes from; 0 if it is not in the kernel."""
        if not address:
            return 0
        command = ["addr2line", "-e", self.library._name, hex(address - self.image - 1)]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return 0
        file, _, line = found.partition(" ")[0].strip().rpartition(":")
        return int(line) if line.isdecimal() and file.endswith("kernel.metal") else 0

    def outputs(self) -> list[mx.array]:
        """Copies of the outputs."""
        arrays = []
        places = self.addresses[self.first_output :]
        for address, (shape, dtype) in zip(places, self.launch.outputs, strict=True):
            kind = _numpy_type(dtype)
            memory = (ctypes.c_char * (math.prod(shape) * kind.itemsize)).from_address(address)
            values = np.frombuffer(memoryview(memory), kind)
            arrays.append(_to_mlx(values.reshape(shape), dtype))
        return arrays

    def counters(self) -> dict[str, Traffic]:
        counted = {}
        for slot, name in enumerate(self.names):
            values = (ctypes.c_uint64 * 6)()
            self.runtime.rt_traffic(slot, values)
            counted[name] = Traffic(*values)
        return counted

    def check_outputs_are_written(self) -> None:
        if self.launch.init_value is not None:
            return
        for slot in range(self.first_output, len(self.names)):
            byte = self.runtime.rt_first_unwritten(slot)
            if byte >= 0:
                raise KernelError(
                    f"{self.launch.name}: output '{self.names[slot]}' was not fully written: "
                    f"first byte {byte}"
                )


def run(
    launch: Launch,
    build: str = "fast",
    order: int = 0,
    sums: str = "tree",
    jitter: bool = False,
    flush: bool = False,
) -> Result:
    """Executes the launch on the CPU; raises KernelError for every mistake that shows.

    `order` is a set of bits that permutes schedules: 1 reverses lanes, 2 reverses simdgroups,
    4 shuffles simdgroups anew after every barrier (seeded by the whole number), 8 reverses
    threadgroups. `sums` is the order of simd_sum and the other reductions. `jitter` moves
    transcendental functions within their documented error, `flush` makes subnormals zero.
    """
    current = _Run(launch, build)
    with _one_launch:
        try:
            current.place()
            current.execute(_Options(order, SUMS[sums], jitter, flush))
            if not current.checked:
                return Result(current.outputs())
            current.check_outputs_are_written()
            return Result(current.outputs(), current.counters())
        finally:
            current.runtime.rt_release()
