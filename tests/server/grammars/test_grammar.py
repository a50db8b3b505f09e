"""Grammars of answers: what they allow, what is refused, and the same tokens in every company."""

import contextlib
import functools
import json

import jsonschema
import numpy as np
import pytest
from helpers_generate import narrow, tokens_of
from helpers_serving import Sequences, bundled

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.decoding.sampling import Sampling, SeededSampler
from mlx_qwen3next.errors import FieldError
from mlx_qwen3next.server.answers.reader import parse
from mlx_qwen3next.server.grammars.answer import Schema, Wanted, answer_grammar
from mlx_qwen3next.server.grammars.compiled import Grammars

SHORT = {"type": "string", "maxLength": 4}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
CLOSED = {"type": "object", "additionalProperties": False}
POINT = {**CLOSED, "properties": {"x": DIGIT, "y": DIGIT}, "required": ["x"]}
SCHEMAS = [
    {"type": "object"},
    {"type": "string", "pattern": "^[a-z]{2}-\\d+$", "maxLength": 6},
    {"type": "string", "format": "date", "minLength": 2},
    {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2},
    {"type": "integer", "multipleOf": 3},
    {"enum": ["a", "ab", 1, None, [1, {}]]},
    {"const": 'a "ü"\n'},
    {"type": ["string", "null", "boolean"], "maxLength": 3},
    {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 1},
    {"type": "array", "items": {"anyOf": [DIGIT, POINT]}, "minItems": 1, "maxItems": 3},
    {"type": "object", "additionalProperties": DIGIT, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a": SHORT}, "additionalProperties": False},
    {"oneOf": [{"type": "string", "maxLength": 2}, DIGIT]},
    {"allOf": [{"minimum": 3, "type": "integer"}, {"maximum": 5}]},
    {"$defs": {"n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/l"}]}, "l": {
        **CLOSED, "properties": {"v": DIGIT, "n": {"$ref": "#/$defs/n"}}, "required": ["v", "n"]
    }}, "$ref": "#/$defs/l"},
]  # fmt: skip
PERSON = {**CLOSED, "properties": {"name": SHORT, "at": POINT}, "required": ["name", "at"]}
TOOLS = {
    "find": {
        "properties": {
            "text": SHORT,
            "kind": {"enum": ["file", "folder"]},
            "depth": {"type": ["integer", "null"], "minimum": 1, "maximum": 30},
            "at": {"$ref": "#/$defs/point"},
            "name": {"anyOf": [{"type": "string", "pattern": "^[a-z]{1,3}$"}, {"type": "null"}]},
            "where": {"anyOf": [SHORT, {"type": "array", "items": DIGIT, "maxItems": 2}]},
            "deep": {"type": "boolean"},
        },
        "required": ["text", "at", "kind"],
        "$defs": {"point": POINT},
        "type": "object",
    },
    "find_all": {"type": "object", "properties": {}, "additionalProperties": False},
    "referred": {"$ref": "#/$defs/args", "$defs": {"args": POINT | {"required": ["y"]}}},
}
FORMATS = pytest.mark.parametrize("format", ["xml", "json"])


def tools(**strict):
    return [
        {"function": {"name": name, "parameters": schema, **strict}}
        for name, schema in TOOLS.items()
    ]


@functools.cache
def grammars():
    model, tokenizer = bundled()
    return Grammars(tokenizer, model.args.vocab_size + 40)  # logits without a token


@functools.cache
def lengths():
    return np.array([len(bundled()[1].decode([token])) or 99 for token in range(4096)])


def written(wanted, format="json", reasoning="none"):
    """The grammar of answers that are wanted, checked."""
    grammar = answer_grammar(wanted, format, reasoning, grammars().is_token)
    grammars().check(grammar)
    return grammar.text


def allowed(mask):
    return np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]


def walked(grammar, seed, most=400):
    """A text that the grammar allows, drawn with a liking for short tokens; None if it is long."""
    rng, constraint, tokens = np.random.default_rng(seed), grammars().constraint(grammar, 0), []
    ends = bundled()[1].eos_token_ids
    while len(tokens) < most:
        choices = allowed(constraint.masks([])[0])
        if rng.random() < 0.8:
            choices = choices[lengths()[choices] <= 2] if any(lengths()[choices] <= 2) else choices
        tokens.append(int(rng.choice(choices)))
        constraint.accept(tokens[-1])
        if tokens[-1] in ends:
            assert set(allowed(constraint.masks([])[0])) <= {*ends}
            return bundled()[1].decode(tokens[:-1])
    return None


