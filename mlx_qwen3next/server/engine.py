"""The server's generation thread: requests in, tokens out, checkpoints kept on the way.

:class:`Engine` takes the place of mlx_lm.server's ResponseGenerator for Qwen3-Next. What tokens
come is up to :mod:`mlx_qwen3next.server.batching`, what is kept to
:mod:`mlx_qwen3next.prompt_cache`.

Where several processes serve one model (:mod:`mlx_qwen3next.group`), each has such a thread and
does the same: rank 0, which clients talk to, decides turn by turn who comes and who has gone.

An error in a forward has broken the caches of all sequences that were in it. Each of them goes on
from its checkpoint and its tokens, one after the other: the one that fails by itself is to blame,
and its request ends with the error.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    ResponseGenerator,
    _format_top_logprobs,
    convert_chat,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.loading import default_dtype
from ..decoding.detokenize import StopWords, TextDecoder
from ..decoding.draft_depth import Depth
from ..decoding.sampling import Sampling, SeededSampler, draw_key
from ..decoding.sequence import KVQuantization
from ..decoding.speculation import MTP, Speculation
from ..decoding.validation import token_budget
from ..errors import first_line
from ..model import capacity
from ..model.cache import Cache
from ..prompt_cache.store import PromptCache
from .batching import SpeculativeBatchGenerator
from .lone_sequence import Generated, Prompted

ATTEMPTS = 3  # times a sequence may be in a forward that fails
IDLE = 0.1  # seconds between two looks at the queue when there is nothing to do
REASSURE = 1.0  # seconds between two signs of life to those that wait


@dataclass
class _Live:
    """A request that is being answered."""

    queue: Queue[Any]  # mlx_lm.server's: progress, responses, an exception; None at the end
    arguments: GenerationArguments
    ctx: GenerationContext
    tokens: list[int]  # the prompt and all that was told
    max_tokens: int
    sampler: Sampler
    seed: int | None
    processors: list[LogitsProcessor]
    stop: StopSequences
    text: TextDecoder
    held_back: StopWords
    logprobs: bool
    top_logprobs: int
    key: int | None = None  # for the random numbers
    told: int = 0
    failures: int = 0  # forwards that it may be to blame for
    on_trial: bool = False  # it was in a forward that failed
    fresh: bool = True  # nothing was told since it came into the batch
    places: Sequence[int] = ()  # where its prompt is to have checkpoints
    number: int = 0  # in the order in which they came


class _Nobody(Queue[Any]):
    """Whom an answer is told to by a rank that has no clients."""

    def put(self, *_: Any, **__: Any) -> None:
        pass


class Engine(ResponseGenerator):
    """Answers requests in a thread of its own, which also loads the model.

    Args:
        provider: mlx_lm.server's ModelProvider, whose model is one of ours.
        prompt_cache: makes the prompt cache for a tokenizer, once the model is loaded.
        mtp: as for :func:`mlx_qwen3next.generate_step`.
        failed: called with the error if the model cannot be loaded.
    """

    def __init__(
        self,
        provider: Any,
        prompt_cache: Callable[[TokenizerWrapper], PromptCache],
        mtp: MTP = "auto",
        failed: Callable[[Exception], None] = lambda _: None,
    ):
        self._make_prompt_cache, self._mtp, self._failed = prompt_cache, mtp, failed
        self._live: dict[int, _Live] = {}
        self._waiting: deque[_Live] = deque()
        self._numbers = count()
        self._reassured = 0.0  # when those were told something last
        self._loaded = threading.Event()
        # To wait for: Thread.join() takes a thread for stopped once Ctrl-C has interrupted it.
        self.ended = threading.Event()
        self._reading = threading.Lock()  # tokenizers are not for several threads
        self._deadline, self._save = 0.0, True  # when draining ends, and whether it saves then
        unused: Any = None  # mlx-lm's own prompt cache
        super().__init__(provider, unused)

    # --- for other threads ---------------------------------------------------------------------
    @property
    def health(self) -> str:
        """ "ok", "loading", "draining" or "unavailable"."""
        if not self.generation_available():
            return "unavailable"
        return "draining" if self._stop else "ok" if self._loaded.is_set() else "loading"

    @property
    def is_healthy(self) -> bool:
        return self.health == "ok"

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """As mlx_lm.server's, but tokenizes in the caller's thread, once the model is loaded.

        Raises:
            ValueError: what is asked for cannot be done.
            RuntimeError: the server is going down.
        """
        while not self._loaded.wait(1) and self.generation_available():
            pass
        if self._stop or not self.generation_available():
            raise RuntimeError("the server is shutting down")
        try:
            with self._reading:
                live = self._read(request, generation_args, Queue())
        except ValueError:
            raise
        except Exception as error:  # templates and tokenizers raise what they like
            raise ValueError(first_line(error)) from error
        self.requests.put(live)
        return live.ctx, self._responses(live, progress_callback or (lambda *_: None))

    def _responses(self, live: _Live, progress: Callable[[int, int], None]) -> Generator[Response]:
        while (response := self._await_response(live.queue)) is not None:
            if isinstance(response, Exception):
                raise response
            if isinstance(response, tuple):
                progress(*response)
            else:
                yield response

    def drain(self, seconds: float) -> None:
        """Makes the thread answer what was asked, for so long, save the prompt cache and end.

        ``ended`` is set after that. With 0 seconds nothing is saved.
        """
        self._deadline, self._save = time.monotonic() + seconds, seconds > 0
        self._stop = True

    # --- the thread ----------------------------------------------------------------------------
    def _run_generate(self) -> None:
        super()._run_generate()
        # MLX aborts the process at its end if a thread that drew random numbers leaves its streams.
        mx.clear_streams()
        self.ended.set()

    def _generate(self) -> None:
        try:
            self.model_provider.load_default()
            provider: Any = self.model_provider
            self._model, self._tokenizer = provider.model, provider.tokenizer
            depth = Speculation.of(self._model).depth(self._mtp)
            self._group = self._model.group
            self._checkpoints = self._make_prompt_cache(self._tokenizer)
        except Exception as error:
            self._generation_failed = True
            self._failed(error)
            return
        self._stream = mx.default_stream(mx.default_device())
        self._budget = min(self._group.gather("budget", self._checkpoints.max_bytes))
        self._start(depth)
        self._loaded.set()
        while self._turn():
            self._fill()
            if self._live:
                self._step()
            self._reassure()
        while self._save and self._checkpoints.save_next():
            pass
        self._batch.close()
        del self._batch, self._checkpoints, self._model, self._tokenizer
        self.model_provider.reset()

    def _start(self, depth: Depth) -> None:
        args = self.cli_args
        self._batch = SpeculativeBatchGenerator(
            self._model,
            depth,
            KVQuantization(args.kv_bits, args.kv_group_size, args.quantized_kv_start),
            completion_batch_size=args.decode_concurrency,
            prefill_batch_size=args.prompt_concurrency,
            prefill_step_size=args.prefill_step_size,
            stream=self._stream,
        )
        self._at_once = 1 if args.kv_bits is not None else args.decode_concurrency

    def _turn(self) -> bool:
        """Takes in who came and drops who has gone; returns whether there is more to do."""
        mine: list[_Live] = []
        told: Any = None
        if self._group.rank == 0:
            over = self._over()
            mine = [] if over else self._take_in()
            everybody = [*self._live.values(), *self._waiting]
            gone = {live.number for live in everybody if live.ctx._should_stop}
            if not (over or mine or everybody):
                return True  # the others need not be told
            told = over, [(live.tokens, live.arguments) for live in mine], gone
        over, asked, gone = self._group.decide("turn", told)
        if self._group.rank > 0:
            mine = [self._read(_as_request(tokens), args, _Nobody()) for tokens, args in asked]
        for live in mine:
            live.number = next(self._numbers)
        self._waiting += mine
        self._drop(gone)
        return not over

    def _over(self) -> bool:
        if not self._stop:
            return False
        left = [*self._live.values(), *self._waiting]
        if time.monotonic() < self._deadline:
            return not left and self.requests.empty()
        while not self.requests.empty():
            left.append(self.requests.get())
        for live in left:
            live.queue.put(RuntimeError("the server is shutting down"))
        return True

    def _take_in(self) -> list[_Live]:
        """What was asked; with nothing else to do it waits for that, or saves."""
        idle, asked = not (self._live or self._waiting), []
        try:
            asked.append(self.requests.get(block=idle, timeout=IDLE))
            while True:
                asked.append(self.requests.get_nowait())
        except Empty:
            if idle and not asked:
                self._checkpoints.save_next()
        return asked

    def _reassure(self) -> None:
        """Tells those that wait so, now and then: only then is it noticed if a client has gone."""
        if time.monotonic() >= self._reassured + REASSURE:
            self._reassured = time.monotonic()
            for live in self._waiting:
                live.queue.put((0, len(live.tokens)))

    def _read(
        self, request: CompletionRequest, args: GenerationArguments, queue: Queue[Any]
    ) -> _Live:
        """What a request asks for.

        Raises:
            ValueError: it cannot be done (or whatever the chat template raises).
        """
        model, tokenizer = self._model, self._tokenizer
        prompt, state = self._tokens(request, args)
        if not prompt:
            raise ValueError("the prompt is empty")
        budget = token_budget(model, len(prompt), args.max_tokens)
        vocab = model.args.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"the prompt holds a token id outside 0…{vocab - 1}")
        sampling = Sampling(
            temp=args.sampling.temperature,
            top_p=args.sampling.top_p,
            top_k=args.sampling.top_k,
            min_p=args.sampling.min_p,
            xtc_probability=args.sampling.xtc_probability,
            xtc_threshold=args.sampling.xtc_threshold,
            xtc_special_tokens=(*tokenizer.encode("\n"), *tokenizer.eos_token_ids),
            **vars(args.logits),
        )
        sampling.check_vocabulary(vocab)
        stop, text_states = self._make_state_machine(self.model_provider.model_key, tokenizer, ())
        ctx = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=text_states,
            initial_state=state,
            prompt=prompt,
        )
        return _Live(
            queue,
            args,
            ctx,
            list(prompt),
            budget,
            sampling.sampler(),
            args.seed,
            sampling.logits_processors(),
            stop,
            TextDecoder(tokenizer),
            StopWords(args.stop_words),
            args.logprobs,
            args.top_logprobs,
        )

    def _tokens(
        self, request: CompletionRequest, args: GenerationArguments
    ) -> tuple[list[int], str]:
        """The prompt, and what the answer begins as: "normal" or "reasoning" text."""
        tokenizer = self._tokenizer
        if isinstance(request.prompt, list):
            return request.prompt, "normal"
        if request.request_type == "text":
            return tokenizer.encode(request.prompt), "normal"
        if not tokenizer.has_chat_template:
            return tokenizer.encode(convert_chat(request.messages, request.role_mapping)), "normal"
        options = self.cli_args.chat_template_args | (args.chat_template_kwargs or {})
        prompt = tokenizer.apply_chat_template(
            request.messages, tools=request.tools, add_generation_prompt=True, **options
        )
        state = "normal"
        if tokenizer.has_thinking and (
            tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
        ):
            state = "reasoning"
        return prompt, tokenizer.response_initial_state or state

    def _drop(self, gone: Container[int]) -> None:
        """Frees the places of those whose clients have gone."""
        uids = [uid for uid, live in self._live.items() if live.number in gone]
        for uid in uids:
            del self._live[uid]
        if uids:
            self._remove(uids)
        self._waiting = deque(live for live in self._waiting if live.number not in gone)

    def _fill(self) -> None:
        """Lets in who waits, as far as there are places."""
        while (
            self._waiting
            and len(self._live) < self._at_once
            and not any(live.on_trial for live in self._live.values())
            and self._fits(self._waiting[0])
        ):
            live = self._waiting.popleft()
            try:
                self._insert(live)
            except Exception as error:
                self._fail(live, error)

    def _fits(self, live: _Live) -> bool:
        """Whether there is memory for one more, in a batch as long as its longest sequence."""
        batch = [live, *self._live.values()]
        longest = max(len(live.tokens) for live in batch)
        config, mtp = self._model.args, self._model.mtp is not None
        row = capacity.cache_bytes(config, longest, mtp=mtp, itemsize=default_dtype().size)
        fits = len(batch) == 1 or len(batch) * row <= self._budget
        return self._group.decide("fits", fits)

    def _insert(self, live: _Live) -> None:
        cache, held = self._checkpoints.fetch(live.tokens)
        if live.ctx.prompt_cache_count < 0:
            live.ctx.prompt_cache_count = held
            logging.info(f"Prompt: {len(live.tokens)} tokens, {held} of them cached")
        sampler = live.sampler
        if sampler is not greedy_sampler or self._group.size > 1:
            if live.key is None:
                live.key = self._group.decide("key", _key(live.seed))
            sampler = SeededSampler(sampler, live.key, live.told, self._group)
        live.places = self._checkpoints.places(live.tokens, held)
        cuts = [held, *live.places, len(live.tokens)]
        (uid,) = self._batch.insert_segments(
            [[live.tokens[a:b] for a, b in pairwise(cuts)]],
            [live.max_tokens - live.told],
            [cache],
            [live.tokens[:held]],
            [sampler],
            [live.processors],
            [live.stop],
        )
        self._live[uid], live.fresh = live, True
        self._make_room()

    def _make_room(self) -> None:
        """Leaves the prompt cache what the live sequences do not take."""
        self._checkpoints.max_bytes = max(self._budget - self._batch.prompt_cache_nbytes, 0)
        self._checkpoints.trim(self._checkpoints.max_bytes)

    def _step(self) -> None:
        try:
            prompted, generated = self._batch.next()
            checkpoints = self._batch.extract_cache([r.uid for r in prompted if self._is_place(r)])
        except Exception as error:
            self._recover(error)
            return
        for cache, tokens in checkpoints.values():
            self._keep(tokens, cache)
        for response in prompted:
            self._live[response.uid].queue.put(response.progress)
        for response in generated:
            live = self._live.get(response.uid)
            if live is None:  # ended by a stop word among the tokens before
                continue
            try:
                self._tell(live, response)
            except Exception as error:
                self._live.pop(response.uid, None)
                self._fail(live, error)
                self._remove([response.uid])

    def _is_place(self, response: Prompted) -> bool:
        """Whether a prompt has come to where a checkpoint belongs."""
        live, (done, total) = self._live[response.uid], response.progress
        return not response.end_of_prompt and len(live.tokens) - (total - done) in live.places

    def _tell(self, live: _Live, response: Generated) -> None:
        """Tells a client the next token, and ends what has ended."""
        live.tokens.append(response.token)
        live.told += 1
        live.fresh = live.on_trial = False
        reason = response.finish_reason
        text, stopped = live.held_back.add(live.text.add(response.token, reason), reason)
        logprob: Any = 0.0
        top: Any = ()
        if live.logprobs or live.top_logprobs > 0:
            logprob = response.logprobs[response.token].item()
            top = _format_top_logprobs(response.logprobs, live.top_logprobs, self._tokenizer)
        # With the reason "stop" mlx_lm.server drops the text; "stop" is what it takes an end for.
        told = None if stopped or (reason == "stop" and text) else reason
        live.queue.put(Response(text, response.token, logprob, told, top))
        if reason is None and not stopped:
            return
        live.queue.put(None)
        del self._live[response.uid]
        if response.prompt_cache is None or response.all_tokens is None:  # mlx-lm goes on
            caches = self._batch.remove([response.uid], return_prompt_caches=True)
            for cache, tokens in caches.values():  # none if it ends among the tokens to come
                self._keep(tokens, cache)
        else:
            self._keep(response.all_tokens, response.prompt_cache)

    def _keep(self, tokens: Sequence[int], cache: Cache) -> None:
        try:
            self._make_room()
            self._checkpoints.insert(tokens, cache)
        except Exception as error:
            logging.error(f"A checkpoint could not be kept: {first_line(error)}")

    def _remove(self, uids: list[int]) -> None:
        """Frees the places of sequences, whatever state they are in."""
        try:
            self._batch.remove(uids)
        except Exception as error:  # their caches are brought to an end by forwards
            logging.error(f"A sequence could not be ended: {first_line(error)}", exc_info=error)
            self._begin_anew()

    def _recover(self, error: Exception) -> None:
        """Ends the request to blame for a forward that failed, and begins anew with the others."""
        logging.error(f"A forward failed: {first_line(error)}", exc_info=error)
        self._group.leave(1)  # where others wait for what has not come
        among = list(self._live.items())
        fresh = [(uid, live) for uid, live in among if live.fresh]
        suspects = [(uid, live) for uid, live in fresh if live.on_trial] or fresh or among
        for uid, live in suspects:
            live.failures += 1
            if len(suspects) == 1 or live.failures >= ATTEMPTS:
                del self._live[uid]
                self._fail(live, error)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Makes another batch, to which those in the one there was come back one by one."""
        for live in reversed(self._live.values()):
            live.on_trial = True
            self._waiting.appendleft(live)
        self._live = {}
        depth = self._batch.depth
        self._batch.close()
        mx.clear_cache()
        self._start(depth)

    def _fail(self, live: _Live, error: Exception) -> None:
        logging.error(f"A request failed: {first_line(error)}")
        live.queue.put(RuntimeError(first_line(error)))


def _as_request(tokens: list[int]) -> CompletionRequest:
    prompt: Any = tokens  # as mlx_lm.server's own handler takes them
    return CompletionRequest("text", prompt, [], None, None)


def _key(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(31)
    mx.random.seed(seed)
    return draw_key()
