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
    convert_chat,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..decoding.detokenize import StopWords, TextDecoder
from ..decoding.sampling import Sampling
from ..decoding.validation import token_budget
from ..errors import first_line
from ..model.qwen3_next import Model
from .batching import Generated


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
        # mlx_lm.server drops the text of a response whose reason is "stop", and takes the end of
        # the responses for that reason.
        sent = None if stopped or (reason == "stop" and text) else reason
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
        template_options: variables of the chat template.

    Raises:
        ValueError: the request cannot be answered. The chat template and the tokenizer may raise
            other exceptions.
    """
    prompt, state = _prompt(completion, tokenizer, template_options)
    if not prompt:
        raise ValueError("the prompt is empty")
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


def _prompt(
    completion: CompletionRequest, tokenizer: TokenizerWrapper, template_options: dict[str, Any]
) -> tuple[list[int], str]:
    """Tokenizes the prompt.

    Returns:
        The token ids, and the kind of text that the answer begins with: "normal" or "reasoning".
    """
    if isinstance(completion.prompt, list):
        return completion.prompt, "normal"
    if completion.request_type == "text":
        return tokenizer.encode(completion.prompt), "normal"
    if not tokenizer.has_chat_template:
        text = convert_chat(completion.messages, completion.role_mapping)
        return tokenizer.encode(text), "normal"
    prompt = tokenizer.apply_chat_template(
        completion.messages, tools=completion.tools, add_generation_prompt=True, **template_options
    )
    state = "normal"
    if tokenizer.has_thinking and (
        tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
    ):
        state = "reasoning"
    return prompt, tokenizer.response_initial_state or state
