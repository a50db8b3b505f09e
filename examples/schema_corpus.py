"""Over 200 JSON schemas, of all features that llguidance documents; ``schemas.py`` uses them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

SHORT: Schema = {"type": "string", "maxLength": 6}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
YES: Schema = {"type": "boolean"}


def record(properties: Schema, *optional: str, **more: Any) -> Schema:
    """An object of these properties alone, which are required but for the optional ones."""
    required = [name for name in properties if name not in optional]
    closed = {"additionalProperties": False}
    return {"type": "object", "properties": properties, "required": required, **closed, **more}


def listed(items: Schema, least: int = 0, most: int = 3) -> Schema:
    """A list of so many items."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _strings() -> list[Schema]:
    lengths = [(0, 0), (0, 1), (1, 1), (0, 5), (2, 5), (7, 7), (0, 20), (10, 30)]
    patterns = ["^[a-z]{1,8}$", "^[A-Z][a-z]{0,6}$", r"^\d{3}-\d{4}$", "^(yes|no|maybe)$"]
    patterns += ["^a", "^[^aeiou]{1,5}$", r"^\w{1,6}$", "^#[0-9a-f]{6}$", r"^v\d+\.\d{1,2}$"]
    patterns += [r"^\+?[0-9]{4,6}$", "^(a|b)(c|d)?$", "^[äöüß]{1,4}$", "^x{3}y*z?$", r"^\S{1,4}$"]
    formats = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6"]
    formats += ["uuid", "uri"]
    return [
        {"type": "string"},
        *({"type": "string", "minLength": a, "maxLength": b} for a, b in lengths),
        *({"type": "string", "pattern": pattern} for pattern in patterns),
        *({"type": "string", "format": name} for name in formats),
        {"type": "string", "pattern": "^[a-z]+$", "maxLength": 4},
        {"type": "string", "pattern": "^[ab]*$", "minLength": 2, "maxLength": 3},
    ]


def _numbers() -> list[Schema]:
    bounds: list[Schema] = [
        {},
        {"minimum": 0},
        {"maximum": 0},
        {"minimum": -5, "maximum": 5},
        {"minimum": 10, "maximum": 10},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 100},
        {"minimum": 995, "maximum": 1005},
        {"minimum": -1000000},
        {"exclusiveMaximum": -3},
        {"multipleOf": 5, "minimum": 0, "maximum": 1000},
        {"multipleOf": 3},
    ]
    fractions: list[Schema] = [
        {"minimum": 0.5, "maximum": 0.75},
        {"exclusiveMinimum": -1.25, "exclusiveMaximum": 1.25},
        {"minimum": 3.14159, "maximum": 3.1416},
    ]
    integers = [{"type": "integer", **bound} for bound in bounds]
    return integers + [{"type": "number", **bound} for bound in (*bounds[:9], *fractions)]


def _values() -> list[Schema]:
    constants = ["one", "", 'a "quoted" \\ one', "ünïcode ☃ 😀", 0, -7, 2.5, True, False, None]
    constants += [[], [1, "a", None], {}, {"a": {"b": [1]}}, "line\nbreak\t"]
    enums: list[list[Any]] = [
        ["a"],
        ["red", "green", "blue"],
        ["pre", "prefix", "prefixed"],
        [1, 2, 3],
        [1, "1", None, True],
        [[1], [1, 2]],
        [{"a": 1}, {"a": 2}],
        [f"choice {i}" for i in range(50)],
    ]
    kinds = ["string", "integer", "boolean", "null", "array", "object"]
    several: list[Schema] = [
        {"type": ["string", "null"], "maxLength": 5},
        {"type": ["integer", "boolean"]},
        {"type": ["integer", "null"], "minimum": 3, "maximum": 30},
        {"type": ["string", "integer", "null"], "maxLength": 4},
        {"type": ["array", "null"], "items": DIGIT, "maxItems": 2},
    ]
    return [
        *({"const": constant} for constant in constants),
        *({"enum": values} for values in enums),
        *({"type": kind} for kind in kinds),
        *several,
        {"type": "string", "enum": ["only", 1, "strings"]},
        {"type": "integer", "enum": ["only", 1, 2]},
        {},
    ]


def _arrays() -> list[Schema]:
    sizes = [(0, 0), (0, 1), (1, 1), (2, 2), (0, 3), (1, 4), (5, 5)]
    pair = [DIGIT, SHORT]
    return [
        *(listed(DIGIT, a, b) for a, b in sizes),
        *(listed(item) for item in (SHORT, YES, {"type": "null"}, {"enum": ["x", "yy"]})),
        {"type": "array", "items": DIGIT},
        {"type": "array", "prefixItems": pair, "items": False},
        {"type": "array", "prefixItems": pair, "items": False, "minItems": 2},
        {"type": "array", "prefixItems": pair, "items": YES, "minItems": 3, "maxItems": 4},
        {"type": "array", "prefixItems": pair, "minItems": 1, "maxItems": 2},
        listed(listed(DIGIT, 1, 2), 1, 2),
        listed(record({"id": DIGIT}), 1, 2),
        {"type": "array", "items": False},
        {"type": "array", "minItems": 1, "maxItems": 1},
    ]


