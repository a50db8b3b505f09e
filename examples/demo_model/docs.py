"""Names, signatures and docstrings of the Python standard library.

``collect`` reads the sources with ``ast``; ``collect_builtins`` inspects the modules written in C.
Both return :class:`Entry` objects, which ``data.py`` turns into chats.
"""

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

FAMOUS = {
    "os", "os.path", "json", "re", "math", "itertools", "functools", "collections",
    "collections.abc", "pathlib", "subprocess", "random", "string", "datetime", "threading",
    "asyncio", "argparse", "logging", "csv", "io", "shutil", "time", "typing", "builtins",
}  # fmt: skip
ALIASES = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_sitebuiltins": "builtins",
    "_weakrefset": "weakref",
}
C_NAMED = [
    "builtins", "math", "itertools", "time", "sys", "cmath", "zlib", "binascii", "array",
    "select", "gc", "marshal", "unicodedata", "errno", "random", "fcntl", "grp", "pwd",
    "resource", "mmap", "atexit", "faulthandler",
]  # fmt: skip
C_MODULES = {  # module: the name that users write
    "posix": "os", "_io": "io", "_collections": "collections", "_random": "random",
    "_functools": "functools", "_operator": "operator", "_csv": "csv", "_struct": "struct",
    "_heapq": "heapq", "_bisect": "bisect", "_datetime": "datetime", "_thread": "threading",
    "_socket": "socket", "_hashlib": "hashlib", "_pickle": "pickle", "_codecs": "codecs",
    "_asyncio": "asyncio", "_sqlite3": "sqlite3", "_signal": "signal", "_stat": "stat",
    "_weakref": "weakref", "_ctypes": "ctypes", "_json": "json", "_decimal": "decimal",
}  # fmt: skip
C_MODULES |= {name: name for name in C_NAMED}
TYPES = [str, bytes, bytearray, list, tuple, dict, set, frozenset, int, float, complex, bool]
TYPES += [range, slice, memoryview, object, property, classmethod, staticmethod, type, super]
SENTENCE_END = re.compile(r"[.!?][\"')`]*(?=\s|$)")


@dataclass(frozen=True)
class Entry:
    """One documented name. ``kind`` is module, class, function or method."""

    name: str  # as users write it: os.path.join
    kind: str
    module: str  # os.path
    signature: str  # os.path.join(a, *p), or "" for a module
    text: str  # the docstring's first paragraphs
    members: tuple[str, ...] = ()  # a module's public names

    @property
    def famous(self) -> bool:
        """Whether the module is among the best known."""
        return self.module in FAMOUS


def summary(docstring: str | None, limit: int = 500) -> str:
    """The first plain paragraphs of a docstring, up to ``limit`` characters and a full sentence."""
    if not docstring:
        return ""
    kept = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if not paragraph.strip():
            continue
        if paragraph.startswith((" ", ">>>", "\t")) or re.search(
            r"^\s*>>>|-{4}|={4}", paragraph, re.M
        ):
            break
        if re.search(r"\n\s+\S", paragraph) and kept:
            break
        paragraph = " ".join(paragraph.split())
        if kept and len(kept) + len(paragraph) + 2 > limit:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(kept) > limit:
            break
    if len(kept) > limit:
        ends = [m.end() for m in SENTENCE_END.finditer(kept, 0, limit)]
        kept = kept[: ends[-1]] if ends else ""
    kept = kept.rstrip(" :,;-")
    if len(kept) < 15 or "<|" in kept:
        return ""
    return kept if SENTENCE_END.search(kept[-3:]) else kept + "."


