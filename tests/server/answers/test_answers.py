"""The reader of answers: cases with their right values, calls written and read back, damage.

answer_cases.json has a case a line: the text of an answer, the form that the template teaches
(``format``), the list of tools that was asked for (``tools``, a key of the file's ``tools``, or
null), whether the template opened the reasoning, and the answer to expect. To add one, write its
line; blanks at both ends of reasoning and content do not count.
"""

import json
import random
from pathlib import Path

import pytest

from mlx_qwen3next.server.answers.argument_values import Parameters
from mlx_qwen3next.server.answers.events import Answer, ArgumentText, CallBegun, Text
from mlx_qwen3next.server.answers.reader import Reader, parse

CASES = json.loads(Path(__file__).with_name("answer_cases.json").read_text())
PROPERTIES = {
    **{"path": {"type": "string"}, "content": {"type": "string"}, "n": {"type": "integer"}},
    **{"x": {"type": "number"}, "b": {"type": "boolean"}, "o": {"type": "object"}},
    **{"l": {"type": "array"}, "os": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
    "any": True,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
    for name, properties in (("write", PROPERTIES), ("g", {}), ("mcp__a-b.c", PROPERTIES))
]


def in_pieces(text, sizes, **options):
    """The answer of a text that comes in pieces."""
    reader, events, at = Reader(**options), [], 0
    while at < len(text):
        n = next(sizes)
        events += reader.add(text[at : at + n])
        at += n
    return Answer.of(events + reader.end())


def cuts(rng, most):
    while True:
        yield rng.randint(1, most)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_cases_whole_and_in_pieces(case):
    tools = CASES["tools"][case["tools"]] if case["tools"] else None
    options = {"format": case["format"], "reasoning_open": case["reasoning_open"], "tools": tools}
    answer = parse(case["text"], **options)
    for name in ("reasoning", "content"):
        expected = (case["expect"][name] or "").strip()
        assert ((getattr(answer, name) or "").strip()) == expected
        assert getattr(answer, name) is None or getattr(answer, name).strip()
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    assert json.dumps(calls) == json.dumps(case["expect"]["tool_calls"])  # 5 and 5.0 differ
    rng = random.Random(case["name"])
    for most in (1, 2, 5, 20, 20, 20):
        assert in_pieces(case["text"], cuts(rng, most), **options) == answer


# --- calls that are written and read back --------------------------------------------------------
CALL = """<tool_call>
<function=write>
<parameter=path>
/x
</parameter>
<parameter=content>
hi
</parameter>
</function>
</tool_call>"""
# In values; a call's opening tags that stand alone on their lines begin a call within the value.
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "</function>", "<parameter=x1>", "</parameter>", CALL),
    *("a <function=write> b", "\n", "\n\n", " ", "a", "text ", "```", '{"a": 1}', "é🎉", "<think>"),
    *("</think>", "<", "</", "</par", "<|im_end|>", "\\n", '"', "\\", "\t", "<div>", "</div>"),
]


def random_text(rng):
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(0, 12)))


def random_value(rng, name):
    number = [0, 5, -3, 10**30, 175928847299117063]
    return {
        "n": lambda: rng.choice(number),
        "x": lambda: rng.choice([1.5, -2e10, 3, 0.1]),
        "b": lambda: rng.random() < 0.5,
        "o": lambda: {random_text(rng): [1, 2.5, None, random_text(rng)] for _ in range(2)},
        "l": lambda: [random_text(rng) for _ in range(rng.randint(0, 3))],
        "os": lambda: rng.choice([None, f"abc {random_text(rng)}"]),
    }.get(name, lambda: random_text(rng))()


def random_calls(rng):
    for _ in range(rng.choice([1, 1, 2, 3])):
        names = rng.sample(list(PROPERTIES), rng.randint(0, 4))
        name = rng.choice(["write", "write", "g", "mcp__a-b.c"])
        yield name, {p: random_value(rng, p) for p in names if name != "g"}


