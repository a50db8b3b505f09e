"""A server whose model says what a test wants, and OpenAI's client of it.

The server is the real one, over HTTP, with its engine, its batch and its prompt cache; the model is
tiny, and its logits are forced. A request names its answer by its seed.
"""

import contextlib
import functools
import threading
from dataclasses import dataclass, field

import mlx.core as mx
import openai
from checkpoints import config
from helpers_generate import forced
from helpers_serving import running, served
from helpers_templates import CODER, FORGETFUL, INSTRUCT
from mlx_lm.tokenizer_utils import load as load_tokenizer
from openai.lib.streaming.chat import ChatCompletionStreamState

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.packed.packing import pack
from mlx_qwen3next.model.qwen3_next import Model
from mlx_qwen3next.server.engine.engine import Engine

CONTEXT = 1024  # tokens
TINY = config("base") | {
    **{"num_hidden_layers": 2, "full_attention_interval": 2, "hidden_size": 32, "head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 1},
    **{"linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 16},
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    **{"shared_expert_intermediate_size": 16, "max_position_embeddings": CONTEXT},
}


@functools.cache
def _tiny():
    """A tiny model, and the bundled tokenizer with templates of the three forms by their names."""
    tokenizer = load_tokenizer(BUNDLED)
    own = tokenizer.chat_template
    named = {"default": own, "coder": CODER, "instruct": INSTRUCT, "thinking": FORGETFUL}
    tokenizer._tokenizer.chat_template = named
    model = Model(Config.from_dict(TINY | {"vocab_size": len(tokenizer)}))
    mx.eval(pack(model.eval()).parameters())  # by the thread that made them
    return model, tokenizer


class ScriptedEngine(Engine):
    """An engine whose model says the text that a request's seed names, and then ends its turn."""

    def __init__(self, *args):
        self.scripts, self.read = [], []
        super().__init__(*args)

    def _read(self, completion, arguments, queue):
        request = super()._read(completion, arguments, queue)
        script, least = self.scripts[arguments.seed or 0]
        says = forced(script, len(request.tokens))
        request.processors = [
            lambda tokens, logits: mx.maximum(says(tokens, logits), least),
            *request.processors,
        ]
        self.read.append(request)
        return request


@dataclass
class Got:
    """An answer, whole or put together from its chunks."""

    content: str = ""
    reasoning: str = ""
    calls: list = field(default_factory=list)  # names and arguments
    reason: str | None = None
    usage: object = None
    logprobs: list = field(default_factory=list)
    message: object = None

    @property
    def seen(self):
        """The parts that do not depend on the form of the answer."""
        entries = [(entry.token, entry.bytes) for entry in self.logprobs]
        counts = self.usage.prompt_tokens, self.usage.completion_tokens
        return self.content, self.reasoning, self.calls, self.reason, entries, counts


class Scripted:
    """The engine, the client, and the two forms of answers.

    Args:
        engine: a :class:`ScriptedEngine`.
        client: OpenAI's.
        address: the server's.
    """

    def __init__(self, engine, client, address):
        self.engine, self.client, self.address = engine, client, address
        self._saying = threading.Lock()
        self.say("Yes.")  # the answer unless another is named

    def prefer(self, text):
        """Has the model say a text where it may, and anything else where it may not; returns the
        seed."""
        return self.say(text, least=-50.0)

    def say(self, text, *, ends=True, least=-mx.inf):
        """Has the model say a text and end its turn, or repeat its last token; returns the seed.

        Args:
            least: the logits of all other tokens.
        """
        _, tokenizer = _tiny()
        end = [tokenizer.eos_token_id] if ends else []
        script = [*tokenizer.encode(text, add_special_tokens=False), *end]
        with self._saying:
            self.engine.scripts.append((script, least))
            return len(self.engine.scripts) - 1

    def prompt(self):
        """The text of the prompt that was read last."""
        return _tiny()[1].decode(self.engine.read[-1].context.prompt)

    def count(self, token):
        """How often a control token is in the prompt that was read last."""
        return self.engine.read[-1].context.prompt.count(_tiny()[1].convert_tokens_to_ids(token))

    def whole(self, messages, seed=0, **fields):
        """A whole answer."""
        answer = self.client.chat.completions.create(**_request(messages, seed, fields))
        (choice,) = answer.choices
        message = choice.message
        calls = message.tool_calls or []
        assert all(call.type == "function" for call in calls)
        assert len({call.id for call in calls}) == len(calls)
        return Got(
            message.content or "",
            getattr(message, "reasoning", ""),
            [(call.function.name, call.function.arguments) for call in calls],
            choice.finish_reason,
            answer.usage,
            choice.logprobs.content if choice.logprobs else [],
            message,
        )

    def streamed(self, messages, seed=0, **fields):
        """An answer put together from its chunks, as agents do, and as OpenAI's client itself does;
        its message is the client's."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = self.client.chat.completions.create(
            **_request(messages, seed, fields | options)
        )
        assert last.choices == []
        got, calls, state = Got(usage=last.usage), {}, ChatCompletionStreamState()
        for chunk in chunks:
            state.handle_chunk(chunk)
            (choice,) = chunk.choices
            assert got.reason is None and chunk.usage is None
            got.reason = choice.finish_reason
            got.logprobs += choice.logprobs.content if choice.logprobs else []
            got.content += choice.delta.content or ""
            got.reasoning += getattr(choice.delta, "reasoning", "")
            for piece in choice.delta.tool_calls or []:
                call = calls.setdefault(piece.index, {"id": piece.id, "type": piece.type})
                function = call.setdefault("function", {"name": "", "arguments": ""})
                function["name"] += piece.function.name or ""
                function["arguments"] += piece.function.arguments or ""
        assert list(calls) == list(range(len(calls)))
        assert all(call["id"] and call["type"] == "function" for call in calls.values())
        functions = [call["function"] for call in calls.values()]
        got.calls = [(function["name"], function["arguments"]) for function in functions]
        got.message = state.current_completion_snapshot.choices[0].message
        joined = got.message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in joined] == got.calls
        assert (got.message.role, got.message.content or "") == ("assistant", got.content)
        return got

    def both(self, messages, seed=0, **fields):
        """The answer, which is the same in both forms."""
        whole, streamed = (ask(messages, seed, **fields) for ask in (self.whole, self.streamed))
        assert streamed.seen == whole.seen
        return whole

    def completion(self, prompt, seed=0, **fields):
        """A completion of a text, which is the same whole and streamed: its choice and usage."""
        fields = {"model": "demo", "prompt": prompt, "seed": seed, "temperature": 0} | fields
        create = self.client.completions.create
        answer = create(**fields)
        (choice,) = answer.choices
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = create(**fields, **options)
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
        ends = [chunk.choices[0].finish_reason for chunk in chunks]
        assert ends == [None] * (len(chunks) - 1) + [choice.finish_reason]
        assert last.usage.total_tokens == answer.usage.total_tokens
        if choice.logprobs:
            for name, entries in choice.logprobs:
                pieces = [getattr(chunk.choices[0].logprobs, name) for chunk in chunks]
                assert [x for piece in pieces for x in piece] == entries
        return choice, answer.usage


def _request(messages, seed, fields):
    """The arguments of OpenAI's client; those that it does not know are in ``extra_body``."""
    request = {"model": "demo", "messages": messages, "seed": seed, "temperature": 0}
    template = fields.pop("template", None)
    if template:
        request["extra_body"] = {"chat_template_kwargs": {"chat_template": template}}
    return request | fields


@contextlib.contextmanager
def scripted(*flags, **options):
    """A running :class:`Scripted`; ``flags`` are the command's, ``options`` of OpenAI's client."""
    with running(*flags, load=_tiny, engine=ScriptedEngine) as engine, served(engine) as listening:
        url = "http://{}:{}/v1".format(*listening.server_address[:2])
        options = {"api_key": "any", "max_retries": 0, "timeout": 60} | options
        with openai.OpenAI(base_url=url, **options) as client:
            yield Scripted(engine, client, listening)
