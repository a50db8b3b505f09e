"""Measures the sides in turns, and collects the samples in one dict, as in the JSON file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..models import rank
from .agreement import EXACT, ROUNDED, check_logits, check_tie, common_prefix, error_of
from .growth import MARKS, STEP
from .sides import Side, Worker, WorkerError, partner

DEPTHS = (1, 2, 3, 4)
SPECULATED = 128  # tokens of a measurement of speculation
WARM_UP = 256  # tokens before the measurements, for "auto" to learn the depth
MORE = 64  # tokens that a second turn of a chat adds
LARGE = 4e9  # bytes of a model; a larger one is loaded only once

Samples = Sequence[Mapping[str, Any]]  # results of the worker's ``generate``


@dataclass
class Run:
    """A run of the bench: its settings and its results.

    Args:
        directory: the directory of the model, which both packages read.
        sides: the sides to compare. The first one is this package; it is used for measurements
            that mlx-lm does not have.
        prompt: token ids, enough for the longest context and the growth.
        contexts: lengths of the prompt in tokens, ascending.
        tokens: the number of tokens to decode after a prompt.
        repeats: the number of repeats of a measurement.
        limit: seconds for one side at one length.
        together: whether the models of all sides fit the memory at once.
        exact: whether mlx-lm rounds no weight of the files, so that sides in float32 agree.
        speculates: whether the model has an MTP head.
        random: whether the weights are random, which makes the acceptance of drafts meaningless.
        model_bytes: the size of the model's files.
        growth: the length in tokens up to which growth is measured; 0 for none.
        room: the length of the model's context in tokens.
        divided: how several ranks divide the model, as options of :func:`mlx_qwen3next.load`.
        raw: the samples.
        notes: sentences for the report, without the full stop.
    """

    directory: Path
    sides: list[Side]
    prompt: list[int]
    contexts: list[int]
    tokens: int
    repeats: int
    limit: float
    together: bool
    exact: bool
    speculates: bool
    random: bool
    model_bytes: int
    growth: int = 0
    room: int = 0
    divided: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def middle(self) -> int:
        """The context of measurements at a single length.

        It is the second one, or the first if the model's context has no room for another turn.
        """
        fitting = [n for n in self.contexts[:2] if self.takes_another_turn(n)]
        return fitting[-1] if fitting else self.contexts[0]

    def takes_another_turn(self, n: int) -> bool:
        """Whether the model's context has room for another turn of a chat after ``n`` tokens."""
        return n + self.tokens + MORE < self.room


def measure(run: Run) -> dict[str, Any]:
    """Takes all measurements of a run and returns ``run.raw``.

    Raises:
        Disagreement: the sides do not compute the same.
        WorkerError: a side failed.
    """
    run.raw |= {"loads": {}, "speed": {}, "left_out": {}, "turns": {}, "steps": {}, "checks": {}}
    # One after the other, this package comes last, because its logits decide about ties.
    groups = [list(run.sides)] if run.together else [[side] for side in reversed(run.sides)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(unit="", disable=None, leave=False, bar_format="{desc} [{elapsed}]") as bar,
    ):
        session = _Session(run, Path(scratch), bar)
        for group in groups:
            with session.workers(group):
                session.measure(group)
    return run.raw


