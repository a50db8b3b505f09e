"""JSON as models write it: valid JSON as it comes, mistakes mended, calls that stream."""

import json
import random

import pytest
from test_answers import TOOLS, cuts, in_pieces, random_value

from mlx_qwen3next.server.answers.events import ArgumentText, CallBegun, CallEnded
from mlx_qwen3next.server.answers.json_text import NOTHING, MendedJSON, load_mended
from mlx_qwen3next.server.answers.reader import Reader, parse

HEAD = '<tool_call>\n{"name": "write", "arguments": '
END = "}\n</tool_call>"
NEXT = '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


def mended(text, sizes):
    """The JSON text that comes out in all, with the rest of the text and whether it is a guess."""
    reader, out, waiting, at = MendedJSON(), "", "", 0
    while at < len(text) or not reader.is_done:
        n = next(sizes)
        waiting += text[at : at + n]
        at += n
        certain, read = reader.read(waiting, final=at >= len(text))
        out, waiting = out + certain, waiting[read:]
        if reader.is_done:
            break
    return out, waiting + text[at:], reader.is_guess


def test_valid_json_comes_out_as_it_is():
    rng = random.Random(8)
    for i in range(1_000):
        names = rng.sample(["o", "l", "os", "n", "x", "b", "any"], rng.randint(0, 5))
        value = {name: random_value(rng, name) for name in names}
        text = json.dumps(value, ensure_ascii=i % 2 == 0, indent=rng.choice([None, 2]))
        expected = (json.dumps(value, ensure_ascii=False), " }", False)
        assert mended(f" {text} }}", cuts(rng, rng.choice([1, 3, 30]))) == expected, text


@pytest.mark.parametrize(
    ("text", "arguments", "rest"),
    [
        ('{"a": 1,}', '{"a": 1}', ""),
        ('{"a": "\\d\\u12 \\\\d\n"}', '{"a": "\\\\d\\\\u12 \\\\d\\n"}', ""),
        ('{"a": "\\ud83c\\udf89 \\ud83c\\ud83c\\udf89"}', '{"a": "🎉 \ufffd🎉"}', ""),
        ('{"a": "\\ud83c", "b\\udf89": 1}', '{"a": "\ufffd", "b\ufffd": 1}', ""),
        ('{"n": -0, "x": 1.50e3}', '{"n": -0, "x": 1.50e3}', ""),
        ('{"n": 1e400, "m": NaN}', '{"n": "1e400", "m": "NaN"}', ""),
        (f'{{"n": {"7" * 4000}}}', f'{{"n": {"7" * 4000}}}', ""),
        (f'{{"n": {"7" * 4001}}}', f'{{"n": "{"7" * 4001}"}}', ""),
        (f'{{"x": {"7" * 400}.5}}', f'{{"x": "{"7" * 400}.5"}}', ""),
        ('{"a": True, "b": [None, .5]}', '{"a": true, "b": [null, 0.5]}', ""),
        ("{'a': 'it\\'s \"', b: c}", '{"a": "it\'s \\"", "b": "c"}', ""),
        ('{"a": "print("hi")", "b": 1}', '{"a": "print(\\"hi\\")", "b": 1}', ""),
        ('{"a": , "b": [1, 2}, "c"', '{"a": null, "b": [1, 2]}', ', "c"'),
        ('{"a": [1, {"b": "x', '{"a": [1, {"b": "x"}]}', ""),
        ('{"a": "x\\', '{"a": "x\\\\"}', ""),
        ('{"a": "x\\ud83c', '{"a": "x\ufffd"}', ""),
        ('{"a": ', '{"a": null}', " "),
        ('{"a": 1, "b', '{"a": 1}', ' "b'),
        ('{"a": 1 2}', '{"a": 1}', "2}"),
        ('{"a" 1}', "{}", '"a" 1}'),
        (f"{'[' * 300}]", f"{'[' * 200}{']' * 200}", f"{'[' * 100}]"),
        # Strings without their last quote end with the call, if nothing but calls follows it.
        (f'{{"a": "x}}{END}{NEXT}', '{"a": "x}}"}', f"</tool_call>{NEXT}"),
        ('{"a": "x\n\n</tool_call>\n', '{"a": "x"}', "</tool_call>\n"),
        ('{"a": "x\n</tool_call>\ny\n', '{"a": "x\\n</tool_call>\\ny\\n"}', ""),
        ('{"a": "x"</tool_call>', '{"a": "x"}', "</tool_call>"),
        ('{"a": "x"</tool>"}', '{"a": "x\\"</tool>"}', ""),
    ],
)
def test_mistakes_are_mended_in_the_same_way_in_any_pieces(text, arguments, rest):
    json.loads(arguments)
    rng = random.Random(9)
    for sizes in (iter([len(text)]), *(cuts(rng, most) for most in (1, 1, 2, 3, 7))):
        assert mended(text, sizes)[:2] == (arguments, rest)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': True, 'b': (1,)}", {"a": True, "b": [1]}),
        ('{"a": "\\ud83c"}', {"a": "\ufffd"}),
        ('{"a": "\\d\n", "b": [1,],}', {"a": "\\d\n", "b": [1]}),
        ('{"a": "x" y"}', NOTHING),
        ('{"a": 1', NOTHING),
        ('{"a": 1} 2', NOTHING),
        ('{"a": 1e400}', NOTHING),
        ('{"a": NaN}', NOTHING),
        (f"{'[' * 100_000}", NOTHING),
    ],
)
def test_whole_values_are_not_guessed(text, value):
    assert load_mended(text) == value