def _objects() -> list[Schema]:
    both = {"a": DIGIT, "b": SHORT}
    mapped = {"type": "object", "additionalProperties": DIGIT}
    named = {"^x_": DIGIT}
    return [
        record({}),
        record({"a": DIGIT}),
        record(both),
        record(both, "a"),
        record(both, "b"),
        record(both, "a", "b"),
        record({f"f{i}": YES for i in range(8)}),
        record({f"f{i}": YES for i in range(8)}, *(f"f{i}" for i in range(0, 8, 2))),
        record({"a b": DIGIT, 'q"t': YES, "ü": YES, "": DIGIT, "$ref": YES, "type": SHORT}),
        record({"outer": record({"inner": record({"leaf": DIGIT})})}),
        record({"a": {"type": "null"}, "b": {"const": 3}, "c": listed(YES)}),
        {"type": "object", "properties": both, "required": ["a"]},
        {"type": "object", "properties": both, "required": ["c", "a"]},
        {"type": "object", "properties": {"a": False, "b": DIGIT}, "required": ["b"]},
        {"type": "object", "properties": {"a": True}, "required": ["a"]},
        mapped | {"maxProperties": 2},
        mapped | {"minProperties": 1, "maxProperties": 3},
        mapped | {"minProperties": 1},
        mapped | {"properties": {"a": YES}, "required": ["a"]},
        mapped | {"properties": {"a": YES}, "required": ["a"], "minProperties": 2},
        {"type": "object", "maxProperties": 0},
        {"type": "object", "patternProperties": named, "additionalProperties": False},
        {"type": "object", "patternProperties": named | {"^y": YES}, "additionalProperties": False},
        {"type": "object", "patternProperties": named, "properties": {"id": SHORT}},
        record({"a": DIGIT}, patternProperties=named),
        record(both, "a", "b", minProperties=1),
        record(both, "a", "b", maxProperties=1),
    ]


def _combined() -> list[Schema]:
    texts = {"type": "string", "maxLength": 3}
    cat = record({"kind": {"const": "cat"}, "lives": DIGIT})
    dog = record({"kind": {"const": "dog"}, "good": YES})
    a = {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]}
    b = {"type": "object", "properties": {"b": SHORT}, "required": ["b"]}
    both = {"allOf": [a, b], "additionalProperties": True}
    return [
        {"anyOf": [texts, DIGIT]},
        {"anyOf": [texts, {"type": "null"}]},
        {"anyOf": [DIGIT, YES, {"type": "null"}, listed(DIGIT)]},
        {"anyOf": [cat, dog]},
        {"anyOf": [record({"a": DIGIT}), record({"a": SHORT, "b": YES})]},
        {"oneOf": [cat, dog]},
        {"oneOf": [texts, DIGIT]},
        {"oneOf": [{"const": 1}, {"type": "string", "maxLength": 3}]},
        {"oneOf": [{"type": "null"}, listed(YES, 1, 2)]},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
        {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
        {"allOf": [{"type": ["string", "integer"], "maxLength": 4}, {"type": "integer"}]},
        {"allOf": [{"pattern": "^[a-f]*$"}, {"type": "string", "minLength": 1, "maxLength": 5}]},
        {"allOf": [a, b]},
        both,
        {"allOf": [{"anyOf": [cat, dog]}, {"properties": {"lives": {"minimum": 7}}}]},
        {"type": "integer", "anyOf": [{"maximum": 3}, {"minimum": 90, "maximum": 95}]},
        {"type": "object", "properties": {"x": DIGIT}, "anyOf": [a, b]},
        record({"pet": {"anyOf": [cat, dog]}, "owner": {"oneOf": [texts, {"type": "null"}]}}),
        listed({"anyOf": [cat, dog, {"type": "null"}]}, 1, 2),
        {"anyOf": [{"anyOf": [DIGIT, YES]}, {"oneOf": [texts, {"type": "null"}]}]},
        {"minimum": 3, "type": "integer", "allOf": [{"multipleOf": 2}, {"maximum": 20}]},
    ]


def _references() -> list[Schema]:
    point = record({"x": DIGIT, "y": DIGIT})
    node = record({"v": DIGIT, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})
    tree = record({"n": SHORT, "c": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}})
    value: Schema = {
        "anyOf": [DIGIT, {"type": "array", "items": {"$ref": "#/$defs/value"}, "maxItems": 2}]
    }
    odd = {"a/b": point, "c~d": DIGIT, "e%f g": YES}
    return [
        {"$defs": {"point": point}, "$ref": "#/$defs/point"},
        {"definitions": {"point": point}, "$ref": "#/definitions/point"},
        record({"a": {"$ref": "#/$defs/p"}, "b": {"$ref": "#/$defs/p"}}, **{"$defs": {"p": point}}),
        listed({"$ref": "#/$defs/p"}, 1, 2) | {"$defs": {"p": point}},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": DIGIT}}
        | {"$ref": "#/$defs/a"},
        {"$defs": {"node": node}, "$ref": "#/$defs/node"},
        tree,
        {"$defs": {"value": value}, "$ref": "#/$defs/value"},
        record({"a": point, "b": {"$ref": "#/properties/a"}}),
        {"$defs": odd, "$ref": "#/$defs/a~1b"},
        {"$defs": odd, "$ref": "#/$defs/c~0d"},
        {"$defs": odd, "$ref": "#/$defs/e%25f%20g"},
        {"$defs": {"p": {"type": "integer", "minimum": 1}}, "$ref": "#/$defs/p", "maximum": 5},
        {"$defs": {"even": record({"o": {"anyOf": [{"$ref": "#/$defs/odd"}, {"type": "null"}]}})}}
        | {"$ref": "#/$defs/even"}
        | {
            "$defs": {
                "even": record({"o": {"anyOf": [{"$ref": "#/$defs/odd"}, {"type": "null"}]}}),
                "odd": record({"e": {"anyOf": [{"$ref": "#/$defs/even"}, {"type": "null"}]}}),
            }
        },
    ]


