"""The few changes that turn kernel text into C++ that a host compiler takes.

Lines stay where they are, so that messages name lines of the original text.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass


class TranslationError(ValueError):
    """Kernel text in a form that the harness does not know."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel function: a buffer, or an attribute such as the thread's place."""

    name: str
    type: str
    attribute: str

    @property
    def is_buffer(self) -> bool:
        return self.attribute == "buffer"


@dataclass(frozen=True)
class Signature:
    """The kernel function of a text: its name, parameters and explicit template arguments."""

    name: str
    parameters: tuple[Parameter, ...]
    template_arguments: str

    @property
    def buffers(self) -> list[str]:
        return [p.name for p in self.parameters if p.is_buffer]


_UINT3 = "uint3(rt_launch.{0}[0], rt_launch.{0}[1], rt_launch.{0}[2])"
_POSITION_IN_GRID = ", ".join(
    f"rt_launch.position[{i}] * rt_launch.size[{i}] + rt_thread->local[{i}]" for i in range(3)
)
ATTRIBUTES = {
    "thread_position_in_grid": f"uint3({_POSITION_IN_GRID})",
    "thread_position_in_threadgroup": (
        "uint3(rt_thread->local[0], rt_thread->local[1], rt_thread->local[2])"
    ),
    "thread_index_in_threadgroup": "rt_thread->index",
    "thread_index_in_simdgroup": "rt_thread->lane",
    "simdgroup_index_in_threadgroup": "rt_thread->simdgroup",
    "threadgroup_position_in_grid": _UINT3.format("position"),
    "threadgroups_per_grid": _UINT3.format("threadgroups"),
    "threads_per_grid": _UINT3.format("grid"),
    "threads_per_threadgroup": _UINT3.format("here"),
    "dispatch_threads_per_threadgroup": _UINT3.format("size"),
    "simdgroups_per_threadgroup": "rt_launch.simdgroups",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
}

_ATTRIBUTE = r"\w+(?:\s*\([^()\[\]]*\))?"
_TYPE = r"(?:const\s+)?(?:typename\s+)?[A-Za-z_]\w*(?:::\w+)*(?:\s*<[^;{}()]*?>(?:::\w+)*)?"
_POINTER = re.compile(rf"\s*(?:{_TYPE}(?:\s+const)?|const)?\s*[*&(]")
_VARIABLES = re.compile(rf"\s+({_TYPE})(?:\s+|(?<=>))((?:\w+\s*(?:\[[^\]]*\]\s*)*,?\s*)+);")


def blank(text: str) -> str:
    """`text` as spaces, its line ends kept."""
    return re.sub(r"[^\n]", " ", text)


def blank_comments(source: str) -> str:
    """The text without comments; every other character keeps its place."""
    comment = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    return comment.sub(lambda found: blank(found.group()), source)


def _without_includes(source: str) -> str:
    return re.sub(r"^[ \t]*#[ \t]*include\b[^\n]*", "", source, flags=re.MULTILINE)


def _without_attributes(source: str) -> str:
    source = re.sub(r"template\s*\[\[host_name[^;]*;", lambda m: blank(m.group()), source)
    return re.sub(rf"\[\[\s*{_ATTRIBUTE}(?:\s*,\s*{_ATTRIBUTE})*\s*\]\]", "", source)


def _declare(type_: str, declarator: str) -> str:
    """C++ for one variable of a `threadgroup` declaration."""
    name, bracket, dimensions = (part.strip() for part in declarator.partition("["))
    alias = f"{name}_threadgroup_type"
    return f"using {alias} = {type_} {bracket}{dimensions}; MSL_THREADGROUP({name}, {alias});"


def _place_threadgroup_variables(source: str) -> str:
    """`threadgroup float x[4];` becomes a reference into the runtime's threadgroup memory."""
    parts, position = [], 0
    for found in re.finditer(r"\bthreadgroup\b", source):
        tail = source[found.end() :]
        if found.start() < position or _POINTER.match(tail):
            continue
        variables = _VARIABLES.match(tail)
        if not variables:
            line = source.count("\n", 0, found.start()) + 1
            raise TranslationError(f"line {line}: cannot place this threadgroup declaration")
        declarators = re.split(r",(?![^\[]*\])", variables.group(2))
        code = " ".join(_declare(variables.group(1), d) for d in declarators)
        parts += [source[position : found.start()], code, "\n" * variables.group().count("\n")]
        position = found.end() + variables.end()
    return "".join([*parts, source[position:]])


@functools.lru_cache(maxsize=1024)
def to_cpp(source: str) -> str:
    """The whole text as C++ behind the shim (or the declarations of the type check)."""
    source = _without_includes(blank_comments(source))
    return _place_threadgroup_variables(_without_attributes(source))


@functools.lru_cache(maxsize=1024)
def signature(source: str) -> Signature:
    """The description of the kernel function in the text that MLX made."""
    head = re.search(r"\[\[kernel\]\]\s*void\s+(\w+)\s*\(", source)
    end = source.find(") {\n", head.end()) if head else -1
    if not head or end < 0:
        raise TranslationError("no [[kernel]] function in the text")
    parameters = []
    for text in re.split(r",\s*\n", source[head.end() : end]):
        found = re.fullmatch(r"(.*?)(\w+)\s*\[\[(\w+)(?:\(\d+\))?\]\]", text.strip(), re.DOTALL)
        if not found:
            raise TranslationError(f"cannot read the parameter {text.strip()!r}")
        type_, name, attribute = found.groups()
        parameters.append(Parameter(name, type_.strip(), attribute))
    name = head.group(1)
    arguments = re.search(rf"decltype\({name}(<[^;]*?>)\)\s*{name}", source)
    return Signature(name, tuple(parameters), arguments.group(1) if arguments else "")


def _argument(parameter: Parameter, index: int) -> str:
    if not parameter.is_buffer:
        if parameter.attribute not in ATTRIBUTES:
            raise TranslationError(f"the attribute {parameter.attribute} is not supported")
        return ATTRIBUTES[parameter.attribute]
    type_ = re.sub(r"\b(device|constant)\b", "", parameter.type).strip()
    if type_.endswith("&"):
        return f"*({type_[:-1]}*)buffers[{index}]"
    return f"({type_})buffers[{index}]"


@functools.lru_cache(maxsize=1024)
def translation_unit(source: str) -> str:
    """C++ with a function `msl_entry` that runs one thread; the shim is to be included before."""
    kernel = signature(source)
    arguments = [_argument(p, i) for i, p in enumerate(kernel.parameters)]
    call = f"{kernel.name}{kernel.template_arguments}({', '.join(arguments)})"
    # Inside the namespace, Metal's functions come before those of C with the same name.
    return (
        "namespace metal { namespace kernel_text {\n"
        f'#line 1 "kernel.metal"\n{to_cpp(source)}\n#line 1 "entry"\n'
        f'extern "C" void msl_entry(void** buffers) {{ {call}; }}\n'
        "} }\n"
    )
