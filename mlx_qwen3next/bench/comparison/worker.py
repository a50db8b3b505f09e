"""The process that loads the model of one side and measures it.

Requests and replies are JSON lines. A request is ``{"do": name, …}`` with the name of a method of
:class:`Backend` and its arguments; the reply is ``{"result": …}`` or ``{"error": …}``. The first
reply has no request and tells the result of loading.

If several processes run one model (``mlx.launch``), rank 0 starts such a worker, which joins the
group. On the other ranks the bench itself joins, and follows the worker (:func:`follow`).
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step as stock_generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import load_model as load_stock
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ...checkpoint.loading import load_model
from ...compute import proof
from ...compute.cpu_matmul import TransposedLinear
from ...decoding import queueing
from ...decoding.drafters.speculation import Speculation
from ...decoding.generation import generate_step
from ...decoding.pace import PromptPace
from ...decoding.preparation import prepare
from ...decoding.sequence import prefill
from ...decoding.speculative import Acceptance, Token
from ...decoding.validation import held_by
from ...errors import first_line
from ...group import ALONE, Group, join
from ...model import capacity
from ...model.cache import Undo, settle
from ...model.reading import Reading
from ...prompt_cache.store import PromptCache
from ..graph import arrays_of, count

TIMED = 7  # repeats of timing a part of a step, after one that does not count
COPIES = 5  # repeats of measuring the bandwidth
MOST_COPIED = 1 << 28  # bytes of the copied array, at most
MATRICES = nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear, TransposedLinear


class Backend(ABC):
    """The measurements of a loaded ``model`` that both packages have."""

    model: Any
    rank = 0

    @abstractmethod
    def steps(self, prompt: list[int], tokens: int, mtp: str | int) -> Iterable[Any]:
        """Decodes greedily with the package's own loop, one step for each token."""

    def held(self) -> dict[str, Any]:
        """Describes the loaded model: dtypes, bytes, matrices and device."""
        leaves: Any = tree_flatten(self.model.parameters())
        floating = [a for _, a in leaves if mx.issubdtype(a.dtype, mx.floating)]
        matrices = [m for m in self.model.modules() if isinstance(m, MATRICES)]
        return {
            "dtypes": sorted({str(a.dtype).rpartition(".")[2] for a in floating}),
            "bytes": sum(a.nbytes for _, a in leaves),
            "matrices": len(matrices),
            "transposed": sum(isinstance(m, TransposedLinear) for m in matrices),
            "device": str(mx.default_device()),
        }

    def generate(self, prompt: list[int], tokens: int, mtp: str | int = "off") -> dict[str, Any]:
        """Generates greedily.

        Returns:
            ``first``: seconds to the first token; ``further``: seconds for each token after it;
            ``tokens``: the token ids; ``per_round``: mean tokens of a round; ``accepted``: the
            share of right drafts by depth; ``drafted``: the number of rounds by depth; ``peak``,
            ``resident``: bytes.
        """
        mx.clear_cache()
        mx.reset_peak_memory()
        steps, generated, rounds = Acceptance(), [], Counter[int]()
        times = [time.perf_counter()]
        for step in self.steps(prompt, tokens, mtp):
            times.append(time.perf_counter())
            if not isinstance(step, Token):
                step = Token(int(step[0]), step[1], False)
            steps.add(step)
            rounds[step.drafted] += not step.from_draft
            generated.append(step.token)
        return {
            "first": times[1] - times[0],
            "further": (times[-1] - times[1]) / max(len(generated) - 1, 1),
            "tokens": generated,
            "per_round": steps.mean_length,
            "accepted": list(steps.by_depth),
            "drafted": dict(rounds),
            "peak": mx.get_peak_memory(),
            "resident": _resident(),
        }

    def logits(self, prompt: list[int], tail: int, file: str) -> str:
        """Saves the logits ``[vocab]`` after a prompt and returns the name of the file.

        Args:
            prompt: token ids.
            tail: the number of tokens in the last forward.
            file: the name of the file, in numpy's format.
        """
        cache = self.model.make_cache()
        tokens = mx.array(prompt)[None]
        if len(prompt) > tail:
            mx.eval(self.model(tokens[:, :-tail], cache=cache), [c.state for c in cache])
        last = self.model(tokens[:, -tail:], cache=cache)[0, -1]
        mx.eval(last)
        if self.rank == 0:
            np.save(file, np.array(last.astype(mx.float32)))
        return file

    def queued(self) -> int:
        """Counts the operations that a step of one token queues, without views."""
        cache = self.model.make_cache()
        mx.eval(self.model(mx.array([[1, 2, 3]]), cache=cache), arrays_of(cache))
        token = mx.array([[1]])
        mx.eval(token)
        return count([self.model(token, cache=cache), *arrays_of(cache)]).total()

    def fixed(self) -> float:
        """Seconds of a step outside the layers: embedding, norm, output and choice."""
        trunk = self.model.model
        head = getattr(self.model, "lm_head", None) or trunk.embed_tokens.as_linear
        token = mx.array([[1]])
        return _timed(lambda: head(trunk.norm(trunk.embed_tokens(token))).argmax(axis=-1))

    @abstractmethod
    def turns(self, first: list[int], more: list[int], tokens: int, keep: bool) -> dict[str, Any]:
        """Measures the seconds to the first token of two turns of a chat.

        Args:
            first: the prompt of the first turn.
            more: the tokens that the second turn adds after the first turn and its answer.
            tokens: the number of tokens of the first answer.
            keep: whether the second turn uses the cache of the first one.
        """