# --- calls ---------------------------------------------------------------------------------------
def test_arguments_after_the_name_of_a_tool_are_sent_as_they_come():
    reader = Reader(format="json", tools=TOOLS)
    assert reader.add(HEAD) == []
    assert reader.add('{"content": "one\\') == [
        *(CallBegun("write"), ArgumentText('{"content": "one')),
    ]
    assert reader.add("n</tool_call> 2") == [ArgumentText("\\n</tool_call> 2")]
    assert reader.add('"') == []
    assert reader.add(',\n"n": 12') == [ArgumentText('", "n": ')]
    assert reader.add("3") == []
    assert reader.add("}") == [ArgumentText("123}")]
    assert reader.add(', "id": "x"}\n</tool_call') == []
    (ended,) = reader.add(">")
    assert isinstance(ended, CallEnded)
    assert ended.text.startswith(HEAD) and ended.text.endswith(', "id": "x"}\n</tool_call>')
    assert reader.end() == []


@pytest.mark.parametrize(
    "text",
    [
        '{"arguments": {"n": 1}, "name": "write"}',
        '{"name": "write", "arguments": "{\\"n\\": 1}"}',
        '{"name": "write", "parameters": {"n": 1}}',
        '{"function": {"name": "write", "arguments": {"n": 1}}}',
        '[{"name": "write", "arguments": {"n": 1}}]',
        '{"name": "unknown", "arguments": {"n": 1}}',
    ],
)
def test_nothing_is_sent_before_it_is_certain(text):
    reader = Reader(format="json", tools=TOOLS)
    events = [event for character in f"<tool_call>\n{text}" for event in reader.add(character)]
    assert not events
    answer = parse(f"<tool_call>\n{text}\n</tool_call>", format="json", tools=TOOLS)
    assert [call.arguments for call in answer.tool_calls] == [{"n": 1}]


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        ('{"n": 1}', [("write", {"n": 1})], None),  # cut off
        (f'{{"n": 1{END}{NEXT}', [("write", {"n": 1}), ("g", {})], None),
        (f'{{"n": 1\n</tool_call>{NEXT}', [("write", {"n": 1}), ("g", {})], None),
        (f'{{"content": "x{END}{NEXT}', [("write", {"content": "x}"}), ("g", {})], None),
        (f'{{"n": 1}} huh {END}', [("write", {"n": 1})], "huh }\n</tool_call>"),
        (f'{{"n": 1 2}}{END}', [("write", {"n": 1})], "2}}\n</tool_call>"),
        (f'{{"n": 1}}, "arguments": {{"n": 2}}{END} So.', [("write", {"n": 1})], "So."),
        (f"[1]{END}", [], f"{HEAD}[1]{END}"),
    ],
)
def test_a_call_that_has_begun_is_ended_and_other_text_stays_text(text, calls, content):
    options = {"format": "json", "tools": TOOLS}
    answer = parse(HEAD + text, **options)
    assert [(call.name, call.arguments) for call in answer.tool_calls] == calls
    assert (answer.content or "").strip() == (content or "")
    rng = random.Random(10)
    for most in (1, 3, 20):
        assert in_pieces(HEAD + text, cuts(rng, most), **options) == answer


def test_no_time_is_lost_on_long_strings():
    reader = Reader(format="json", tools=TOOLS)
    reader.add(HEAD + '{"content": "')
    looked = 0
    for _ in range(20_000):
        reader.add('x <b> \\"y\\" \n')
        looked = max(looked, len(reader._text))
    assert looked < 20
