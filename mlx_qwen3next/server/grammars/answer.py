"""Writes the grammar of an answer, in llguidance's variant of Lark.

An answer may begin with its reasoning. After that come calls, JSON that fits a schema, or text.
The calls have the form that the model's template teaches (:mod:`mlx_qwen3next.server.answers`),
with the names of the tools and arguments that fit their schemas. All is written as templates write
it, with one blank after colons and commas, so that much of it is forced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..answers.calls import Format
from .parameters import ParameterRules
from .rules import Rules, literal

# Beside text that is no call, nor a part of one.
_ANY, _NO_THOUGHT_END = "/(?s:.*)/", r"~/(?s:.*)<\/think>(?s:.*)/"

Thought = Literal["open", "possible", "none"]  # the reasoning that an answer begins with


class Schema(NamedTuple):
    """A schema that an answer, or a part of it, has to fit.

    Args:
        name: says in messages which schema it is.
        param: the field of the request that holds it.
        value: the schema itself.
        is_strict: whether keywords that cannot be enforced are refused, or else ignored.
    """

    name: str
    param: str
    value: Any
    is_strict: bool = True


@dataclass(frozen=True)
class Wanted:
    """The answers that are wanted.

    Args:
        json: the schema of the JSON that the answer is, unless it is calls; None for any text.
        tools: that it may call, in OpenAI's form.
        forced: the name of the tool that it has to call, "" for any, None for none.
        one_call: whether there is one call at most.
    """

    json: Schema | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    forced: str | None = None
    one_call: bool = False

    @property
    def needs_grammar(self) -> bool:
        """Whether they are more than any text, with calls or without."""
        strict = any(tool["function"].get("strict") is True for tool in self.tools)
        return self.json is not None or self.forced is not None or strict


@dataclass(frozen=True)
class AnswerGrammar:
    """The grammar of an answer.

    Args:
        text: the grammar.
        schemas: those that it holds.
    """

    text: str
    schemas: list[Schema]


def answer_grammar(
    wanted: Wanted, format: Format, reasoning: Thought, is_token: Callable[[str], bool]
) -> AnswerGrammar:
    """Writes the grammar of the answers that are wanted.

    Args:
        format: the form of calls.
        reasoning: whether the answer begins within its reasoning, or may begin with it.
        is_token: tells of a tag whether it is a token of its own.

    Raises:
        FieldError: calls of this form cannot fit the schema of a tool.
    """
    rules, schemas = Rules(), list[Schema]()

    def tag(name: str) -> str:
        return name if is_token(name) else literal(name)

    def json_of(schema: Schema) -> str:
        schemas.append(schema)
        return rules.json(schema.value, schema.is_strict)

    def call(function: Mapping[str, Any]) -> str:
        """A call, whose arguments fit the tool's schema if they have to."""
        name, is_strict = function["name"], function.get("strict") is True
        holds = is_strict or wanted.forced is not None
        parameters = function.get("parameters") if holds else None
        schema = Schema(f"the parameters of the tool {name!r}", "tools", parameters, is_strict)
        if format == "json":
            head = literal(f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
            closed = {"type": "object"} if parameters is None else _closed(parameters)
            arguments, end = json_of(schema._replace(value=closed)), literal("}\n")
        else:
            head, end = literal(f"\n<function={name}>\n"), literal("</function>\n")
            arguments = ParameterRules(rules, schema.name, parameters, is_strict).write()
            schemas.extend([schema] if parameters is not None else [])
        parts = [tag("<tool_call>"), head, arguments, end, tag("</tool_call>")]
        return rules.add("call", " ".join(filter(None, parts)))

    content = [] if wanted.json is None or wanted.forced is not None else [json_of(wanted.json)]
    if calls := [
        call(tool["function"])
        for tool in wanted.tools
        if wanted.forced in (None, "", tool["function"]["name"])
    ]:
        one = rules.add("any", " | ".join(calls))
        several = one if wanted.one_call else rf'{one} ("\n" {one})*'
        is_free = wanted.forced is None and wanted.json is None
        content.append(f"({rules.plain()})? ({several})?" if is_free else several)
    answer = rules.add("answer", " | ".join(content))
    if reasoning == "none":
        return AnswerGrammar(rules.text(answer), schemas)
    thought = rules.ended(f"{_ANY} & {_NO_THOUGHT_END}", tag("</think>"), "\n\n")
    opening = "" if reasoning == "open" else tag("<think>")
    optional = "" if reasoning == "open" else "?"
    return AnswerGrammar(rules.text(f"({opening} {thought}){optional} {answer}"), schemas)


def _closed(schema: Any) -> Any:
    """A tool's schema without arguments that it does not name, where it says nothing of them."""
    says = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
    if not isinstance(schema, Mapping) or "properties" not in schema or says & schema.keys():
        return schema
    return {**schema, "additionalProperties": False}
