"""Gets a model ready for its first answer, which would otherwise pause now and then.

On a Mac's GPU the kernels are proved and timed (:mod:`mlx_qwen3next.compute.proof`). A rehearsal on
scratch caches makes all kinds of call that prompts, plain steps and rounds make. It builds graphs
that nobody evaluates: a proof evaluates what it needs, which are the first layers of a kind, and
where all is known nothing is computed. So the rehearsal itself finds what is still to be proved.

On a CPU, MLX builds functions of its own with the C++ compiler when they are first called.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..checkpoint.loading import default_dtype
from ..compute import proof
from ..compute.proof import Finding
from ..model.cache import Round, reserve, settle
from ..model.qwen3_next import Model
from ..model.reading import Reading
from .draft_depth import MOST_COPIED
from .drafters import CATCH_UP
from .drafters.speculation import MTP, Lookup, most_drafted
from .sampling import check_integer

# Numbers of tokens in a forward. The experts' kernels have a kind for each number up to 16, the
# others for classes that end at powers of two (:func:`..compute.operations.rows_class`).
LENGTHS = (*range(1, 17), 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 1024  # tokens of all steps and rounds together, at most
NAMED = 3  # kernels that the line about the proofs names at most

logger = logging.getLogger("mlx_qwen3next")


def prepare(
    model: Model,
    *,
    mtp: MTP = "auto",
    lookup: Lookup = None,
    chunk: int | None = None,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Proves the model's kernels on this machine or, on a CPU, has MLX's functions built.

    What was done on this machine before is not done again. Kinds of call that are left out, such as
    those of several sequences at once, are proved when they first come. So are all of them where
    several processes run the model: one that proves would wait for one that has nothing to prove.
    Where kernels are "on" or "off" nothing is proved.

    Args:
        model: nobody else may use it meanwhile.
        mtp, lookup: as for :func:`mlx_qwen3next.generate_step`; they tell which rounds there will
            be.
        chunk: prompt tokens that will be processed at a time; None for as many as the memory
            allows. Up to 8192 are prepared for.
        say: takes a line about the work, if there is any.

    Raises:
        ValueError: ``mtp``, ``lookup`` or ``chunk`` is out of range.
    """
    depth = most_drafted(mtp, lookup, model)
    if chunk is not None:
        check_integer("chunk", chunk, least=1)
    if model.group.size > 1:
        return
    if model.streamed is None:
        _prepare(model, depth, chunk, say)
        return
    with model.streamed.rehearsal(model) as short:
        _prepare(short, depth, chunk, say)


def _prepare(model: Model, depth: int, chunk: int | None, say: Callable[[str], None]) -> None:
    if proof.uses_kernels() and proof.mode() == "auto":
        if chunk is None:
            chunk = max(Reading.here(model.args, default_dtype().size).most(math.inf, 0), 1)
        found, seconds = prove(model, depth=depth, chunk=chunk)
        if found:
            say(summary(found, seconds))
    elif mx.default_device() == mx.cpu and not _has_built():
        say("building MLX's CPU kernels for this machine, once")
        for call in rehearsal(model, [1, 16], min(depth, 1)):
            mx.eval(call())
    mx.clear_cache()


def prove(
    model: Model, *, depth: int = MOST_COPIED, chunk: int = LENGTHS[-1]
) -> tuple[dict[str, Finding], float]:
    """Proves the kernels about which nothing is known, and shows a bar on a terminal's stderr.

    Args:
        depth: the most tokens drafted in a round; 0 for none.
        chunk: as for :func:`prepare`.

    Returns:
        The new findings, by name and kind of call, and the seconds that it took.
    """
    start, longest = time.perf_counter(), min(chunk, LENGTHS[-1])
    calls = rehearsal(model, [*(n for n in LENGTHS if n < longest), longest], depth)
    # The bar would only flash where little is to be proved.
    bar = tqdm(calls, "proving kernels", unit="step", leave=False, delay=1, disable=None)
    with proof.collected() as found, bar:
        for call in bar:
            call()
    return found, time.perf_counter() - start


def summary(found: Mapping[str, Finding], seconds: float) -> str:
    """Returns a line about findings, which names kernels that are not used; wrong ones first."""
    line = f"kernels: {len(found)} proved in {seconds:.1f} s"
    unused = [(key, of) for key, of in found.items() if not of.used]
    if not unused:
        return line
    unused.sort(key=lambda item: item[1].seconds is not None)
    named = [f"{key}: {of.reason}" for key, of in unused[:NAMED]]
    more = [f"and {len(unused) - NAMED} more"] if len(unused) > NAMED else []
    return f"{line}, {len(unused)} not used ({'; '.join(named + more)})"


def rehearsal(
    model: Model, lengths: Sequence[int], depth: int
) -> list[Callable[[], list[mx.array]]]:
    """Returns functions to be called in order, each of which returns unevaluated results.

    Args:
        lengths: numbers of tokens that a forward of a prompt may have.
        depth: as for :func:`prove`.
    """
    cache = model.make_cache()
    reserve(cache, ROUNDS)  # to grow would evaluate

    def forward(n: int) -> mx.array:
        return model.model(_tokens(model, n), cache)

    def prompt(n: int) -> list[mx.array]:
        """Reads n tokens, which the MTP head then catches up with."""
        results = [model.model(_tokens(model, n), model.make_cache())]
        if depth and model.mtp is not None:
            # Some states may have waited before the longest chunk. In place of the trunk's states,
            # which a proof would have to wait for, the head gets others.
            tokens = _tokens(model, n + CATCH_UP - 1 if n == max(lengths) else n)
            hidden = model.model.embed(tokens)
            results.append(model.mtp(hidden, tokens, model.mtp.make_cache()))
        return results

    def steps() -> list[mx.array]:
        return [model.logits(forward(1)) for _ in range(2)]

    def in_a_round(n: int) -> mx.array:
        with Round(cache, n) as last:
            hidden = forward(n)
            last.commit(n)
        return hidden

    def rounds(n: int) -> list[mx.array]:
        """Makes rounds and a plain step, each after a settled state and after a round."""
        results = [in_a_round(n), forward(1), in_a_round(n), in_a_round(n)]
        settle(cache)
        return results

    # The longest of a class comes first, so that it stands for the class.
    prompts = [partial(prompt, n) for n in sorted(lengths, reverse=True)]
    # A round of one token is the first one after a prompt of one token.
    numbers = range(1, depth + 2) if depth else ()
    return [*prompts, steps, *(partial(rounds, n) for n in numbers)]


def _tokens(model: Model, n: int) -> mx.array:
    return mx.arange(n)[None] % model.args.vocab_size


def _has_built() -> bool:
    """Returns whether MLX has built a function for the CPU on this machine.

    It keeps them as libraries in a directory of its version, among the temporary files.
    """
    place = Path(tempfile.gettempdir(), "mlx", version("mlx"), "cpu")
    return any(place.glob("*.so"))