class Ours(Backend):
    """This package."""

    def __init__(self, directory: str, dtype: str, group: Group, divided: dict[str, Any]):
        options: dict[str, Any] = {"context": 1, "group": group, **divided}
        self.model = load_model(directory, dtype=getattr(mx, dtype), **options)
        self._cache_limit = queueing.limit_cache()
        maybe_set_recommended_wired_limit()  # as the commands do
        self._group, self.rank = group, group.rank
        self._itemsize = getattr(mx, dtype).size
        self._progress: list[tuple[float, int]] = []  # seconds, and prompt tokens processed by then
        self._grown: list[Any] = []
        self._before = 0

    def held(self) -> dict[str, Any]:
        how = queueing.settings() | {"cache": self._cache_limit}
        return super().held() | {"queueing": how}

    def steps(self, prompt: list[int], tokens: int, mtp: str | int) -> Iterable[Any]:
        self._progress = []

        def progress(processed: int, _: int) -> None:
            self._progress.append((time.perf_counter(), processed))

        options = {"max_tokens": tokens, "mtp": cast(Any, mtp), "lookup": "off"}
        return generate_step(prompt, self.model, prompt_progress_callback=progress, **options)

    def generate(self, prompt: list[int], tokens: int, mtp: str | int = "off") -> dict[str, Any]:
        """As the other side's.

        Returns:
            Also ``chunk``: seconds and tokens of the prompt's chunk that took longest; ``over``:
            the peak of memory over what was in use before, in bytes; ``formula``: these bytes as
            predicted.
        """
        gc.collect()
        before = mx.get_active_memory()
        sample = super().generate(prompt, tokens, mtp)
        config, scratch, longest = self.model.args, 0, (0.0, 0)
        reading = Reading.here(config, self._itemsize)
        for (start, held), (end, processed) in pairwise(self._progress):
            longest = max(longest, (end - start, processed - held))
            scratch = max(scratch, reading.scratch(processed - held, held))
        cache = capacity.cache_bytes(
            config, len(prompt) + tokens, mtp=mtp != "off", itemsize=self._itemsize
        )
        memory = {"over": sample["peak"] - before, "formula": cache + scratch}
        return sample | {"chunk": longest} | memory

    def turns(self, first: list[int], more: list[int], tokens: int, keep: bool) -> dict[str, Any]:
        spare = min(self._group.gather("spare", capacity.spare()))
        cache = PromptCache(max_bytes=spare, group=self._group) if keep else None

        def steps(prompt: list[int], n: int) -> Iterable[Any]:
            return generate_step(prompt, self.model, max_tokens=n, mtp="off", prompt_cache=cache)

        one, generated = _to_first(steps(first, tokens))
        two, _ = _to_first(steps([*first, *(t.token for t in generated), *more], 1))
        return {"first": one, "second": two}

    def chosen(self) -> list[list[float]]:
        """The measurements behind "auto": each depth, a round's seconds and tokens, and whether the
        round was measured.
        """
        return [list(promise) for promise in Speculation.of(self.model).explain()]

    def findings(self) -> dict[str, dict[str, Any]]:
        """The findings about the kernels on this machine, by kind of call."""
        return {kind: asdict(finding) for kind, finding in proof.findings().items()}

    def bandwidth(self) -> float:
        """The bandwidth: the most bytes per second at which MLX copies or sums a large array."""
        size = min(MOST_COPIED, capacity.spare() // 8)
        x = mx.zeros((size // 4,))
        mx.eval(x)
        best = 0.0
        for _ in range(COPIES):
            for action, moved in ((mx.negative, 2 * x.nbytes), (mx.sum, x.nbytes)):
                start = time.perf_counter()
                mx.eval(action(x))
                best = max(best, moved / (time.perf_counter() - start))
        return best

    def grow(self, tokens: list[int]) -> float:
        """Reads ``tokens`` after all tokens read so far, and returns the seconds."""
        if not self._grown:
            gc.collect()  # frees the prompt caches of earlier measurements
            mx.clear_cache()
            self._before = mx.get_active_memory()
            self._grown = self.model.make_cache()
        pace, start = PromptPace.of(self.model), time.perf_counter()
        while tokens:
            held = held_by(self.model, self._grown)
            n = pace.size(len(tokens), held)
            pace.start()
            prefill(self.model, self._grown, mx.array(tokens[:n]))
            pace.stop(n, held)
            tokens = tokens[n:]
        return time.perf_counter() - start

    def grown(self) -> dict[str, float]:
        """Measures a step after the tokens read so far.

        Returns:
            ``linear``, ``attention``: seconds of one layer of the kind; ``step``: seconds of the
            whole step; ``cache``: bytes in use besides the model; ``formula``: these bytes as
            predicted.
        """
        cache, model = self._grown, self.model
        settle(cache)
        token = mx.array([[1]])
        x = model.model.embed_tokens(token)
        mx.eval(x, [c.state for c in cache])
        seconds = {"step": _timed(lambda: model(token, cache=cache).argmax(axis=-1), cache)}
        for name, linear in (("linear", True), ("attention", False)):
            kinds = [layer.is_linear == linear for layer in model.layers]
            if any(kinds):
                layer, entry = model.layers[kinds.index(True)], cache[kinds.index(True)]
                seconds[name] = _timed(partial(layer, x, None, entry), [entry])
        mx.clear_cache()
        in_use = mx.get_active_memory() - self._before
        held = held_by(model, cache) + 1  # the steps, though undone, have made room for one token
        formula = capacity.cache_bytes(model.args, held, mtp=False, itemsize=x.dtype.size)
        return {**seconds, "cache": in_use, "formula": formula}


class Stock(Backend):
    """Stock mlx-lm."""

    def __init__(self, directory: str, dtype: str, group: Group, divided: dict[str, Any]):
        if group.size > 1 or divided:
            raise ValueError("mlx-lm is measured on one machine alone")
        self.model, _ = load_stock(Path(directory))
        maybe_set_recommended_wired_limit()  # as mlx-lm's commands do
        if dtype == "float32":
            self.model.set_dtype(mx.float32)
            _widen_embedding(self.model)
            mx.eval(self.model.parameters())

    def steps(self, prompt: list[int], tokens: int, mtp: str | int) -> Iterable[Any]:
        return stock_generate_step(mx.array(prompt), self.model, max_tokens=tokens)

    def turns(self, first: list[int], more: list[int], tokens: int, keep: bool) -> dict[str, Any]:
        cache = make_prompt_cache(self.model)

        def steps(prompt: list[int], n: int) -> Iterable[Any]:
            return stock_generate_step(
                mx.array(prompt), self.model, max_tokens=n, prompt_cache=cache
            )

        one, _ = _to_first(steps(first, tokens))
        two, _ = _to_first(steps(more, 1))
        return {"first": one, "second": two}


def _widen_embedding(model: Any) -> None:
    """Replaces an embedding whose scales are bytes, because its rows are bfloat16 in any dtype."""
    embedding = model.model.embed_tokens
    if getattr(embedding, "mode", "affine") != "affine":
        table = nn.Embedding(embedding.num_embeddings, embedding.dims)
        table.weight = embedding(mx.arange(embedding.num_embeddings)).astype(mx.float32)
        model.model.embed_tokens = table


def _to_first(steps: Any) -> tuple[float, list[Any]]:
    """Runs all steps, and returns the seconds to the first one and the list of them."""
    start = time.perf_counter()
    with closing(steps):
        taken = [next(steps)]
        seconds = time.perf_counter() - start
        taken += steps
    return seconds, taken


def _timed(part: Callable[[], mx.array], cache: list[Any] | None = None) -> float:
    """The median seconds of a part of a step, which is undone each time."""
    seconds = []
    for _ in range(TIMED + 1):
        with Undo(cache or []) as undo:
            start = time.perf_counter()
            mx.eval(part(), arrays_of(cache))
            seconds.append(time.perf_counter() - start)
        undo()
    return statistics.median(seconds[1:])


def _resident() -> int:
    """The peak memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(import_seconds: float) -> None:
    """Loads the model and replies until the requests end.

    The arguments of the process are ``ours`` or ``stock``, the directory of the model, the dtype,
    and how several ranks divide the model, in JSON.

    Args:
        import_seconds: the time of the imports, for the first reply.
    """
    which, directory, dtype, divided = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps other output of the process out of the replies

    def reply(action: Callable[[], Any]) -> Any:
        try:
            result = {"result": action()}
        except Exception as error:  # of any kind; the parent reports it
            result = {"error": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(result), file=replies, flush=True)
        return result.get("result")

    with join() if which == "ours" else ALONE as group:
        backend: Any = None

        def load() -> dict[str, Any]:
            nonlocal backend
            start = time.perf_counter()
            kind: Any = {"ours": Ours, "stock": Stock}[which]
            backend = kind(directory, dtype, group, json.loads(divided))
            seconds = time.perf_counter() - start
            if which == "ours":
                prepare(backend.model)
            about = {"import": import_seconds, "load": seconds, "ranks": group.size}
            return {**about, "resident": _resident(), **backend.held()}

        reply(load)
        for line in sys.stdin:
            request = group.decide("request", json.loads(line))
            reply(partial(getattr(backend, request.pop("do")), **request))
        group.decide("request", None)


def follow(directory: Path, dtype: str, divided: dict[str, Any]) -> None:
    """Runs on a rank other than 0, and follows the requests to the worker of rank 0."""
    with join() as group:
        backend = Ours(str(directory), dtype, group, divided)
        while (request := group.decide("request", None)) is not None:
            with suppress(ValueError):  # rank 0 has the same error and reports it
                getattr(backend, request.pop("do"))(**request)