def accepts(grammar, text):
    """Whether the grammar allows a text as the whole answer."""
    tokens = [*bundled()[1].encode(text), bundled()[1].eos_token_id]
    constraint = grammars().constraint(grammar, 0)
    masks = constraint.masks(tokens)
    return all(token in allowed(mask) for token, mask in zip(tokens, masks, strict=False))


# --- JSON -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_answers_fit_the_schema(schema):
    grammar = written(Wanted(json=Schema("s", "s", schema)))
    texts = [walked(grammar, seed) for seed in range(6)]
    for text in filter(None, texts):
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    assert any(texts)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"items": {"not": {}}}}}, "#/properties/a/items"),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": {"pattern": "(?=a)", "type": "string"}}},
            "#/$defs/x",
        ),
        ({"type": "string", "format": "uri-reference"}, "# "),
        ({"$ref": "https://example.com/x.json"}, "# "),
        ({"$ref": "#/$defs/none"}, "# "),
        ({"anyOf": [{"type": "integer", "minimum": 2, "maximum": 1}]}, "#/anyOf/0"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}}, "#/items"),
        ({"$defs": {"a": {"allOf": [{"$ref": "#"}]}}, "$ref": "#/$defs/a"}, "# "),
        (
            {
                "items": {
                    "type": "object",
                    "properties": {"a": {"$ref": "#/items"}},
                    "required": ["a"],
                }
            },
            "#/items needs itself",
        ),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "nothing can"),
        ({"enum": ["x" * 300_000]}, "262144 bytes"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_place(schema, place):
    with pytest.raises(ValueError) as error:
        written(Wanted(json=Schema("text.format.schema", "text.format.schema", schema)))
    assert place in str(error.value)
    assert "\n" not in str(error.value)
    if isinstance(error.value, FieldError):
        assert error.value.param == "text.format.schema"
        assert str(error.value).startswith("text.format.schema")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["x", {}], "properties": {"a": {"type": [{}, "string"], "minLength": "a"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": 5},
        {"type": "object", "properties": {"a": {"pattern": "a\\", "type": "string"}}},
        {"type": "object", "properties": {"a": {"enum": 5, "type": "string"}}},
    ],
)
@FORMATS
def test_schemas_that_are_none_are_refused_or_enforced_as_far_as_that_goes(schema, format):
    function = {"name": "f", "parameters": schema}
    with contextlib.suppress(ValueError):
        written(Wanted(tools=[{"function": function}], forced="f"), format)


def test_what_is_not_strict_is_enforced_as_far_as_that_goes():
    schema = {"type": "array", "items": DIGIT, "uniqueItems": True}
    with pytest.raises(FieldError, match="uniqueItems"):
        written(Wanted(json=Schema("s", "s", schema)))
    grammar = written(Wanted(json=Schema("s", "s", schema, is_strict=False)))
    assert accepts(grammar, "[1, 1]") and not accepts(grammar, "[1, 11]")


# --- reasoning ------------------------------------------------------------------------------------
def test_reasoning_comes_first():
    thought, answer = "<think>\nHm, {1} </thin\n</think>\n\n", '{"x": 1}'
    wanted = Wanted(json=Schema("s", "s", POINT))
    for reasoning, right in {
        "none": [answer],
        "possible": [answer, thought + answer, "<think></think>\n\n" + answer],
        "open": [thought.removeprefix("<think>") + answer],
    }.items():
        grammar = written(wanted, reasoning=reasoning)
        texts = [answer, thought + answer, thought.removeprefix("<think>") + answer]
        for text in [*texts, *right]:
            assert accepts(grammar, text) == (text in right), (reasoning, text)
        assert not accepts(grammar, thought) and not accepts(grammar, f"{right[-1]} ")
    spelled = "".join(["</", "think", ">"])  # the end of the reasoning, though no token of its own
    tokens = [token for part in spelled for token in bundled()[1].encode(part)]
    constraint = grammars().constraint(written(wanted, reasoning="open"), 0)
    assert tokens[-1] not in allowed(constraint.masks(tokens[:-1])[-1])
    assert tokens[-2] in allowed(constraint.masks(tokens[:-2])[-1])


# --- calls ----------------------------------------------------------------------------------------
def calls_in(text, format):
    """The calls of an answer, which is nothing else; each is checked against its tool's schema."""
    answer = parse(text, format=format, tools=tools())
    assert (answer.reasoning, answer.content) == (None, None), text
    for call in answer.tool_calls:
        schema = TOOLS[call.name]
        jsonschema.validate(call.arguments, schema, jsonschema.Draft202012Validator)
    return [call.name for call in answer.tool_calls]


@FORMATS
def test_forced_calls_are_valid(format):
    grammar = written(Wanted(tools=tools(), forced=""), format)
    names = set()
    for seed in range(16):
        if text := walked(grammar, seed):
            names.update(found := calls_in(text, format))
            assert found
    assert names == TOOLS.keys()


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("text", ["", "a b", "\n", "null"], ["abcde"]),
        ("free", ["a <b>\n</x>", "</parameter"], ["<tool_call>", "a</function>b", "<parameter=a>"]),
        ("kind", ["file", "folder"], ["", "files", '"file"']),
        ("depth", ["1", "30", "null"], ["", "0", "31", "1.5", '"1"']),
        ("at", ['{"x": 1}', '{"x": 1, "y": 2}'], ["", "{}", '{"x": 10}', "[1]"]),
        ("name", ["a", "abc", "null"], ["", "A", "abcd", '"a"']),
        ("where", ["a", "[1]", "[1, 2]", "a[1]"], ["[1", "[12]", "{", " [x]", "12345"]),
        ("deep", ["true", "false"], ["", "True", "1", '"true"']),
    ],
)
def test_values_in_calls_of_the_xml_form(name, right, wrong):
    properties = TOOLS["find"]["properties"] | {"free": {"type": "string"}}
    parameters = {**TOOLS["find"], "properties": properties, "required": [name]}
    function = {"name": "f", "parameters": parameters}
    grammar = written(Wanted(tools=[{"function": function}], forced="f"), "xml")
    for value in [*right, *wrong]:
        call = f"<tool_call>\n<function=f>\n<parameter={name}>\n{value}\n</parameter>\n</function>"
        assert accepts(grammar, f"{call}\n</tool_call>") == (value in right), value


