"""A request that the server answers, from the reading of it to its last token.

:func:`read_request` checks a client's request and tokenizes its prompt. The engine
(:mod:`mlx_qwen3next.server.engine`) then has its tokens generated, and :class:`Request` turns them
into the responses that mlx_lm.server's handler reads from a queue.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import LogitsProcessor, Sampler
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    _format_top_logprobs,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..decoding.detokenize import StopWords, TextDecoder
from ..decoding.sampling import Sampling
from ..decoding.validation import token_budget
from ..errors import ContextLengthError, first_line
from ..model.qwen3_next import Model
from .batching import Generated
from .prompt import tokenized_prompt


class NullQueue(Queue[Any]):
    """The queue of a request on a rank without clients: drops the responses."""

    def put(self, *_: Any, **__: Any) -> None:
        pass


@dataclass
class Request:
    """A request that is being answered."""

    queue: Queue[Any]  # mlx_lm.server's: progress, responses, an exception; None at the end
    arguments: GenerationArguments
    context: GenerationContext
    tokens: list[int]  # the prompt and all tokens generated after it
    max_tokens: int
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: StopSequences
    decoder: TextDecoder
    stop_words: StopWords
    key: int | None = None  # of the random numbers
    generated: int = 0  # number of tokens
    failures: int = 0  # failed forwards that this request may have caused
    on_trial: bool = False  # runs alone after a failed forward, until its next token
    fresh: bool = True  # no token was generated since the request entered the batch
    checkpoints: Sequence[int] = ()  # lengths of the prompt at which a checkpoint is kept
    number: int = 0  # in the order of arrival

    def send(self, response: Generated, tokenizer: TokenizerWrapper) -> bool:
        """Sends the next token to the client; returns whether the answer has ended."""
        self.tokens.append(response.token)
        self.generated += 1
        self.fresh = self.on_trial = False
        reason = response.finish_reason
        text, stopped = self.stop_words.add(self.decoder.add(response.token, reason), reason)
        logprob: Any = 0.0
        top: Any = ()
        top_logprobs = self.arguments.top_logprobs
        if self.arguments.logprobs or top_logprobs > 0:
            logprob = response.logprobs[response.token].item()
            top = _format_top_logprobs(response.logprobs, top_logprobs, tokenizer)
        sent = "stop" if stopped else reason
        self.queue.put(Response(text, response.token, logprob, sent, top))
        if reason is None and not stopped:
            return False
        self.queue.put(None)
        return True

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error."""
        logging.error(f"A request failed: {first_line(error)}")
        self.queue.put(RuntimeError(first_line(error)))


def read_request(
    completion: CompletionRequest,
    arguments: GenerationArguments,
    queue: Queue[Any],
    model: Model,
    tokenizer: TokenizerWrapper,
    *,
    state_machines: tuple[StopSequences, Any],
    template_options: dict[str, Any],
) -> Request:
    """Checks a request and tokenizes its prompt.

    Args:
        completion, arguments: the request, as mlx_lm.server's handler has read it.
        queue: receives the responses.
        state_machines: mlx-lm's, of the tokens that end an answer and of the parts of its text.
        template_options: variables of the chat template, and the options of
            :func:`mlx_qwen3next.server.prompt.tokenized_prompt`.

    Raises:
        ContextLengthError: the prompt is longer than the model's context.
        ValueError: the request cannot be answered. The chat template and the tokenizer may raise
            other exceptions.
    """
    prompt, state = tokenized_prompt(completion, tokenizer, template_options)
    if not prompt:
        raise ValueError("the prompt is empty")
    _check_length(prompt, model, completion)
    max_tokens = token_budget(model, len(prompt), arguments.max_tokens)
    vocab = model.args.vocab_size
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise ValueError(f"the prompt holds a token id outside 0…{vocab - 1}")
    sampling = Sampling(
        temp=arguments.sampling.temperature,
        top_p=arguments.sampling.top_p,
        top_k=arguments.sampling.top_k,
        min_p=arguments.sampling.min_p,
        xtc_probability=arguments.sampling.xtc_probability,
        xtc_threshold=arguments.sampling.xtc_threshold,
        xtc_special_tokens=(*tokenizer.encode("\n"), *tokenizer.eos_token_ids),
        **vars(arguments.logits),
    )
    sampling.check_vocabulary(vocab)
    stop, text_states = state_machines
    context = GenerationContext(
        has_tool_calling=tokenizer.has_tool_calling,
        has_thinking=tokenizer.has_thinking,
        tool_parser=tokenizer.tool_parser,
        text_sm=text_states,
        initial_state=state,
        prompt=prompt,
    )
    return Request(
        queue,
        arguments,
        context,
        list(prompt),
        max_tokens,
        sampling.sampler(),
        sampling.logits_processors(),
        stop,
        TextDecoder(tokenizer),
        StopWords(arguments.stop_words),
    )


def tokenized(tokens: list[int]) -> CompletionRequest:
    """Makes the request to continue a prompt that is tokenized already."""
    prompt: Any = tokens  # mlx_lm.server's handler passes token ids in this way, too
    return CompletionRequest("text", prompt, [], None, None)


def _check_length(prompt: list[int], model: Model, completion: CompletionRequest) -> None:
    """Checks that a prompt fits the context, in OpenAI's words, by which clients know the error.

    Raises:
        ContextLengthError: it does not.
    """
    limit = model.args.max_position_embeddings
    if len(prompt) > limit:
        given = "messages" if completion.request_type == "chat" else "prompt"
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, your {given} "
            f"resulted in {len(prompt)} tokens. Please reduce the length of the {given}."
        )
