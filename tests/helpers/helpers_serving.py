"""Helpers for the tests of batches and of the server's thread: sequences, an engine over HTTP."""

import contextlib
import copy
import functools
import itertools

import mlx.core as mx
import numpy as np
from helpers_generate import bundled, narrow, tokens_of
from helpers_server import serving
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import greedy_sampler

from mlx_qwen3next import stream_generate
from mlx_qwen3next.decoding.sampling import Sampling
from mlx_qwen3next.server.command import _prompt_cache
from mlx_qwen3next.server.engine.batching import SpeculativeBatchGenerator
from mlx_qwen3next.server.engine.engine import Engine
from mlx_qwen3next.server.flags import parser
from mlx_qwen3next.server.http import handler
from mlx_qwen3next.server.requests.fields import Options
from mlx_qwen3next.server.requests.prompt import Chat

TEXTS = ("import os\n", "class Queue:\n    def put(self", "def merge(left, right):\n", "x = [")
ENDLESS = {4086: -100.0, 4088: -100.0}  # a bias against both stop tokens


class Sequences:
    """A batch generator, and the tokens it has generated for each sequence."""

    def __init__(self, model, depth, step_size=4, **options):
        self.generator = SpeculativeBatchGenerator(
            model, depth, prefill_step_size=step_size, **options
        )
        self.prompts = {}
        self.told = {}
        self.ends = {}  # the last responses
        self.prompted = []

    def insert(self, prompt, n, *, cuts=(), sampler=greedy_sampler, processors=(), **cached):
        """Inserts a sequence; `cached` may have a `cache` and the tokens `held` in it."""
        held = len(cached.get("held", ()))
        ends = [held, *cuts, len(prompt)]
        (uid,) = self.generator.insert_segments(
            [[prompt[a:b] for a, b in itertools.pairwise(ends)]],
            [n],
            [cached.get("cache")],
            [list(cached.get("held", ()))],
            [sampler],
            [list(processors)],
            [StopSequences(cached.get("stop"))],
        )
        self.prompts[uid], self.told[uid] = list(prompt), []
        return uid

    def step(self):
        """Runs a step; returns the responses for prompts and for tokens."""
        prompted, generated = self.generator.next()
        self.prompted += prompted
        for response in generated:
            assert response.uid not in self.ends
            self.told[response.uid].append(response.token)
            assert abs(np.exp(response.logprobs).sum() - 1) < 1e-4  # they are probabilities
            if response.finish_reason is not None:
                self.ends[response.uid] = response
        return prompted, generated

    def text(self, uid):
        """The prompt and all tokens generated after it."""
        return self.prompts[uid] + self.told[uid]

    def live(self):
        return self.told.keys() - self.ends.keys()

    def remove(self, uid, **options):
        caches = self.generator.remove([uid], **options)
        self.ends[uid] = None
        return caches

    def run(self):
        """Runs all sequences to their ends."""
        while self.live():
            prompted, generated = self.step()
            assert prompted or generated
        return self.told


# --- the server's thread ------------------------------------------------------------------------
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@contextlib.contextmanager
def running(
    *flags,
    load=narrow,
    cache=None,
    mtp="off",
    failed=lambda _: None,
    dies=False,
    engine=Engine,
):
    """An engine; checks at the end that its thread has not died.

    Args:
        flags: flags of the command.
        load: returns model and tokenizer.
        cache: the prompt cache, or a function that makes one for a tokenizer; by default the
            command's.
        dies: expects the thread to have died.
        engine: the class.
    """
    make = cache if callable(cache) else lambda _: cache
    if cache is None:
        make = functools.partial(_prompt_cache, parser().parse_args([]))
    started = engine(parser().parse_args(map(str, flags)), load, make, mtp, failed)
    try:
        yield started
        assert dies or started._draining or not started.ended.is_set(), "its thread has died"
    finally:
        started.drain(0)
        started.ended.wait()
    assert (started._error is not None) == dies


def served(engine):
    """An engine, served over HTTP."""
    return serving(engine, handler.Settings(names=("demo",)))


def arguments(template=None, **fields):
    """The options of a request, with the names of its fields."""
    names = {"temperature": "temp", "penalty": "repetition_penalty"}
    fields = {names.get(name, name): value for name, value in fields.items()}
    sampling = {x: fields.pop(x) for x in [*fields] if x in Sampling.__dataclass_fields__}
    fields = {"max_tokens": 16, "stop_words": fields.pop("stop", [])} | fields
    return Options(Sampling(**sampling), template_options=template or {}, **fields)


class Asked:
    """A request that an engine is answering.

    Args:
        prompt: text, token ids, or messages.
        fields: see :func:`arguments`.
    """

    def __init__(self, engine, prompt, tools=None, **fields):
        if not isinstance(prompt, str) and not isinstance(prompt[0], int):
            prompt = Chat(copy.deepcopy(prompt), tools)
        self.progress = []
        self.ctx, self._responses = engine.generate(
            prompt, arguments(**fields), lambda *at: self.progress.append(at)
        )
        self.seen = []

    def read(self, n=None):
        """Reads all responses, or n of them."""
        for response in itertools.islice(self._responses, n):
            self.seen.append(response)
        return self

    def leave(self):
        self.ctx.stop()
        return self

    @property
    def tokens(self):
        return tokens_of(self.seen)

    @property
    def text(self):
        return "".join(response.text for response in self.seen)

    @property
    def reason(self):
        return self.seen[-1].finish_reason

    @property
    def cached(self):
        return self.ctx.cached


def ask(engine, prompt, **fields):
    """A complete answer."""
    return Asked(engine, prompt, **fields).read()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def encode(text):
    return bundled()[1].encode(text)


def chat(*messages):
    return bundled()[1].apply_chat_template(list(messages), add_generation_prompt=True)


@functools.cache
def _expected(prompt, n, options, seed, load):
    loaded = load()  # first, since a model that is made anew draws its weights
    if seed is not None:
        mx.random.seed(seed)
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    return list(stream_generate(*loaded, prompt, n, mtp="off", **dict(options)))


def expected(prompt, n=16, seed=None, load=narrow, **options):
    """The responses that the command generates."""
    prompt = tuple(prompt) if isinstance(prompt, list) else prompt
    return _expected(prompt, n, tuple(options.items()), seed, load)


def expected_text(*args, **options):
    return "".join(response.text for response in expected(*args, **options))