def _as_sent() -> list[Schema]:
    """Schemas of the shapes that pydantic, zod and people make."""
    address = record({"street": SHORT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
    person = record(
        {
            "name": {"type": "string", "title": "Name", "description": "full", "maxLength": 10},
            "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
            "email": {"type": "string", "format": "email"},
            "address": {"$ref": "#/$defs/Address"},
            "tags": listed({"type": "string", "enum": ["new", "vip", "old"]}),
        },
        title="Person",
        **{"$defs": {"Address": address}},
    )
    step = record({"explanation": SHORT, "output": SHORT})
    event = record({"name": SHORT, "date": {"type": "string", "format": "date"}})
    verdict = {"type": "string", "enum": ["positive", "negative", "neutral"]}
    money = record({"amount": {"type": "number", "minimum": 0, "maximum": 1e6}, "unit": SHORT})
    query: Schema = {
        "anyOf": [
            record({"op": {"const": "eq"}, "field": SHORT, "value": {"type": "string"}}),
            record({"op": {"enum": ["and", "or"]}, "of": listed({"$ref": "#/$defs/q"}, 1, 2)}),
        ]
    }
    edits = record({"path": SHORT, "edits": listed(record({"old": SHORT, "new": SHORT}), 1, 2)})
    return [
        person,
        record({"steps": listed(step, 1, 2), "final_answer": SHORT}),
        record({"events": listed(event)}),
        record(
            {"sentiment": verdict, "confidence": {"type": "number", "minimum": 0, "maximum": 1}}
        ),
        record({"total": money, "lines": listed(money)}),
        {"$defs": {"q": query}, "$ref": "#/$defs/q"},
        edits,
        record(
            {"matrix": listed(listed({"type": "number", "minimum": 0, "maximum": 1}, 2, 2), 2, 2)}
        ),
        record(
            {"id": {"type": "string", "format": "uuid"}, "when": {"format": "date-time"}}, "when"
        ),
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **record({"ok": YES})},
        {"$comment": "x", "examples": [1], "default": 2, "deprecated": True, **DIGIT},
        record(
            {"children": listed(person | {"$defs": {}, "properties": {}, "required": []}, 0, 1)}
        ),
        record({f"column_{i}": {"anyOf": [DIGIT, {"type": "null"}]} for i in range(20)}),
        record({"free": {"type": "string"}}),
        record(
            {"map": {"type": "object", "additionalProperties": listed(DIGIT), "maxProperties": 2}}
        ),
    ]


def schemas() -> dict[str, Schema]:
    """All schemas, by their names."""
    families = {
        "string": _strings(),
        "number": _numbers(),
        "value": _values(),
        "array": _arrays(),
        "object": _objects(),
        "combined": _combined(),
        "reference": _references(),
        "as sent": _as_sent(),
    }
    named = {f"{kind} {i}": each for kind, of in families.items() for i, each in enumerate(of)}
    # Most of them once more within an object, as an API asks for.
    return named | {
        f"{name}, in an object": record({"before": YES, "value": schema, "after": SHORT}, "before")
        for name, schema in named.items()
        if "$defs" not in schema and "definitions" not in schema and name != "reference 6"
        if name.split()[0] in ("string", "number", "value", "array")
    }
