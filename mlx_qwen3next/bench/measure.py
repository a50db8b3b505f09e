"""The measurements, in turns; everything raw goes into one dict, as the JSON file has it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .agreement import EXACT, ROUNDED, check_logits, check_tie, common, error_of
from .growth import MARKS, STEP
from .limits import another, predicted
from .sides import Side, Worker, WorkerError, partner, rank

DEPTHS = (1, 2, 3, 4)
SPECULATED, WARM_UP = 128, 256  # tokens of a measurement; before those of "auto"
MORE = 64  # tokens that a second turn adds
LARGE = 4e9  # bytes of a model that is loaded once only


@dataclass
class Plan:
    """What to measure, and what is measured of it.

    Args:
        directory: of the model, as both sides read it.
        sides: the first is ours, what all that is ours alone is measured with.
        prompt: token ids, as many as the longest context or the growth needs.
        contexts: prompt tokens, ascending.
        together: whether all models fit the memory at once.
        exact: whether the files have nothing that mlx-lm rounds, so that float32 sides agree.
        random: whether the weights are, so that acceptance tells nothing.
        model_bytes: of the files.
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
    room: int = 0  # tokens that the model's context takes
    divided: dict[str, Any] = field(default_factory=dict)  # among ranks, how
    raw: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def middle(self) -> int:
        """The context of what is measured at one alone: the second, if a second turn fits."""
        fitting = [n for n in self.contexts[:2] if self.takes_another_turn(n)]
        return fitting[-1] if fitting else self.contexts[0]

    def takes_another_turn(self, n: int) -> bool:
        """Whether the model's context takes, after so many tokens, another turn's as well."""
        return n + self.tokens + MORE < self.room


def measure(plan: Plan) -> dict[str, Any]:
    """Measures all of it; returns ``plan.raw``.

    Raises:
        Disagreement: the sides do not compute the same.
        WorkerError: a side failed.
    """
    plan.raw |= {"loads": {}, "speed": {}, "left_out": {}, "turns": {}, "steps": {}, "checks": {}}
    # Ours come last where they come one after the other: it is they who judge differences.
    groups = [list(plan.sides)] if plan.together else [[side] for side in reversed(plan.sides)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(unit="", disable=None, leave=False, bar_format="{desc} [{elapsed}]") as bar,
    ):
        session = _Session(plan, Path(scratch), bar)
        for group in groups:
            with session.workers(group):
                session.measure(group)
    return plan.raw


