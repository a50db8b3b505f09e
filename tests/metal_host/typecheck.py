"""Type check of kernel text with real address spaces, by clang's C++ for OpenCL mode."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import translate

DECLARATIONS = Path(__file__).resolve().with_name("typecheck.h")

# No generic address space: a pointer to one space never becomes a pointer to another, as in Metal.
_EXTENSIONS = (
    "-__opencl_c_generic_address_space,-__opencl_c_pipes,-__opencl_c_device_enqueue,+cl_khr_fp16"
)
FLAGS = [
    *["-x", "cl", "-cl-std=clc++2021", "-Xclang", f"-cl-ext={_EXTENSIONS}"],
    *["--target=x86_64-linux-gnu", "-cl-no-stdinc", "-nostdinc", "-fsyntax-only"],
    *["-include", str(DECLARATIONS), "-ferror-limit=5", "-Wno-everything"],
    *["-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized"],
]
# clang-tidy wants a check of its own beside the compiler's messages.
CHECKS = "-*,clang-diagnostic-*,bugprone-suspicious-semicolon"
_VECTOR_CALL = re.compile(
    r"\b((?:bfloat|float|half|u?char|u?short|u?int|u?long)[234])(\s*\((?!\s*[&*]))"
)
_MESSAGE = re.compile(
    r".*?(?P<file>[^/\s]+):(?P<line>\d+):\d+: (?P<kind>error|warning): (?P<text>.*)"
)


def _clang_tidy() -> str:
    """The program of the clang-tidy wheel itself, without the wheel's slow Python wrapper."""
    package = importlib.util.find_spec("clang_tidy")
    if package and package.origin:
        program = Path(package.origin).parent / "data" / "bin" / "clang-tidy"
        if program.exists():
            return str(program)
    program_on_path = shutil.which("clang-tidy")
    if not program_on_path:
        raise RuntimeError("the type check needs clang-tidy: pip install clang-tidy")
    return program_on_path


def _checked_text(source: str) -> str:
    """The text as clang gets it; line by line that of the kernel."""
    text = _VECTOR_CALL.sub(r"make_\1\2", translate.to_cpp(source))
    text = re.sub(r"\bvec(<[^<>;]*>\s*\()", r"make_vec\1", text)
    kernel = translate.signature(source)
    if not kernel.template_arguments:
        return text
    instance = f"{kernel.name}{kernel.template_arguments}"
    return f"{text}\ntemplate decltype({instance}) {instance};\n"


def type_check(*sources: str) -> list[str]:
    """The compiler's messages on kernel texts as MLX made them; empty if there are none."""
    with tempfile.TemporaryDirectory() as directory:
        names = {}
        for number, source in enumerate(dict.fromkeys(sources)):
            name = f"kernel{number}.cpp"
            Path(directory, name).write_text(_checked_text(source))
            names[name] = translate.signature(source).name
        command = [_clang_tidy(), "--quiet", f"--checks={CHECKS}", *names, "--", *FLAGS]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    messages = []
    for line in done.stdout.splitlines():
        found = _MESSAGE.match(line)
        if found:
            kernel = names.get(found["file"], found["file"])
            messages.append(f"{kernel}: line {found['line']}: {found['text']}")
    if done.returncode and not messages:
        messages.append(f"clang-tidy failed: {done.stderr[-500:]}")
    return messages
