"""From a checked request to its prompt, and to the prompt's tokens by the chat template."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import FieldError
from ..answers.calls import Format, call_format, call_opening
from ..grammars.answer import Schema, Thought, Wanted
from ..grammars.compiled import is_available

_MARK = re.compile("(\ue000[0-9]+\ue001)")
# Texts before a message of each role, and after every message, without a chat template.
_ROLES = {
    "system": "ASSISTANT's RULE: ",
    "user": "USER: ",
    "assistant": "ASSISTANT: ",
    "stop": "\n",
}


@dataclass(frozen=True)
class Chat:
    """The messages to answer.

    Args:
        messages: each with a ``role`` and a ``content``.
        tools: the functions that the answer may call.
        role_mapping: what stands before the messages of each role, for a model without a template.
        forced: the name of the tool that the answer must call, "" for any, None for none.
        json: the schema that the answer must fit if it is no call; None for any text.
        one_call: whether it has one call at most.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    role_mapping: dict[str, str] | None = None
    forced: str | None = None
    json: Schema | None = None
    one_call: bool = False

    @property
    def wanted(self) -> Wanted:
        """The answers that are wanted."""
        return Wanted(self.json, self.tools or (), self.forced, self.one_call)


Prompt = str | list[int] | Chat  # a text or its token ids to continue, or messages to answer


def prompt_of(fields: dict[str, Any], *, is_chat: bool) -> Prompt:
    """Takes the prompt of a request, or its messages and tools.

    Args:
        fields: the result of :func:`mlx_qwen3next.server.requests.fields.normalise`.
    """
    if not is_chat:
        return fields["prompt"]
    tools, choice = fields.get("tools") or None, fields.get("tool_choice", "auto")
    forced = None
    if isinstance(choice, dict):
        forced = choice["function"]["name"]
    elif choice == "required":
        forced = tools[0]["function"]["name"] if tools and len(tools) == 1 else ""
    roles, one_call = fields.get("role_mapping"), not fields.get("parallel_tool_calls", True)
    answer = fields.get("response_format")
    return Chat(fields["messages"], tools, roles, forced, answer, one_call)


class Rendered(NamedTuple):
    """A prompt's tokens.

    Args:
        tokens: their ids.
        reasoning_open: whether the answer begins within reasoning that the template has opened.
        opening: the text at the prompt's end that is the beginning of the answer.
        format: the form of calls that the template teaches; None without a chat.
        reasons: whether the answer may begin with its reasoning, where the template opens none.
    """

    tokens: list[int]
    reasoning_open: bool = False
    opening: str = ""
    format: Format | None = None
    reasons: bool = False

    @property
    def reasoning(self) -> Thought:
        """The reasoning that the answer begins with."""
        if self.opening:
            return "none"
        return "open" if self.reasoning_open else "possible" if self.reasons else "none"


def tokenized_prompt(
    prompt: Prompt, tokenizer: TokenizerWrapper, template_options: dict[str, Any]
) -> Rendered:
    """Tokenizes the prompt.

    With ``enable_thinking`` false, reasoning that the template has opened nevertheless is closed
    again. An answer that must call a tool is begun with the call where no grammar can force it.

    Raises:
        FieldError: a format or a call is asked for that this answer cannot be held to.
        ValueError: the template cannot do what the request asks for.
    """
    if isinstance(prompt, list):
        return Rendered(prompt)
    if isinstance(prompt, str):
        return Rendered(tokenizer.encode(prompt))
    arguments = _template_arguments(prompt, tokenizer, template_options)
    if not tokenizer.has_chat_template:
        if arguments["continue_final_message"]:
            raise ValueError("without a chat template this model can continue no message")
        if prompt.forced is not None:
            message = "tool_choice can force no call without a chat template; leave it out"
            raise FieldError(message, "tool_choice")
        return Rendered(tokenizer.encode(_without_template(prompt)), format="json")
    if not arguments["add_generation_prompt"]:
        rest = "in an answer that goes on with a message; leave one of the two out"
        if prompt.forced is not None:
            raise FieldError(f"tool_choice can force no call {rest}", "tool_choice")
        if prompt.json is not None:
            field = prompt.json.param
            raise FieldError(f"{field} cannot be enforced {rest}", field)
    plain = _PlainText(tokenizer)
    messages, tools = plain.mark(prompt.messages), plain.mark(prompt.tools)

    def render(**options: Any) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, **arguments | options
        )

    text = render()
    reasoning_open = _opens_reasoning(text, render, arguments)
    opening = ""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template[arguments["chat_template"]]
    format = call_format(template)
    begins_call = prompt.forced is not None and not is_available()
    is_off = begins_call or arguments.get("enable_thinking") is False
    if arguments["add_generation_prompt"] and reasoning_open:
        opening = "\n</think>\n\n" if is_off else ""
    if begins_call:
        opening += call_opening(format, prompt.forced or "")
    reasons = not is_off and "<think>" in template
    tokens = plain.encode(text + plain.mark(opening))
    return Rendered(tokens, reasoning_open, opening, format, reasons)