class _Session:
    """The workers of the sides that are in memory, and their measurements."""

    def __init__(self, run: Run, scratch: Path, bar: Any):
        self._run, self._scratch, self._bar = run, scratch, bar
        self._raw, self._alive = run.raw, dict[Side, Worker]()
        self._logits: dict[Side, np.ndarray] = {}

    # --- workers ---------------------------------------------------------------------------------
    @contextmanager
    def workers(self, group: Sequence[Side]) -> Iterator[None]:
        """Loads the models of a group in turns, in new processes; keeps the last ones."""
        run = self._run
        repeats = run.repeats if run.model_bytes <= LARGE and rank() is None else 1
        with ExitStack() as stack:
            for repeat in range(repeats):
                for side in group:
                    if side not in run.sides:
                        continue
                    self._show(f"loading, {side.label}")
                    try:
                        worker = Worker(side, run.directory, run.divided)
                    except WorkerError as error:
                        self._drop_side(side, error)
                        continue
                    self._raw["loads"].setdefault(side.label, []).append(worker.loaded)
                    if repeat < repeats - 1:
                        worker.close()
                    else:
                        stack.callback(worker.close)
                        self._alive[side] = worker
            yield
        self._alive.clear()

    def _drop_side(self, side: Side, error: WorkerError) -> None:
        """Drops a side of mlx-lm that has failed; raises the error if the side is ours."""
        if side.which == "ours":
            raise error
        self._run.notes.append(f"stock mlx-lm cannot run this model; left out: {error}")
        self._run.sides.remove(side)
        if side in self._alive:
            self._alive.pop(side).close()

    def _show(self, status: str) -> None:
        self._bar.set_description_str(status)

    # --- measurements ----------------------------------------------------------------------------
    def measure(self, group: Sequence[Side]) -> None:
        """Takes all measurements of a group of sides."""
        run = self._run
        self._compare_logits()
        for context in run.contexts:
            self._speed(context)
        for side, worker in self._alive.items():
            parts = {"queued": worker.ask("queued"), "fixed": worker.ask("fixed")}
            self._raw["steps"][side.label] = parts
        self._turns()
        ours = run.sides[0]
        if ours not in self._alive:
            return
        self._compare_tokens()
        self._raw["bandwidth"] = self._alive[ours].ask("bandwidth")
        self._raw["findings"] = self._alive[ours].ask("findings")
        if run.speculates:
            self._speculation(ours)
        if run.growth:
            self._growth(self._alive[ours])

    def _speed(self, context: int) -> None:
        """Measures prefill and decoding at one context, in turns."""
        run, tokens = self._run, self._run.tokens
        for repeat in range(run.repeats):
            for side, worker in self._alive.items():
                samples = self._raw["speed"].setdefault(side.label, {})
                expected = predicted(samples, context, tokens)
                here = samples.get(context, [])
                spent = [s["first"] + s["further"] * tokens for s in here]
                if repeat == 0 and expected > run.limit:
                    self._raw["left_out"].setdefault(side.label, {})[context] = expected
                    continue
                if (repeat > 0 and not here) or not fits_another(spent, run.limit):
                    continue
                self._show(f"{side.label}, {context} tokens, repeat {repeat + 1} of {run.repeats}")
                sample = worker.ask("generate", prompt=run.prompt[:context], tokens=tokens)
                samples.setdefault(context, []).append(sample)

    def _turns(self) -> None:
        """Measures the time to the first token of the second turn of a chat."""
        run, n = self._run, self._run.middle
        more = run.prompt[:MORE]
        if not run.takes_another_turn(n):
            run.notes.append("a second turn is left out: the model's context has no room for it")
            return
        for _ in range(run.repeats):
            for side, worker in self._alive.items():
                done = self._raw["turns"].get(side.label, [])
                spent = [result["first"] + result["second"] for result in done]
                if n not in self._raw["speed"][side.label] or not fits_another(spent, run.limit):
                    continue
                for keep in (True, False) if side.which == "ours" else (True,):
                    self._show(f"{side.label}, a second turn")
                    result = worker.ask(
                        "turns", first=run.prompt[:n], more=more, tokens=run.tokens, keep=keep
                    )
                    name = side.label if keep else f"{side.label}, without a cache"
                    self._raw["turns"].setdefault(name, []).append(result)

    def _speculation(self, ours: Side) -> None:
        """Measures all draft depths and "auto" beside plain decoding, in turns."""
        run, worker = self._run, self._alive[ours]
        prompt = run.prompt[: run.middle]
        tokens = min(run.tokens if run.random else SPECULATED, run.room - run.middle)
        modes: list[str | int] = ["off", *DEPTHS, *([] if run.random else ["auto"])]
        results: dict[str, list[dict[str, Any]]] = {str(mode): [] for mode in modes}
        known = self._raw["speed"][ours.label]
        if predicted(known, run.middle, tokens) > run.limit:
            run.notes.append("speculation is left out: it takes longer than the limit")
            return
        if "auto" in modes:
            self._show("speculation, learning the depth")
            n = run.contexts[0]
            warm_up = min(WARM_UP, run.room - n)
            worker.ask("generate", prompt=run.prompt[:n], tokens=warm_up, mtp="auto")
        for repeat in range(run.repeats):
            for mode in modes:
                spent = [s["first"] + s["further"] * tokens for s in results[str(mode)]]
                if fits_another(spent, run.limit):
                    self._show(f"speculation, depth {mode}, repeat {repeat + 1} of {run.repeats}")
                    sample = worker.ask("generate", prompt=prompt, tokens=tokens, mtp=mode)
                    results[str(mode)].append(sample)
        for mode in modes[1:]:
            depth = mode if isinstance(mode, int) else max(DEPTHS)
            for sample, plain in zip(results[str(mode)], results["off"], strict=False):
                self._check_depth(worker, depth, prompt, plain, sample)
        self._raw["speculation"] = {"samples": results, "auto": worker.ask("chosen")}

    def _check_depth(
        self,
        worker: Worker,
        depth: int,
        prompt: list[int],
        plain: dict[str, Any],
        sample: dict[str, Any],
    ) -> None:
        if plain["tokens"] != sample["tokens"]:
            # Rounding differs between a forward of several rows and one of a single row.
            several, single = (self._logits_of(worker, prompt, n) for n in (depth + 1, 1))
            error = error_of(several, single)
            self._check_tokens(worker, f"depth {depth} and plain", prompt, plain, sample, error)

    def _growth(self, worker: Worker) -> None:
        """Measures time and memory while a long text is read."""
        run, rows = self._run, list[dict[str, float]]()
        seconds, held = 0.0, 0
        marks = [n for n in MARKS if n < run.growth] + [run.growth]
        for mark in marks:
            while held < mark:
                end = min(held + STEP, mark)
                self._show(f"growth, {held} of {run.growth} tokens")
                seconds += worker.ask("grow", tokens=run.prompt[held:end])
                held = end
            rows.append({"tokens": held, "seconds": seconds, **worker.ask("grown")})
        self._raw["growth"] = rows

    # --- agreement -------------------------------------------------------------------------------
    def _logits_of(self, worker: Worker, prompt: Sequence[int], tail: int) -> np.ndarray:
        file = str(self._scratch / "logits.npy")
        return np.load(worker.ask("logits", prompt=list(prompt), tail=tail, file=file))

    def _compare_logits(self) -> None:
        run = self._run
        for side, worker in list(self._alive.items()):
            self._show(f"{side.label}, comparing logits")
            try:
                self._logits[side] = self._logits_of(worker, run.prompt[: run.contexts[0]], 1)
            except WorkerError as failure:
                self._drop_side(side, failure)
        for side in run.sides:
            ours = partner(side, run.sides)
            if side.which == "ours" or not {side, ours} <= self._logits.keys():
                continue
            error = error_of(self._logits[ours], self._logits[side])
            exact = run.exact and side.dtype == ours.dtype == "float32"
            bound = EXACT if exact else ROUNDED
            check_logits(f"{ours.label}, and {side.label}", error, bound)
            self._raw["checks"][side.label] = {"error": error, "bound": bound, "tokens": []}

    def _compare_tokens(self) -> None:
        """Compares the greedy tokens at every context."""
        run = self._run
        for side in run.sides:
            if side.which == "ours":
                continue
            ours, check = partner(side, run.sides), self._raw["checks"][side.label]
            judge = self._alive.get(ours) or self._alive[run.sides[0]]
            for context, samples in self._raw["speed"][side.label].items():
                mine = self._raw["speed"][ours.label].get(context, [])
                for theirs, plain in zip(samples, mine, strict=False):
                    name = f"{ours.label}, and {side.label}, after {context} tokens"
                    prompt = run.prompt[:context]
                    n = self._check_tokens(judge, name, prompt, plain, theirs, check["error"])
                    check["tokens"].append([context, n, len(plain["tokens"])])

    def _check_tokens(
        self,
        judge: Worker,
        name: str,
        prompt: list[int],
        plain: dict[str, Any],
        other: dict[str, Any],
        error: float,
    ) -> int:
        """Counts the equal tokens, and checks that the first difference is at a tie."""
        a, b = plain["tokens"], other["tokens"]
        n = common_prefix(a, b)
        if n < len(a):
            logits = self._logits_of(judge, [*prompt, *a[:n]], 1)
            check_tie(name, n, logits, (a[n], b[n]), error)
        return n


# --- what would take too long --------------------------------------------------------------------
def predicted(before: Mapping[int, Samples], context: int, tokens: int) -> float:
    """Predicts the seconds of a measurement from the longest context measured so far that is not
    longer.

    Args:
        before: the samples so far, by context.
        context: the length of the prompt in tokens.
        tokens: the number of tokens decoded after it.

    Returns:
        The seconds; 0 if there is no such context.
    """
    known = [n for n, samples in before.items() if samples and n <= context]
    if not known:
        return 0.0
    n = max(known)
    last = before[n][-1]
    return last["first"] * context / n + last["further"] * tokens


def fits_another(spent: Sequence[float], limit: float) -> bool:
    """Whether one more repeat stays within the limit; the first one always does.

    Args:
        spent: the seconds of the repeats so far.
        limit: the seconds for all repeats together.
    """
    return not spent or sum(spent) + sum(spent) / len(spent) <= limit