@FORMATS
def test_one_name_and_one_call_are_enforced(format):
    call = {"xml": "<function={}>\n</function>", "json": '{{"name": "{}", "arguments": {{}}}}'}
    several = Wanted(tools=tools(), forced="find_all")
    text = "<tool_call>\n" + call[format].format("find_all") + "\n</tool_call>"
    other = text.replace("find_all", "find")
    for wanted in (several, Wanted(tools=tools(), forced="find_all", one_call=True)):
        grammar = written(wanted, format)
        assert accepts(grammar, text)
        assert not accepts(grammar, other) and not accepts(grammar, f"Well.\n{text}")
        assert accepts(grammar, f"{text}\n{text}") != wanted.one_call


@FORMATS
def test_strict_tools_bind_calls_and_no_text(format):
    plain = Wanted(tools=tools())
    assert not plain.needs_grammar
    wanted = Wanted(tools=[*tools(strict=True)[1:], *tools()[:1]])
    assert wanted.needs_grammar
    grammar = written(wanted, format)
    form = {
        "xml": "<function={}>\n<parameter=y>\n{}\n</parameter>\n</function>",
        "json": '{{"name": "{}", "arguments": {{"y": {}}}}}',
    }[format]
    call = "<tool_call>\n" + form + "\n</tool_call>"
    for text, right in {
        "Some <b>text</b>, {1}.": True,
        call.format("referred", 3): True,
        f"Look:\n{call.format('referred', 3)}\n{call.format('referred', 4)}": True,
        call.format("referred", 13): False,
        call.format("find_all", 3): False,
        call.format("find", 13): True,  # it is not strict
        call.format("other", 3): False,
        call.format("referred", 3) + "\nSo.": False,
    }.items():
        assert accepts(grammar, text) == right, text