def as_xml(calls):
    """Calls in the form of Qwen3-Coder's template."""

    def shown(value):
        if isinstance(value, (dict, list)):
            return json.dumps(value, ensure_ascii=False)
        return "null" if value is None else str(value)

    written = []
    for name, arguments in calls:
        parts = [f"<parameter={p}>\n{shown(v)}\n</parameter>\n" for p, v in arguments.items()]
        written.append(f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>")
    return "\n".join(written)


def as_json(calls):
    """Calls in the form of the templates of Instruct and Thinking."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def ambiguous(arguments):
    """Whether a value holds what reads as the end of its call, before other text on its line."""
    return any(
        "</parameter>" in "".join(text.split()) + "</parameter>"
        and any(
            f"</parameter>{end}" in "".join(text.split()) for end in ("</function>", "</tool_call>")
        )
        for value in arguments.values()
        if isinstance(value, str)
        for text in [value.replace(CALL, "")]
    )


@pytest.mark.parametrize("form", ["xml", "json"])
def test_random_calls_are_read_back_as_they_were_written(form):
    rng = random.Random(5)
    count = 0
    while count < 5_000:
        calls = list(random_calls(rng))
        if form == "xml" and any(ambiguous(arguments) for _, arguments in calls):
            continue
        before = rng.choice(["", "", "I do.\n", "Let me <see>.\n\n"])
        text = before + (as_xml if form == "xml" else as_json)(calls)
        answer = parse(text, format=form, tools=TOOLS)
        read = [(call.name, call.arguments) for call in answer.tool_calls]
        assert json.dumps(read) == json.dumps(calls), text
        assert (answer.content or "").strip() == before.strip()
        if count % 20 == 0:
            assert in_pieces(text, cuts(rng, 5), format=form, tools=TOOLS) == answer, text
        count += len(calls)


# --- damage --------------------------------------------------------------------------------------
def damaged(rng, text):
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randint(0, len(text)), rng.randint(0, 12)
        kind = rng.randint(0, 3)
        if kind == 0:
            text = text[:at] + text[at + n :]
        elif kind == 1:
            text = text[:at] + rng.choice(FRAGMENTS) + text[at:]
        elif kind == 2:
            text = text[:at]
        else:
            text = text[:at] + text[at : at + n] * 2 + text[at + n :]
    return text


def test_damaged_answers_lose_nothing():
    """No exception, and every character is in the reasoning, the content or a call's text."""
    rng = random.Random(6)
    for i in range(5_000):
        form = rng.choice(["xml", "json"])
        calls = list(random_calls(rng))
        thought = rng.choice(["", "<think>\nHm.\n</think>\n\n"])
        text = thought + "Yes.\n" + (as_xml if form == "xml" else as_json)(calls)
        text = damaged(rng, text)
        tools, is_open = rng.choice([None, TOOLS, TOOLS]), rng.random() < 0.2
        options = {"format": form, "tools": tools, "reasoning_open": is_open}
        answer = parse(text, **options)
        assert tools is not None or not answer.tool_calls
        read = [answer.reasoning or "", answer.content or ""]
        read += [call.text for call in answer.tool_calls]
        lost = len("".join(text.split())) - len("".join("".join(read).split()))
        assert 0 <= lost <= len("<think></think>"), text  # the tags around the reasoning
        if i % 20 == 0:
            assert in_pieces(text, cuts(rng, 5), **options) == answer, text


# --- streaming -----------------------------------------------------------------------------------
def test_what_is_certain_is_sent_at_once():
    reader = Reader(format="xml", tools=TOOLS)
    assert reader.add("I write.\n\n<tool_call>\n<function=wri") == [Text("I write.")]
    assert reader.is_holding
    assert reader.add("te>\n<parameter=content>\n") == [
        *(CallBegun("write"), ArgumentText('{"content": "')),
    ]
    assert reader.add("one\ntwo") == [ArgumentText("one\\ntwo")]
    assert reader.add(" three\n</para") == [ArgumentText(" three")]
    assert reader.add("graph>") == [ArgumentText("\\n</paragraph>")]


def test_no_time_is_lost_on_long_values():
    """A long file, token by token: the reader does not look at it again and again."""
    reader, looked = Reader(format="xml", tools=TOOLS), 0
    reader.add("<tool_call>\n<function=write>\n<parameter=content>\n")
    for _ in range(20_000):
        reader.add("x <b> ")
        looked = max(looked, len(reader._text))
    assert looked < 20


# --- values --------------------------------------------------------------------------------------
SCHEMA = {
    "$defs": {"Level": {"enum": [1, 2, 3]}, "Loop": {"$ref": "#/$defs/Loop"}},
    "properties": {
        "level": {"$ref": "#/$defs/Level"},
        "loop": {"$ref": "#/$defs/Loop"},
        "word": {"enum": ["1", "2"]},
        "all": {"allOf": [{"type": ["integer", "string"]}, {"type": "integer"}]},
        "either": {"anyOf": [{"type": "array"}, {"type": "string"}]},
        "odd": {"type": 7, "anyOf": "x", "enum": 3, "$ref": ["#"]},
        "yes": True,
        "no": False,
        "float": {"type": "number"},
        "int": {"type": "integer"},
    },
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("level", "2", 2),
        ("loop", "2", "2"),
        ("word", "2", "2"),
        ("all", "2", 2),
        ("either", '["a"]', ["a"]),
        ("either", "a [b]", "a [b]"),
        ("yes", "2", "2"),
        ("no", "2", "2"),
        ("missing", "2", "2"),
        ("float", "1e400", "1e400"),
        ("float", "-0.5", -0.5),
        ("int", "9" * 300, int("9" * 300)),
        ("int", "9" * 5000, "9" * 5000),
        ("int", "007", "007"),
        ("int", "3.0", 3),
    ],
)
def test_values_by_their_schema(name, text, value):
    got = Parameters(SCHEMA).value(name, text)
    assert (type(got), got) == (type(value), value)


def test_schemas_that_are_none_are_taken():
    assert Parameters(SCHEMA).value("odd", "2") in ("2", 2)
    for schema in (None, True, [], "x", {"properties": []}, {"properties": {"a": None}}):
        assert Parameters(schema).value("a", "2") == "2"