def module_name(path: Path) -> str:
    """The name that users write for a module's path: ``json.decoder`` for ``json/decoder.py``."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    name = ".".join(parts)
    return ALIASES.get(name, name)


def _exported(package: Path, root: Path) -> dict[str, set[str]]:
    """The names that a package's ``__init__`` imports from each of its submodules (or ``*``)."""
    exported: dict[str, set[str]] = {}
    try:
        tree = ast.parse((root / package / "__init__.py").read_text("utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return exported
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            exported.setdefault(node.module, set()).update(a.name for a in node.names)
    return exported


def _arguments(node: ast.FunctionDef, method: bool) -> str:
    arguments = node.args
    if method and not any("staticmethod" in ast.unparse(d) for d in node.decorator_list):
        first = arguments.posonlyargs or arguments.args
        if first:
            del first[0]
            if len(arguments.defaults) > len(arguments.posonlyargs) + len(arguments.args):
                del arguments.defaults[0]
    return f"({ast.unparse(arguments)})"


def collect(files: list[Path], root: Path) -> list[Entry]:
    """The entries of the public, documented names in ``files`` (relative to ``root``)."""
    entries = []
    for path in files:
        try:
            tree = ast.parse((root / path).read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = module_name(path)
        if any(part.startswith("_") for part in module.split(".")):
            continue
        exported = (
            _exported(path.parent, root).get(path.stem, set()) if path.parent.parts else set()
        )

        def home(name, module=module, exported=exported):
            return module.rpartition(".")[0] if exported & {name, "*"} else module

        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        public = [
            n
            for n in tree.body
            if isinstance(n, (*functions, ast.ClassDef)) and not n.name.startswith("_")
        ]
        text = summary(ast.get_docstring(tree, clean=False))
        if text:
            members = tuple(dict.fromkeys(n.name for n in public))[:8]
            entries.append(Entry(module, "module", module, "", text, members))
        for node in public:
            where = home(node.name)
            name = node.name if where == "builtins" else f"{where}.{node.name}"
            text = summary(ast.get_docstring(node, clean=False))
            if isinstance(node, functions):
                if text:
                    entries.append(
                        Entry(name, "function", where, name + _arguments(node, False), text)
                    )
                continue
            made = ""
            for item in node.body:
                if isinstance(item, functions) and item.name == "__init__":
                    made = _arguments(item, True)
            if text:
                entries.append(Entry(name, "class", where, f"class {name}{made}", text))
            for item in node.body:
                if isinstance(item, functions) and not item.name.startswith("_"):
                    text = summary(ast.get_docstring(item, clean=False))
                    if text:
                        full = f"{name}.{item.name}"
                        signature = full + _arguments(item, True)
                        entries.append(Entry(full, "method", where, signature, text))
    return entries


def _builtin_entry(name: str, kind: str, module: str, obj) -> Entry | None:
    doc = obj.__doc__ if isinstance(obj.__doc__, str) else ""
    signature = ""
    try:
        signature = name + re.sub(r"\(\$?self(, /)?(, )?", "(", str(inspect.signature(obj)))
        signature = signature.replace("(/, ", "(").replace("(/)", "()")
    except (ValueError, TypeError):
        head, _, rest = doc.partition("\n")
        if re.match(r"[\w.]+\(.*\)", head):
            call, _, tail = head.partition("->")[0].partition("--")
            signature = name + "(" + call.rstrip(" -").partition("(")[2]
            doc = rest if rest.strip() else tail
    if re.search(r" at 0x|<object", signature):
        signature = ""
    text = summary(doc)
    if not text:
        return None
    return Entry(
        name, kind, module, ("class " if kind == "class" else "") + (signature or name), text
    )


def collect_builtins(excluded: set[str]) -> list[Entry]:
    """The entries of builtins and C modules, except modules with a public name in ``excluded``."""
    entries = []
    for actual, module in C_MODULES.items():
        try:
            imported = importlib.import_module(actual)
        except ImportError:
            continue
        if module in excluded:
            continue
        prefix = "" if module == "builtins" else f"{module}."
        names = [n for n in sorted(vars(imported)) if not n.startswith("_")]
        text = summary(imported.__doc__)
        if text and actual == module:
            entries.append(Entry(module, "module", module, "", text, tuple(names[:8])))
        for name in names:
            obj = getattr(imported, name)
            if inspect.isclass(obj):
                kind = "class"
            elif inspect.isroutine(obj):
                kind = "function"
            else:
                continue
            entries.append(_builtin_entry(prefix + name, kind, module, obj))
            if kind == "class" and (actual != "builtins" or obj in TYPES):
                for method in sorted(vars(obj)):
                    if not method.startswith("_") and callable(getattr(obj, method)):
                        full = f"{prefix}{name}.{method}"
                        entry = _builtin_entry(full, "method", module, getattr(obj, method))
                        entries.append(entry)
    return [e for e in entries if e]