@FORMATS
def test_json_or_calls(format):
    grammar = written(Wanted(Schema("s", "s", POINT), tools()), format)
    call = {
        "xml": "<function=find_all>\n</function>",
        "json": '{"name": "find_all", "arguments": {}}',
    }
    assert accepts(grammar, '{"x": 1}')
    assert accepts(grammar, f"<tool_call>\n{call[format]}\n</tool_call>")
    assert not accepts(grammar, "Some text.") and not accepts(grammar, '{"y": 1}')


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "object", "properties": {"a<b": SHORT}}, "a<b"),
        ({"type": "object", "anyOf": [POINT, PERSON]}, "anyOf"),
        ({"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}, "contains"),
    ],
)
def test_parameters_that_calls_of_the_xml_form_cannot_have(schema, fault):
    function = {"name": "f", "parameters": schema, "strict": True}
    with pytest.raises(FieldError, match="the parameters of the tool 'f'") as error:
        written(Wanted(tools=[{"function": function}], forced="f"), "xml")
    assert fault in str(error.value) and error.value.param == "tools"


# --- following ------------------------------------------------------------------------------------
def test_masks_of_drafts_are_those_of_the_tokens():
    grammar = written(Wanted(json=Schema("s", "s", PERSON)), reasoning="possible")
    tokenizer = bundled()[1]
    tokens = tokenizer.encode('<think>\nA.\n</think>\n\n{"name": "ab", "at": {"x": 1}}')
    tokens += [tokenizer.eos_token_id] * 2
    drafts, plain = grammars().constraint(grammar, 5), grammars().constraint(grammar, 5)
    masks = drafts.masks(tokens)
    for i, token in enumerate(tokens):
        assert np.array_equal(plain.masks([])[0], masks[i])
        assert np.array_equal(drafts.masks(tokens[:i], start=i)[0], masks[i])
        forced = plain.forced()
        assert forced == tokens[i : i + len(forced)]
        assert not forced or [*allowed(masks[i])] == [token]
        plain.accept(token)
    assert masks.shape[1] * 32 >= 4096 + 40
    assert all(allowed(mask).max() < 4096 for mask in masks)
    wrong = drafts.masks([*tokens[:9], tokens[0], *tokens[9:]])
    assert np.array_equal(wrong[:10], masks[:10]) and (wrong[10:] == 2**32 - 1).all()
    with pytest.raises(RuntimeError, match="allows no token"):
        drafts.accept(tokens[3])
    back = [0] * 5
    plain.follow(np.array([*back, *tokens[:7]]))
    assert np.array_equal(plain.masks([])[0], masks[7])


def test_tokens_are_the_same_alone_with_drafts_and_in_batches():
    model, tokenizer = narrow()
    prompt = tokenizer.encode("def f(x):")
    grammar = written(Wanted(json=Schema("s", "s", PERSON)))
    samplers = {None: Sampling(), 7: Sampling(temp=1.5), 8: Sampling(temp=1.5, top_k=20)}

    def start(key):
        sampling = samplers[key]
        sampler = sampling.sampler()
        sampler = sampler if key is None else SeededSampler(sampler, key)
        return {"sampler": sampler, "processors": [grammars().constraint(grammar, len(prompt))]}

    def alone(key, depth):
        sequences = Sequences(model, depth)
        uid = sequences.insert(prompt, 24, **start(key))
        return sequences.run()[uid]

    plain = {key: alone(key, FixedDepth()) for key in samplers}
    assert len({*map(tuple, plain.values())}) == 3
    greedy = grammars().constraint(grammar, len(prompt))
    steps = generate_step(prompt, model, max_tokens=24, mtp="off", logits_processors=[greedy])
    assert tokens_of(steps) == plain[None]
    for depth in (FixedDepth(2), FixedDepth(0, 7)):
        for key in samplers:
            assert alone(key, depth) == plain[key]
    # The first is alone at times: it moves into the batch, and out of it again.
    sequences = Sequences(model, FixedDepth(2, 3))
    uids = {None: sequences.insert(prompt, 24, **start(None))}
    for _ in range(6):
        sequences.step()
    uids[7] = sequences.insert(prompt, 9, **start(7))
    for _ in range(3):
        sequences.step()
    uids[8] = sequences.insert(prompt, 24, **start(8))
    told = sequences.run()
    assert {key: told[uid] for key, uid in uids.items()} == plain | {7: plain[7][:9]}