def _without_template(chat: Chat) -> str:
    """The text of a chat for a model without a chat template, as mlx-lm's server writes it."""
    roles = chat.role_mapping or _ROLES
    end = roles.get("stop", "")
    lines = [roles.get(m["role"], "") + m["content"] + end for m in chat.messages]
    return ("".join(lines) + roles.get("assistant", "")).rstrip()


def _opens_reasoning(text: str, render: Callable[..., str], arguments: dict[str, Any]) -> bool:
    """Whether the answer begins within reasoning that the template has opened.

    Only the template's own opening counts, which is what it adds for the generation: a message may
    hold the tag as well.
    """
    if arguments["continue_final_message"]:
        return arguments["continue_final_message"] == "reasoning_content"
    if not arguments["add_generation_prompt"]:
        return False
    before = render(add_generation_prompt=False)
    opening = text.removeprefix(before) if text.startswith(before) else ""
    return opening.rfind("<think>") > opening.rfind("</think>")


class _PlainText:
    """Keeps control tokens, such as ``<|im_end|>``, that stand in messages and tools plain text.

    The template's own are control tokens. Those of a message would end it, or begin another one in
    somebody else's name, so a mark stands for each while the template runs, and the tokenizer then
    encodes the mark's place as the characters that it stands for.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._control = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._marks = [f"\ue000{i}\ue001" for i in range(len(self._control))]

    def mark(self, value: Any) -> Any:
        """Returns messages or tools with marks in the places of control tokens."""
        if isinstance(value, str):
            for token, mark in zip(self._control, self._marks, strict=True):
                value = value.replace(token, mark)
            return value
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return value

    def encode(self, text: str) -> list[int]:
        """Encodes a rendered text."""
        tokens: list[int] = []
        for piece in _MARK.split(text):
            if mark := _MARK.fullmatch(piece):
                for character in self._control[int(mark[0][1:-1])]:
                    tokens += self._tokenizer.encode(character, add_special_tokens=False)
            elif piece:
                tokens += self._tokenizer.encode(piece, add_special_tokens=False)
        return tokens


def _template_arguments(
    chat: Chat, tokenizer: TokenizerWrapper, options: dict[str, Any]
) -> dict[str, Any]:
    """Makes the arguments of transformers' ``apply_chat_template``.

    Three options are the server's: with ``continue_final_message``, or with
    ``add_generation_prompt`` false, the answer goes on with the assistant's message that is last;
    ``chat_template`` is the name of a template, for models that have several.

    Raises:
        ValueError: there is no such message, or no such template.
    """
    arguments = {"add_generation_prompt": True} | options
    last = chat.messages[-1]
    is_answer = last["role"] == "assistant" and not last.get("tool_calls")
    goes_on = arguments.get("continue_final_message")
    if goes_on is None:
        goes_on = is_answer and not arguments["add_generation_prompt"]
    if goes_on and not is_answer:
        raise ValueError(
            "continue_final_message needs a last message of the assistant, without tool calls"
        )
    if goes_on and options.get("add_generation_prompt"):
        raise ValueError("continue_final_message and add_generation_prompt cannot both be true")
    # An answer that has not got beyond its reasoning goes on with that.
    thinks = goes_on and not last["content"] and "reasoning_content" in last
    arguments["continue_final_message"] = "reasoning_content" if thinks else goes_on
    arguments["add_generation_prompt"] = arguments["add_generation_prompt"] and not goes_on
    name = _template_name(tokenizer, arguments.pop("chat_template", None), chat.tools)
    return arguments if name is None else arguments | {"chat_template": name}


def _template_name(tokenizer: TokenizerWrapper, name: str | None, tools: Any) -> str | None:
    """Chooses a chat template; returns its name, or None if the model's only one has no name.

    Raises:
        ValueError: the model has no template of that name, or none for chats without a name.
    """
    templates = tokenizer.chat_template
    names = list(templates) if isinstance(templates, dict) else ["default"]
    if name is None:
        name = "tool_use" if tools and "tool_use" in names else "default"
    if name not in names:
        raise ValueError(
            f"this model has no chat template {name!r}; name one of its templates as "
            f"chat_template_kwargs.chat_template: {', '.join(names)}"
        )
    return name if isinstance(templates, dict) else None