class _Session:
    """The workers that live now, and what they are asked."""

    def __init__(self, plan: Plan, scratch: Path, bar: Any):
        self._plan, self._scratch, self._bar = plan, scratch, bar
        self._raw, self._alive = plan.raw, dict[Side, Worker]()
        self._logits: dict[Side, np.ndarray] = {}

    # --- workers ---------------------------------------------------------------------------------
    @contextmanager
    def workers(self, group: Sequence[Side]) -> Iterator[None]:
        """Loads in turns, in fresh processes; the last ones stay."""
        plan = self._plan
        repeats = plan.repeats if plan.model_bytes <= LARGE and rank() is None else 1
        with ExitStack() as stack:
            for repeat in range(repeats):
                for side in group:
                    if side not in plan.sides:
                        continue
                    self._say(f"loading, {side.label}")
                    try:
                        worker = Worker(side, plan.directory, plan.divided)
                    except WorkerError as error:
                        self._without(side, error)
                        continue
                    self._raw["loads"].setdefault(side.label, []).append(worker.loaded)
                    if repeat < repeats - 1:
                        worker.close()
                    else:
                        stack.callback(worker.close)
                        self._alive[side] = worker
            yield
        self._alive.clear()

    def _without(self, side: Side, error: WorkerError) -> None:
        """Goes on without a side of mlx-lm."""
        if side.which == "ours":
            raise error
        self._plan.notes.append(f"stock mlx-lm cannot run this model; left out: {error}")
        self._plan.sides.remove(side)
        if side in self._alive:
            self._alive.pop(side).close()

    def _say(self, what: str) -> None:
        self._bar.set_description_str(what)

    # --- what is measured ------------------------------------------------------------------------
    def measure(self, group: Sequence[Side]) -> None:
        """All that is measured of these sides."""
        plan = self._plan
        self._compare_logits()
        for context in plan.contexts:
            self._speed(context)
        for side, worker in self._alive.items():
            parts = {"queued": worker.ask("queued"), "fixed": worker.ask("fixed")}
            self._raw["steps"][side.label] = parts
        self._turns()
        ours = plan.sides[0]
        if ours not in self._alive:
            return
        self._compare_tokens()
        self._raw["bandwidth"] = self._alive[ours].ask("bandwidth")
        self._raw["findings"] = self._alive[ours].ask("findings")
        if plan.speculates:
            self._speculation(ours)
        if plan.growth:
            self._growth(self._alive[ours])

    def _speed(self, context: int) -> None:
        """Prompt and decoding at one context, in turns."""
        plan, tokens = self._plan, self._plan.tokens
        for turn in range(plan.repeats):
            for side, worker in self._alive.items():
                samples = self._raw["speed"].setdefault(side.label, {})
                expected = predicted(samples, context, tokens)
                here = samples.get(context, [])
                spent = [s["first"] + s["further"] * tokens for s in here]
                if turn == 0 and expected > plan.limit:
                    self._raw["left_out"].setdefault(side.label, {})[context] = expected
                    continue
                if (turn > 0 and not here) or not another(spent, plan.limit):
                    continue
                self._say(f"{side.label}, {context} tokens, turn {turn + 1} of {plan.repeats}")
                sample = worker.ask("generate", prompt=plan.prompt[:context], tokens=tokens)
                samples.setdefault(context, []).append(sample)

    def _turns(self) -> None:
        """Time to the first token of a second turn."""
        plan, n = self._plan, self._plan.middle
        more = plan.prompt[:MORE]
        if not plan.takes_another_turn(n):
            plan.notes.append("a second turn is left out: the model's context does not take it")
            return
        for _ in range(plan.repeats):
            for side, worker in self._alive.items():
                done = self._raw["turns"].get(side.label, [])
                spent = [result["first"] + result["second"] for result in done]
                if n not in self._raw["speed"][side.label] or not another(spent, plan.limit):
                    continue
                for keep in (True, False) if side.which == "ours" else (True,):
                    self._say(f"{side.label}, a second turn")
                    result = worker.ask(
                        "turns", first=plan.prompt[:n], more=more, tokens=plan.tokens, keep=keep
                    )
                    name = side.label if keep else f"{side.label}, without a cache"
                    self._raw["turns"].setdefault(name, []).append(result)

    def _speculation(self, ours: Side) -> None:
        """All depths and "auto" beside plain decoding, in turns."""
        plan, worker = self._plan, self._alive[ours]
        prompt = plan.prompt[: plan.middle]
        tokens = min(plan.tokens if plan.random else SPECULATED, plan.room - plan.middle)
        modes: list[str | int] = ["off", *DEPTHS, *([] if plan.random else ["auto"])]
        results: dict[str, list[dict[str, Any]]] = {str(mode): [] for mode in modes}
        known = self._raw["speed"][ours.label]
        if predicted(known, plan.middle, tokens) > plan.limit:
            plan.notes.append("speculation is left out: it takes longer than the limit")
            return
        if "auto" in modes:
            self._say("speculation, learning the depth")
            n = plan.contexts[0]
            warm_up = min(WARM_UP, plan.room - n)
            worker.ask("generate", prompt=plan.prompt[:n], tokens=warm_up, mtp="auto")
        for turn in range(plan.repeats):
            for mode in modes:
                spent = [s["first"] + s["further"] * tokens for s in results[str(mode)]]
                if another(spent, plan.limit):
                    self._say(f"speculation, depth {mode}, turn {turn + 1} of {plan.repeats}")
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
            # What rounding does to logits where several rows go together.
            error = error_of(self._asked(worker, prompt, depth + 1), self._asked(worker, prompt, 1))
            self._check_tokens(worker, f"depth {depth} and plain", prompt, plain, sample, error)

    def _growth(self, worker: Worker) -> None:
        """The cost of a long text, as it grows."""
        plan, rows = self._plan, list[dict[str, float]]()
        seconds, held = 0.0, 0
        marks = [n for n in MARKS if n < plan.growth] + [plan.growth]
        for mark in marks:
            while held < mark:
                end = min(held + STEP, mark)
                self._say(f"growth, {held} of {plan.growth} tokens")
                seconds += worker.ask("grow", tokens=plan.prompt[held:end])
                held = end
            rows.append({"tokens": held, "seconds": seconds, **worker.ask("grown")})
        self._raw["growth"] = rows

    # --- what has to agree -----------------------------------------------------------------------
    def _asked(self, worker: Worker, prompt: Sequence[int], tail: int) -> np.ndarray:
        file = str(self._scratch / "logits.npy")
        return np.load(worker.ask("logits", prompt=list(prompt), tail=tail, file=file))

    def _compare_logits(self) -> None:
        plan = self._plan
        for side, worker in list(self._alive.items()):
            self._say(f"{side.label}, comparing logits")
            try:
                self._logits[side] = self._asked(worker, plan.prompt[: plan.contexts[0]], 1)
            except WorkerError as failure:
                self._without(side, failure)
        for side in plan.sides:
            ours = partner(side, plan.sides)
            if side.which == "ours" or not {side, ours} <= self._logits.keys():
                continue
            error = error_of(self._logits[ours], self._logits[side])
            exact = plan.exact and side.dtype == ours.dtype == "float32"
            bound = EXACT if exact else ROUNDED
            check_logits(f"{ours.label}, and {side.label}", error, bound)
            self._raw["checks"][side.label] = {"error": error, "bound": bound, "tokens": []}

    def _compare_tokens(self) -> None:
        """Greedy tokens, at every context."""
        plan = self._plan
        for side in plan.sides:
            if side.which == "ours":
                continue
            ours, check = partner(side, plan.sides), self._raw["checks"][side.label]
            judge = self._alive.get(ours) or self._alive[plan.sides[0]]
            for context, samples in self._raw["speed"][side.label].items():
                mine = self._raw["speed"][ours.label].get(context, [])
                for theirs, plain in zip(samples, mine, strict=False):
                    name = f"{ours.label}, and {side.label}, after {context} tokens"
                    prompt = plan.prompt[:context]
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
        """How many tokens are equal, after checking the first that is not."""
        a, b = plain["tokens"], other["tokens"]
        n = common(a, b)
        if n < len(a):
            logits = self._asked(judge, [*prompt, *a[:n]], 1)
            check_tie(name, n, logits, (a[n], b[n]), error)
        return n
