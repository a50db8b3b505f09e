"""Parts of JSON schemas: where they are, and how one of them stands alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

# Keys of a schema that hold others: by name, in a list, or one.
_NAMED = ("$defs", "definitions", "properties", "patternProperties")
_LISTED = ("prefixItems", "allOf", "anyOf", "oneOf")
_SINGLE = ("items", "additionalProperties")
MOST_REFERENCES = 20  # followed from one place; circles end there


def find(root: Any, pointer: str) -> Any:
    """The part of a document that ``#/properties/a`` or the like names; None if there is none."""
    if not pointer.startswith("#"):
        return None
    found = root
    for key in pointer.split("/")[1:]:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        else:
            return None
    return found


def followed(root: Any, pointer: str) -> str:
    """Where the references lead that a part of a document consists of."""
    for _ in range(MOST_REFERENCES):
        named = find(root, pointer)
        reference = named.get("$ref") if isinstance(named, Mapping) else None
        if not isinstance(reference, str) or find(root, reference) is None:
            break
        pointer = reference
    return pointer


def subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas right within a schema, each with the end of its pointer."""
    if not isinstance(schema, Mapping):
        return
    for key in _NAMED:
        if isinstance(named := schema.get(key), Mapping):
            for name, each in named.items():
                yield below(f"/{key}", name), each
    for key in _LISTED:
        if isinstance(listed := schema.get(key), list):
            yield from ((f"/{key}/{i}", each) for i, each in enumerate(listed))
    for key in _SINGLE:
        if isinstance(schema.get(key), Mapping):
            yield f"/{key}", schema[key]


def below(pointer: str, key: str) -> str:
    """The pointer of what a key names in the part at a pointer."""
    return f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


def standing_alone(root: Any, pointer: str) -> dict[str, Any]:
    """A schema that means the part of ``root`` at a pointer, references included."""
    target = quote(pointer[1:], safe="/~$%")
    return {"$defs": {"root": _moved(root)}, "$ref": f"#/$defs/root{target}"}


def _moved(value: Any) -> Any:
    """A schema whose references lead to where :func:`standing_alone` puts it."""
    if isinstance(value, list):
        return [_moved(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    moved = {key: _moved(each) for key, each in value.items()}
    if isinstance(reference := value.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/root{reference[1:]}"
    return moved


def circle(root: Any) -> str | None:
    """The pointer of a part that nothing can fit, because it needs itself; None if there is none.

    References that lead around through what may be left out are no such circle.
    """
    waiting: list[tuple[str, Any]] = [("#", root)]
    done: set[str] = set()
    while waiting:
        pointer, schema = waiting.pop()
        if _needs_itself(root, schema, (), done):
            return pointer
        waiting += [(pointer + end, each) for end, each in subschemas(schema)]
    return None


def _needs_itself(root: Any, schema: Any, passed: tuple[str, ...], done: set[str]) -> bool:
    """Whether references to what has to be there lead around.

    Args:
        passed: the references on the way.
        done: those that lead nowhere around.
    """
    if not isinstance(schema, Mapping):
        return False
    if any(_needs_itself(root, each, passed, done) for each in _needed(schema)):
        return True
    reference = schema.get("$ref")
    if not isinstance(reference, str) or reference in done:
        return False
    if reference in passed:
        return True
    if _needs_itself(root, find(root, reference), (*passed, reference), done):
        return True
    done.add(reference)
    return False


def _needed(schema: Mapping[str, Any]) -> list[Any]:
    """The parts of a schema without which nothing fits it."""
    parts = schema.get("allOf")
    needed = [*parts] if isinstance(parts, list) else []
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") == "object" and isinstance(properties, Mapping):
        names = required if isinstance(required, list) else []
        needed += [properties[name] for name in properties if name in names]
    return needed
