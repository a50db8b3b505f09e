"""A request that the server answers, from the reading of it to its last token.

:func:`read_request` checks a client's request and tokenizes its prompt. The engine
(:mod:`.engine`) then has its tokens generated, and :class:`Request` turns them into those
that the HTTP side reads from a queue.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...decoding.detokenize import StopWords, TextDecoder
from ...decoding.sampling import draw_key
from ...decoding.validation import token_budget
from ...errors import ContextLengthError, first_line
from ...model.qwen3_next import Model
from ..answers.tokens import Context, SampledToken
from ..grammars.answer import answer_grammar
from ..grammars.compiled import Grammars, is_available
from ..requests.fields import Options
from ..requests.prompt import Chat, Prompt, Rendered, tokenized_prompt
from .batching import Generated
from .lone_sequence import Drafted
from .metrics import Metrics

_PATIENCE = 1.0  # seconds to wait for a token before looking whether the thread has ended


class NullQueue(Queue[Any]):
    """The queue of a request on a rank without clients: drops the tokens."""

    def put(self, *_: Any, **__: Any) -> None:
        pass


@dataclass
class Request:
    """A request that is being answered."""

    queue: Queue[Any]  # progress (done, total), tokens, an exception; None at the end
    options: Options
    context: Context
    tokens: list[int]  # the prompt and all tokens generated after it
    max_tokens: int
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: StopSequences
    decoder: TextDecoder
    stop_words: StopWords
    metrics: Metrics
    key: int | None = None  # of the random numbers
    generated: int = 0  # number of tokens
    failures: int = 0  # failed forwards that this request may have caused
    on_trial: bool = False  # runs alone after a failed forward, until its next token
    fresh: bool = True  # no token was generated since the request entered the batch
    checkpoints: Sequence[int] = ()  # lengths of the prompt at which a checkpoint is kept
    number: int = 0  # in the order of arrival

    def send(self, response: Generated) -> bool:
        """Sends the next token to the client; returns whether the answer has ended."""
        self.tokens.append(response.token)
        self.generated += 1
        self.fresh = self.on_trial = False
        self._count(response)
        reason = response.finish_reason
        text, stop_word = self.stop_words.add(self.decoder.add(response.token, reason), reason)
        logprob: Any = 0.0
        top = _most_probable(response.logprobs, self.options.top_logprobs)
        if self.options.logprobs or top:
            logprob = response.logprobs[response.token].item()
        sent = "stop" if stop_word else reason
        self.queue.put(SampledToken(text, response.token, logprob, sent, top, stop_word))
        if sent is None:
            return False
        self.queue.put(None)
        return True

    def _count(self, response: Generated) -> None:
        self.metrics.add("generation_tokens")
        if not isinstance(response, Drafted):
            return
        source = response.source
        if response.drafted:
            self.metrics.add("draft_rounds", source=source)
            self.metrics.add("draft_tokens", response.drafted, source=source)
        self.metrics.add("draft_tokens_accepted", response.is_draft, source=source)
        if response.is_draft:
            self.context.accepted[source] += 1

    def answer(
        self, progress: Callable[[int, int], None], ended: threading.Event
    ) -> Generator[SampledToken]:
        """Yields the tokens as they come.

        Args:
            progress: called with the number of prompt tokens processed and of all of them.
            ended: set when the thread that generates has ended.

        Raises:
            RuntimeError: the answer has failed, or the thread has died.
        """
        while (item := self._next(ended)) is not None:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, tuple):
                progress(*item)
            else:
                yield item

    def _next(self, ended: threading.Event) -> Any:
        """Waits for the next item of the queue."""
        while True:
            last = ended.is_set()  # asked first, since the thread may put items until then
            try:
                return self.queue.get(timeout=0 if last else _PATIENCE)
            except Empty:
                if last:
                    raise RuntimeError("the generation thread has died") from None

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error."""
        logging.error(f"A request failed: {first_line(error)}")
        self.queue.put(RuntimeError(first_line(error)))


def read_request(
    prompt: Prompt,
    options: Options,
    queue: Queue[Any],
    model: Model,
    tokenizer: TokenizerWrapper,
    metrics: Metrics,
) -> Request:
    """Checks a request and tokenizes its prompt.

    Args:
        queue: receives the tokens.
        metrics: counts its tokens.

    Raises:
        ContextLengthError: the prompt is longer than the model's context.
        FieldError: the answer cannot be held to a schema.
        ValueError: the request cannot be answered. The chat template and the tokenizer may raise
            other exceptions.
    """
    rendered = tokenized_prompt(prompt, tokenizer, options.template_options)
    tokens = rendered.tokens
    if not tokens:
        raise ValueError("the prompt is empty")
    _check_length(tokens, model, prompt)
    vocab = model.args.vocab_size
    if not 0 <= min(tokens) <= max(tokens) < vocab:
        raise ValueError(f"the prompt holds a token id outside 0…{vocab - 1}")
    special = (*tokenizer.encode("\n"), *tokenizer.eos_token_ids)
    sampling = replace(options.sampling, xtc_special_tokens=special)
    sampling.check_vocabulary(vocab)
    processors = sampling.logits_processors()
    if isinstance(prompt, Chat) and prompt.wanted.needs_grammar and is_available():
        grammar = _grammar(prompt, rendered, Grammars.of(model, tokenizer))
        options = replace(options, grammar=grammar)
    if options.grammar is not None:
        grammars = Grammars.of(model, tokenizer)
        processors.append(grammars.constraint(options.grammar, len(tokens)))
    return Request(
        queue,
        options,
        Context(tokenizer, tokens, rendered.reasoning_open, rendered.opening, rendered.format),
        list(tokens),
        token_budget(model, len(tokens), options.max_tokens),
        sampling.sampler(),
        processors,
        StopSequences([(token,) for token in tokenizer.eos_token_ids]),
        TextDecoder(tokenizer),
        StopWords(options.stop_words),
        metrics,
    )


def _grammar(chat: Chat, rendered: Rendered, grammars: Grammars) -> str:
    """The grammar of the answer to a chat, checked."""
    assert rendered.format is not None
    grammar = answer_grammar(chat.wanted, rendered.format, rendered.reasoning, grammars.is_token)
    grammars.check(grammar)
    return grammar.text


def _most_probable(logprobs: mx.array, n: int) -> tuple[tuple[int, float], ...]:
    """Finds the ``n`` most probable tokens and their log-probabilities, in any order.

    Args:
        logprobs: ``[vocab]``.
    """
    if n == 0:
        return ()
    tokens = mx.argpartition(-logprobs, kth=n - 1)[:n]
    ids: Any = tokens.tolist()
    values: Any = logprobs[tokens].tolist()
    return tuple(zip(ids, values, strict=True))


def random_key(seed: int | None) -> int:
    """The key of a request's random numbers."""
    if seed is None:
        return secrets.randbits(31)
    mx.random.seed(seed)
    return draw_key()


def _check_length(tokens: list[int], model: Model, prompt: Prompt) -> None:
    """Checks that a prompt fits the context, in OpenAI's words, by which clients know the error.

    Raises:
        ContextLengthError: it does not.
    """
    limit = model.args.max_position_embeddings
    if len(tokens) > limit:
        given = "messages" if isinstance(prompt, Chat) else "prompt"
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, your {given} "
            f"resulted in {len(tokens)} tokens. Please reduce the length of the {given}.",
            len(tokens),
            limit,
        )
