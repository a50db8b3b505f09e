"""A server whose tiny model says what a script holds, and a record of what it was asked."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from helpers_generate import forced
from helpers_scripted import TINY
from helpers_serving import running, served
from helpers_templates import CODER
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.server.engine.engine import Engine
from mlx_qwen3next.server.requests.prompt import Chat

CONTEXT = 131_072  # tokens


class Call(NamedTuple):
    """A call of a tool, which an agent may name in one of several ways."""

    name: str
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        """The call as Coder writes it."""
        values = (
            (name, value if isinstance(value, str) else json.dumps(value))
            for name, value in self.arguments.items()
        )
        parameters = (f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values)
        return (
            f"<tool_call>\n<function={self.name}>\n{''.join(parameters)}</function>\n</tool_call>"
        )


@dataclass
class Turn:
    """A request and the tokens that answer it."""

    prompt: Any
    request: Any
    answer: list[int]


@functools.cache
def _model() -> tuple[Any, Any]:
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer._tokenizer.chat_template = CODER
    fields = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    model = Model(Config.from_dict(fields))
    mx.eval(model.parameters())
    return model.eval(), tokenizer


class ScriptedEngine(Engine):
    """An engine whose model gives a first answer, and a second after the result of the first."""

    first: Call | str
    second: Call | str | None

    def __init__(self, *args: Any):
        self.turns: list[Turn] = []
        super().__init__(*args)

    def _read(self, prompt: Any, *args: Any) -> Any:
        request = super()._read(prompt, *args)
        tokenizer = _model()[1]
        text = self._answer(prompt).removeprefix(request.context.opening)
        answer = tokenizer.encode(text, add_special_tokens=False)
        answer.append(tokenizer.eos_token_id)
        request.processors = [forced(answer, len(request.tokens)), *request.processors]
        self.turns.append(Turn(prompt, request, answer))
        return request

    def _answer(self, prompt: Any) -> str:
        if self._is_back(prompt):
            return self._said(prompt, self.second)
        if not isinstance(self.first, Call) or _offers(prompt, self.first):
            return self._said(prompt, self.first)
        return "Yes."  # a question aside, such as for a title

    def _said(self, prompt: Any, answer: Call | str | None) -> str:
        if not isinstance(answer, Call):
            return answer or ""
        return answer.text if prompt.forced is not None else f"Let me see.\n\n{answer.text}"

    def _is_back(self, prompt: Any) -> bool:
        """Whether a prompt holds the first answer."""
        if self.second is None or not isinstance(prompt, Chat):
            return False
        if isinstance(self.first, Call):
            return _offers(prompt, self.first) and prompt.messages[-1]["role"] == "tool"
        return any(
            message["role"] == "assistant" and message["content"].strip() == self.first.strip()
            for message in prompt.messages
        )

    @property
    def second_turn(self) -> Turn | None:
        """The first request that holds the first answer."""
        return next((turn for turn in self.turns if self._is_back(turn.prompt)), None)

    def counts(self) -> tuple[int, ...]:
        """The tokens of the second turn: of its prompt; as many as begin it as the first turn and
        its answer do; known; processed; and new, by which it is longer than those."""
        at = self.turns.index(turn := self.second_turn)
        said = (isinstance(self.first, Call) and self.first.text) or self.first
        firsts = [each for each in self.turns[:at] if self._answer(each.prompt).endswith(said)]
        prompt, before = turn.request.context.prompt, firsts[-1]
        known, text = turn.request.context.cached, before.request.context.prompt + before.answer
        same = sum(itertools.takewhile(bool, map(operator.eq, prompt, text)))
        return len(prompt), same, known, len(prompt) - known, len(prompt) - len(text)


def _offers(prompt: Any, call: Call) -> bool:
    """Whether a prompt has the tool of a call."""
    tools = (isinstance(prompt, Chat) and prompt.tools) or []
    return any(tool["function"]["name"] == call.name for tool in tools)


@contextlib.contextmanager
def serving(first: Call | str, second: Call | str | None) -> Iterator[tuple[ScriptedEngine, str]]:
    """An engine with a script, and the address of its server.

    Args:
        second: None if there is no second turn.
    """
    with running(load=_model, engine=ScriptedEngine) as engine, served(engine) as listening:
        engine.first, engine.second = first, second
        host, port = listening.server_address[:2]
        yield engine, f"http://{host}:{port}"
