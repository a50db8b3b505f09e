"""The generation thread of the server: requests in, tokens out, checkpoints kept on the way.

The tokens come from :mod:`mlx_qwen3next.server.engine.batching`, the checkpoints are kept by
:mod:`mlx_qwen3next.prompt_cache`.

If several processes run one model (:mod:`mlx_qwen3next.group`), each of them has this thread and
does the same work. In every round of the loop rank 0, the only one with clients, decides for all
ranks which requests have arrived and which clients have gone.

A failed forward breaks the caches of all sequences in it. Each of these sequences is resumed from
its checkpoint and its tokens, one after the other: a sequence that fails alone has caused the
failure, and its request ends with the error.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...decoding.draft_depth import Depth
from ...decoding.drafters.speculation import MTP, Speculation
from ...decoding.pace import PromptPace
from ...decoding.sampling import SeededSampler
from ...errors import QueueFullError, first_line
from ...model.cache import Cache
from ...model.quantized_kv import KVQuantization
from ...model.qwen3_next import Model
from ...model.reading import MOST
from ...prompt_cache.store import PromptCache
from ..answers.tokens import Context, SampledToken
from ..requests.fields import Options
from ..requests.prompt import Prompt, tokenized_prompt
from .batching import SpeculativeBatchGenerator, most_together
from .lone_sequence import Generated, Prompted
from .memory import Memory
from .metrics import Metrics
from .request import NullQueue, Request, random_key, read_request

ATTEMPTS = 3  # failed forwards that end a request
IDLE = 0.1  # seconds to wait for a request if there is nothing else to do
AHEAD = 256  # tokens of each answer for which there must be memory when a request is admitted
KEEPALIVE = 1.0  # seconds between two progress reports to waiting requests


class Engine:
    """Loads the model and answers requests, in a thread of its own.

    Args:
        args: the arguments of the command.
        load: loads the model and its tokenizer.
        prompt_cache: makes the prompt cache for a tokenizer, after the model is loaded.
        mtp: as for :func:`mlx_qwen3next.generate_step`.
        failed: called with the error if the model cannot be loaded.

    Attributes:
        args: the arguments of the command.
        metrics: the counts of what happens here and on the HTTP side.
        context_length: in tokens; None until the model is loaded.
        ended: the event that the thread sets last. ``Thread.join()`` is no replacement for waiting:
            it takes a thread for ended once Ctrl-C has interrupted it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        load: Callable[[], tuple[Model, TokenizerWrapper]],
        prompt_cache: Callable[[TokenizerWrapper], PromptCache],
        mtp: MTP = "auto",
        failed: Callable[[Exception], None] = lambda _: None,
    ):
        self.args, self.metrics, self.ended = args, Metrics(), threading.Event()
        self.context_length: int | None = None
        self._load, self._make_prompt_cache = load, prompt_cache
        self._mtp, self._failed = mtp, failed
        self._arrived: Queue[Request] = Queue()
        self._running: dict[int, Request] = {}  # by the batch's number of the sequence
        self._waiting: deque[Request] = deque()
        self._numbers = count()
        self._last_keepalive = 0.0
        self._loaded = threading.Event()
        # One request enters at a time: tokenizers are not safe for several threads.
        self._entering = threading.Lock()
        self._draining = False
        self._deadline, self._save = 0.0, True  # end of draining; whether to save the cache then
        self._error: Exception | None = None  # that has ended the thread
        threading.Thread(target=self._run).start()

    # --- for other threads ---------------------------------------------------------------------
    @property
    def health(self) -> str:
        """The state: "ok", "loading", "draining" or "unavailable"."""
        if self.ended.is_set():
            return "unavailable"
        return "draining" if self._draining else "ok" if self._loaded.is_set() else "loading"

    def generate(
        self,
        prompt: Prompt,
        options: Options,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> tuple[Context, Iterator[SampledToken]]:
        """Answers a request once the model is loaded; tokenizes in the caller's thread.

        Args:
            progress: called with the number of prompt tokens processed and of all of them, at
                times, while the tokens are awaited.

        Raises:
            ValueError: the request cannot be answered.
            QueueFullError: too many requests wait already.
            RuntimeError: the server is shutting down.
        """
        with self._entered():
            self._check_queue()
            request = self._read(prompt, options, Queue())
            self._arrived.put(request)
        return request.context, request.answer(progress, self.ended)

    def count_tokens(self, prompt: Prompt, options: Options) -> int:
        """The number of a prompt's tokens; raises as :meth:`generate`."""
        with self._entered():
            return len(tokenized_prompt(prompt, self._tokenizer, options.template_options).tokens)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Lets one request at a time to the tokenizer, once the model is loaded."""
        while not self._loaded.wait(IDLE) and not self.ended.is_set():
            pass
        if self._draining or self.ended.is_set():
            raise RuntimeError("the server is shutting down") from self._error
        with self._entering:
            try:
                yield
            except (ValueError, QueueFullError):
                raise
            except Exception as error:  # templates and tokenizers raise all kinds of exceptions
                raise ValueError(first_line(error)) from error

    def _check_queue(self) -> None:
        """Checks that one more request may wait, if there is no free place for it in the batch."""
        others = len(self._running) + len(self._waiting) + self._arrived.qsize()
        if others - self._max_running >= (limit := self.args.max_queue):
            raise QueueFullError(f"{limit} requests are waiting already; try again later")

    def gauges(self) -> dict[str, float]:
        """The values of this moment, for the metrics."""
        running, waiting = len(self._running), len(self._waiting) + self._arrived.qsize()
        values: dict[str, float] = {"requests_running": running, "requests_waiting": waiting}
        checkpoints = getattr(self, "_checkpoints", None)  # while the model is loaded
        if checkpoints is not None:
            values["prompt_cache_bytes"] = checkpoints.nbytes
            values["prompt_cache_checkpoints"] = len(checkpoints)
        return values

    def drain(self, seconds: float) -> None:
        """Ends the thread after it has answered all requests, or after that many seconds.

        The prompt cache is saved before, unless ``seconds`` is 0. The event ``ended`` is set last.
        """
        self._deadline, self._save = time.monotonic() + seconds, seconds > 0
        self._draining = True

    # --- the thread ----------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            if self._prepare():
                self._serve()
        except Exception as error:
            logging.exception("The generation thread has died")
            self._error = error
        # MLX aborts the process at exit if a thread that drew random numbers leaves its streams.
        mx.clear_streams()
        self.ended.set()

    def _prepare(self) -> bool:
        """Loads the model and makes all that is needed beside it; returns whether that worked."""
        try:
            self._model, self._tokenizer = self._load()
            depth = Speculation.of(self._model).depth(self._mtp, self.args.lookup)
            self._group = self._model.group
            self.context_length = self._model.args.max_position_embeddings
            self._checkpoints = self._make_prompt_cache(self._tokenizer)
        except Exception as error:
            self._error = error
            self._failed(error)
            return False
        self._stream = mx.default_stream(mx.default_device())
        args, quantized = self.args, self.args.kv_bits is not None
        self._kv = KVQuantization(args.kv_bits, args.kv_group_size, args.quantized_kv_start)
        self._memory = Memory(self._model, self._checkpoints, self._kv)
        self._pace = PromptPace.of(self._model, args.max_stall, quantized=quantized)
        self._make_batch(depth)
        self._loaded.set()
        return True

    def _serve(self) -> None:
        while self._update_requests():
            self._admit()
            self._postpone()
            self._memory.give_back(self._running)
            if self._running:
                self._memory.make_room(self._batch.prompt_cache_nbytes)
                self._step()
                self.metrics.add_experts(self._model.streamed)
            self._send_keepalives()
        while self._save and self._checkpoints.save_next():
            pass
        self._batch.close()
        if self._model.streamed is not None:
            self._model.streamed.settle()
        del self._batch, self._memory, self._checkpoints, self._model, self._tokenizer

    def _make_batch(self, depth: Depth) -> None:
        args = self.args
        self._max_running = most_together(args.decode_concurrency, self._model)
        self._batch = SpeculativeBatchGenerator(
            self._model,
            depth,
            self._kv,
            self._pace,
            completion_batch_size=self._max_running,
            prefill_batch_size=args.prompt_concurrency,
            prefill_step_size=args.prefill_step_size or MOST,
            stream=self._stream,
        )

    # --- requests that come and go -------------------------------------------------------------
    def _update_requests(self) -> bool:
        """Accepts new requests and drops those whose clients have gone, alike on all ranks.

        Returns:
            Whether the loop goes on.
        """
        new: list[Request] = []
        decision: Any = None
        if self._group.rank == 0:
            over = self._is_over()
            new = [] if over else self._accept_requests()
            known = [*self._running.values(), *self._waiting]
            gone = {request.number for request in known if request.context.stopped}
            if not (over or new or known):
                return True  # nothing that the other ranks need to know
            decision = over, [(request.tokens, request.options) for request in new], gone
        over, contents, gone = self._group.decide("requests", decision)
        if self._group.rank > 0:
            new = [self._read(tokens, args, NullQueue()) for tokens, args in contents]
        for request in new:
            request.number = next(self._numbers)
        self._waiting += new
        self._drop(gone)
        return not over

    def _is_over(self) -> bool:
        """Whether draining has ended; at its deadline the requests left end with an error."""
        if not self._draining:
            return False
        left = [*self._running.values(), *self._waiting]
        if time.monotonic() < self._deadline:
            return not left and self._arrived.empty()
        while not self._arrived.empty():
            left.append(self._arrived.get())
        for request in left:
            request.queue.put(RuntimeError("the server is shutting down"))
        return True

    def _accept_requests(self) -> list[Request]:
        """Returns the new requests. If there are no others, waits for one or saves the cache."""
        idle, new = not (self._running or self._waiting), []
        try:
            new.append(self._arrived.get(block=idle, timeout=IDLE))
            while True:
                new.append(self._arrived.get_nowait())
        except Empty:
            if idle and not new:
                self._checkpoints.save_next()
        return new

    def _read(self, prompt: Prompt, options: Options, queue: Queue[Any]) -> Request:
        return read_request(prompt, options, queue, self._model, self._tokenizer, self.metrics)

    def _drop(self, gone: Container[int]) -> None:
        """Drops requests, by their numbers."""
        uids = [uid for uid, request in self._running.items() if request.number in gone]
        for uid in uids:
            del self._running[uid]
        if uids:
            self._remove(uids)
        self._waiting = deque(request for request in self._waiting if request.number not in gone)

    def _send_keepalives(self) -> None:
        """Sends progress to the waiting requests, which lets the handler notice lost clients."""
        if time.monotonic() >= self._last_keepalive + KEEPALIVE:
            self._last_keepalive = time.monotonic()
            for request in self._waiting:
                request.queue.put((0, len(request.tokens)))

    # --- the batch -----------------------------------------------------------------------------
    def _admit(self) -> None:
        """Moves waiting requests into the batch, as many as it has room for."""
        while (
            self._waiting
            and len(self._running) < self._max_running
            and not any(request.on_trial for request in self._running.values())
            and self._memory.fits([*self._running.values(), self._waiting[0]], AHEAD)
        ):
            request = self._waiting.popleft()
            try:
                self._insert(request)
            except Exception as error:
                request.fail(error)

    def _postpone(self) -> None:
        """Makes the youngest requests wait again while the batch has no memory for its next tokens.

        They resume from their tokens.
        """
        while not self._memory.fits([*self._running.values()], 1):
            uid = max(self._running, key=lambda uid: self._running[uid].number)
            request = self._running.pop(uid)
            logging.info("A request waits again: the answers have outgrown the memory")
            self._waiting.appendleft(request)
            # With new tokens in it the checkpoint would hold the whole text, and be of no use.
            self._remove([uid], keep=request.fresh)

    def _insert(self, request: Request) -> None:
        cache, held = self._checkpoints.fetch(request.tokens)
        if request.context.cached is None:
            request.context.cached = held
            self.metrics.add("prompt_tokens", len(request.tokens))
            self.metrics.add("prompt_tokens_cached", held)
            self.metrics.add("prompt_cache_lookups")
            self.metrics.add("prompt_cache_hits", held > 0)
        sampler = request.sampler
        if sampler is not greedy_sampler or self._group.size > 1:
            if request.key is None:
                request.key = self._group.decide("key", random_key(request.options.seed))
            sampler = SeededSampler(sampler, request.key, request.generated, self._group)
        request.checkpoints = self._checkpoints.places(request.tokens, held)
        cuts = [held, *request.checkpoints, len(request.tokens)]
        (uid,) = self._batch.insert_segments(
            [[request.tokens[a:b] for a, b in pairwise(cuts)]],
            [request.max_tokens - request.generated],
            [cache],
            [request.tokens[:held]],
            [sampler],
            [request.processors],
            [request.stop],
        )
        self._running[uid], request.fresh = request, True

    def _step(self) -> None:
        """Runs one step of the batch and sends its results."""
        try:
            prompted, generated = self._batch.next()
            ready = [response.uid for response in prompted if self._is_at_checkpoint(response)]
            caches = self._batch.extract_cache(ready)
        except Exception as error:
            self._recover(error)
            return
        for cache, tokens in caches.values():
            self._keep_checkpoint(tokens, cache)
        for response in prompted:
            self._running[response.uid].queue.put(response.progress)
        for response in generated:
            request = self._running.get(response.uid)
            if request is None:  # an earlier token of this step has completed a stop word
                continue
            try:
                self._send(request, response)
            except Exception as error:
                self._running.pop(response.uid, None)
                request.fail(error)
                self._remove([response.uid])

    def _is_at_checkpoint(self, response: Prompted) -> bool:
        """Whether a prompt is processed up to one of its checkpoints."""
        request, (done, total) = self._running[response.uid], response.progress
        processed = len(request.tokens) - (total - done)
        return not response.end_of_prompt and processed in request.checkpoints

    def _send(self, request: Request, response: Generated) -> None:
        """Sends the next token of a request, and keeps its cache if that was the last token."""
        if not request.send(response):
            return
        del self._running[response.uid]
        if response.prompt_cache is None or response.all_tokens is None:  # ended by a stop word
            self._remove([response.uid], keep=True)
        else:
            self._keep_checkpoint(response.all_tokens, response.prompt_cache)

    def _keep_checkpoint(self, tokens: Sequence[int], cache: Cache) -> None:
        try:
            self._memory.make_room(self._batch.prompt_cache_nbytes)
            self._checkpoints.insert(tokens, cache)
        except Exception as error:
            logging.error(f"A checkpoint could not be kept: {first_line(error)}")

    def _remove(self, uids: list[int], keep: bool = False) -> None:
        """Removes sequences from the batch, in whatever state they are.

        Args:
            keep: whether their caches are kept as checkpoints.
        """
        try:
            caches = self._batch.remove(uids, return_prompt_caches=keep)
        except Exception as error:  # completing their caches may take a forward
            logging.error(f"A sequence could not be ended: {first_line(error)}", exc_info=error)
            self._restart_batch()
            return
        for cache, tokens in caches.values():  # none if a later token of this step has ended it
            if tokens:
                self._keep_checkpoint(tokens, cache)

    # --- after an error ------------------------------------------------------------------------
    def _recover(self, error: Exception) -> None:
        """Ends the request that has caused a failed forward, and resumes the others."""
        logging.error(f"A forward failed: {first_line(error)}", exc_info=error)
        self._group.leave(1)  # the other ranks would wait for this one forever
        affected = list(self._running.items())
        fresh = [(uid, request) for uid, request in affected if request.fresh]
        suspects = [(uid, request) for uid, request in fresh if request.on_trial]
        suspects = suspects or fresh or affected
        for uid, request in suspects:
            request.failures += 1
            if len(suspects) == 1 or request.failures >= ATTEMPTS:
                del self._running[uid]
                request.fail(error)
        self._restart_batch()

    def _restart_batch(self) -> None:
        """Makes a new batch, which the running requests enter one by one."""
        for request in reversed(self._running.values()):
            request.on_trial = True
            self._waiting.appendleft(request)
        self._running = {}
        self._batch.close()
        mx.clear_cache()
        self._make_batch(self._batch.depth)
