"""Writes the figures as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...decoding.queueing import COMMAND_BUFFERS
from ...model.capacity import GB
from ..shapes import FULL
from ..tables import NONE, table
from ..traffic import Traffic
from .agreement import TIES
from .growth import in_words
from .measure import Run
from .sides import partner
from .summary import extrapolated, median_of

KINDS = ("linear", "attention")
SHOWN = 12  # kernels listed, at most


def lines(
    run: Run, medians: Mapping[str, Any], traffic: Mapping[str, Traffic], model: Mapping[str, Any]
) -> list[str]:
    """Writes the report without its heading.

    Args:
        run: the run, after the measurements.
        medians: the result of :func:`mlx_qwen3next.bench.comparison.summary.medians`.
        traffic: the bytes of a step, by the label of the side.
        model: ``shape`` of random weights, or None, and their ``layers``.
    """
    parts = [
        _sides(run) + _queueing(run),
        _agreement(run),
        _speed("prefill", run, medians, "prefill") + _reading(run, medians, traffic) + _chunks(run),
        _speed("decoding", run, medians, "decode") + _limit(run, medians),
        _turns(run, medians["turns"]),
        _speculation(run, medians, traffic),
        _extrapolation(run, model),
        _kernels(run),
        _growth(run),
        [f"Note: {note}." for note in run.notes],
    ]
    return [line for part in parts if part for line in ["", *part]]


def _sides(run: Run) -> list[str]:
    rows = [["", "import", "load", "weights", "peak", "operations queued a token"]]
    for side in run.sides:
        loads = run.raw["loads"][side.label]
        peaks = [s["peak"] for some in run.raw["speed"][side.label].values() for s in some]
        rows.append(
            [
                side.label,
                f"{median_of(loads, 'import'):.2f} s",
                f"{median_of(loads, 'load'):.2f} s",
                f"{loads[-1]['bytes'] / GB:.3f} GB",
                f"{max(peaks) / GB:.3f} GB",
                str(run.raw["steps"][side.label]["queued"]),
            ]
        )
    return table(rows)


def _queueing(run: Run) -> list[str]:
    """The settings of :mod:`mlx_qwen3next.decoding.queueing`; mlx-lm has those before "here"."""
    how = run.raw["loads"][run.sides[0].label][-1]["queueing"]
    parts = [f"{name}={how[name]}" for name in COMMAND_BUFFERS if how[name]]
    parts += [f"{how['wired'] / GB:.1f} GB wired"] if how["wired"] else []
    layers = "1 layer" if how["layers_at_once"] == 1 else f"{how['layers_at_once']} layers"
    here = f"here {layers} at a time"
    if how["cache"] is not None:
        here += f" and at most {how['cache'] / GB:.1f} GB of freed buffers"
    return [f"queueing: {', '.join([*parts, here])}"]


def _agreement(run: Run) -> list[str]:
    result = []
    for side in run.sides:
        if side.which == "ours":
            continue
        check = run.raw["checks"][side.label]
        equal = {context: (n, count) for context, n, count in check["tokens"]}
        parted = [str(n) for n, count in equal.values() if n < count]
        tokens = f"the same {sum(n for n, _ in equal.values())} greedy tokens"
        if parted:
            tokens = f"greedy tokens the same or, at ties, up to number {', '.join(parted)}"
        result.append(
            f"{side.label}: logits agree to {check['error']:.0e} (bound {check['bound']:.0e}), "
            f"{tokens}"
        )
    if "speculation" in run.raw:
        samples = run.raw["speculation"]["samples"]
        same = all(
            sample["tokens"] == plain["tokens"]
            for some in samples.values()
            for sample, plain in zip(some, samples["off"], strict=False)
        )
        result.append(f"here, every depth: {'' if same else 'but for ties '}the same tokens")
    ties = f"a tie: two logits no further apart than {TIES:g} times the typical difference"
    return ["Agreement, checked before any figure", *result, ties]


def _speed(title: str, run: Run, medians: Mapping[str, Any], what: str) -> list[str]:
    rates: Mapping[str, Mapping[int, float]] = medians[what]
    rows = [[f"{title}, tokens a second", *map(str, run.contexts)]]
    for side in run.sides:
        left_out = run.raw["left_out"].get(side.label, {})
        rows.append([side.label, *(_rate(rates[side.label], left_out, n) for n in run.contexts)])
    for side in run.sides:
        if side.which == "stock":
            ours, theirs = rates[partner(side, run.sides).label], rates[side.label]
            ratios = [_ratio(ours, theirs, n, "{:.2f}x") for n in run.contexts]
            rows.append([f"  beside {side.label}", *ratios])
    if what == "decode":
        for side in run.sides:
            mine, limits = rates[side.label], medians["limit"][side.label]
            shares = [_ratio(mine, limits, n, "{:.1%}") for n in run.contexts]
            rows.append([f"  of the limit: {side.label}", *shares])
    return table(rows)


def _chunks(run: Run) -> list[str]:
    """Writes how long a prompt's chunks took, and how much memory."""
    rows = [["  its longest chunk, and memory over weights", *map(str, run.contexts)]]
    for side in run.sides:
        samples = run.raw["speed"].get(side.label, {})
        if side.which == "ours" and samples:
            last = {n: some[-1] for n, some in samples.items() if some}
            chunks = {n: "{:.2f} s, {} tokens".format(*s["chunk"]) for n, s in last.items()}
            memory = {n: f"{s['over'] / GB:.3f} GB" for n, s in last.items()}
            formula = {n: f"{s['formula'] / GB:.3f} GB" for n, s in last.items()}
            parts = {"longest chunk": chunks, "peak": memory, "formula": formula}
            for name, cells in parts.items():
                found = [cells.get(n, NONE) for n in run.contexts]
                rows.append([f"  {name}: {side.label}", *found])
    return table(rows)


def _figure(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _ratio(a: Mapping[int, float], b: Mapping[int, float], context: int, form: str) -> str:
    return form.format(a[context] / b[context]) if a.keys() & b.keys() & {context} else NONE


def _rate(rates: Mapping[int, float], left_out: Mapping[int, float], context: int) -> str:
    if context in rates:
        return _figure(rates[context])
    return f"{NONE}, about {left_out[context]:.0f} s" if context in left_out else NONE


def _reading(run: Run, medians: Mapping[str, Any], traffic: Mapping[str, Traffic]) -> list[str]:
    """Writes a prompt token's time, and its work if the prompt is read at once."""
    label = run.sides[0].label
    rates, moved = medians["prefill"][label], traffic[label]
    times = [f"{1e3 / rates[n]:.2f}" if n in rates else NONE for n in run.contexts]
    return table(
        [
            [f"a prompt's token, {label}", *map(str, run.contexts)],
            ["  ms", *times],
            [
                "  MB moved, at least, without activations",
                *(f"{moved.prompt(n) / n / 1e6:.2f}" for n in run.contexts),
            ],
            [
                "  million multiply-adds, without the output",
                *(f"{moved.multiply_adds(n) / n / 1e6:.1f}" for n in run.contexts),
            ],
        ]
    )


def _limit(run: Run, medians: Mapping[str, Any]) -> list[str]:
    """Writes the limit of decoding."""
    ours = run.sides[0].label
    limits = ", ".join(_figure(rate) for rate in medians["limit"][ours].values())
    return [
        f"  the limit: {run.raw['bandwidth'] / GB:.1f} GB/s, at which MLX copies or reads, over "
        f"the bytes of a token; {ours}: {limits}"
    ]


def _turns(run: Run, turns: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [["ms to the first token", f"{run.middle} tokens", "a turn later"]]
    for name, seconds in turns.items():
        rows.append([name, *(f"{1e3 * seconds[what]:.0f}" for what in ("first", "second"))])
    return table(rows) if turns else []


def _speculation(run: Run, medians: Mapping[str, Any], traffic: Mapping[str, Traffic]) -> list[str]:
    if "speculation" not in medians:
        return []
    rows, ours = medians["speculation"], run.sides[0].label
    bandwidth, moved = run.raw["bandwidth"], traffic[ours]
    if run.random:
        lines = [["depth", "ms a round", "to break even"]]
        for mode, row in rows.items():
            needs = f"{row['needs']:.2f} tokens a round"
            lines.append([_mode(mode), f"{1e3 * row['round']:.2f}", needs])
        title = (
            f"speculation, {ours}, {run.middle} tokens: with random weights only the cost counts"
        )
        return [title, *table(lines)]
    lines = [["depth", "ms a token", "tokens a round", "beside plain", "of the limit"]]
    for mode, row in rows.items():
        share = NONE
        if mode != "auto":
            depth = 0 if mode == "off" else int(mode)
            share = f"{moved.round(run.middle, depth) / bandwidth / row['round']:.1%}"
        lines.append(
            [
                _mode(mode),
                f"{1e3 * row['token']:.2f}",
                f"{row['per_round']:.2f}",
                f"{row['speed']:.2f}x",
                share,
            ]
        )
    title = f"speculation with the MTP head, {ours}, after {run.middle} tokens"
    return [title, *table(lines), *_auto(rows["auto"], run.raw["speculation"]["auto"])]


def _mode(mode: str) -> str:
    return {"off": "0 (plain)"}.get(mode, mode)


def _auto(row: Mapping[str, Any], promises: Sequence[Sequence[float]]) -> list[str]:
    """Writes the depths that "auto" used, with the measurements behind them."""
    rounds = sum(row["drafted"].values())
    used = ", ".join(f"{d}: {n / rounds:.0%}" for d, n in sorted(row["drafted"].items()))
    known = ", ".join(
        f"{depth}: {1e3 * seconds:.2f} ms for {tokens:.2f} tokens"
        for depth, seconds, tokens, timed in promises
        if timed
    )
    lines = [f"auto used depth (of its rounds) {used}", f"it measured, a round of depth {known}"]
    if len([None for *_, timed in promises if timed]) == 1:
        lines.append("a round of one draft takes more than two plain steps: it drafts nothing")
    return lines


def _extrapolation(run: Run, model: Mapping[str, Any]) -> list[str]:
    """Writes the speed extrapolated to 48 layers, if fewer were measured."""
    layers = model.get("layers", FULL)
    if model["shape"] != "80b" or layers == FULL:
        return []
    rows = [[f"extrapolated to {FULL} layers, tokens a second", *map(str, run.contexts)]]
    for side in run.sides:
        fixed = run.raw["steps"][side.label]["fixed"]
        speed = run.raw["speed"][side.label]
        for what, name in (("first", "prefill"), ("further", "decoding")):
            cells = []
            for n in run.contexts:
                if n not in speed:
                    cells.append(NONE)
                    continue
                seconds = extrapolated(median_of(speed[n], what), fixed, layers)
                cells.append(_figure((n if what == "first" else 1) / seconds))
            rows.append([f"{name}, {side.label}", *cells])
    method = (
        f"  time of {layers} layers without the part outside them (embedding, norm, output and "
        f"choice, timed separately), times {FULL}/{layers}, plus that part"
    )
    return [*table(rows), method]


def _kernels(run: Run) -> list[str]:
    findings, ours = run.raw["findings"], run.sides[0]
    loaded = run.raw["loads"][ours.label][-1]
    if "cpu" in loaded["device"]:
        return [
            "no Metal GPU: MLX's own operations; "
            f"{loaded['transposed']} of {loaded['matrices']} matrices transposed at loading, "
            "which is faster on this CPU"
        ]
    if not findings:
        return ["no kernel of this package runs here: MLX's own operations"]
    used = sum(finding["used"] for finding in findings.values())
    # Unused kernels come first, because readers look for them.
    ordered = sorted(findings.items(), key=lambda item: item[1]["used"])[:SHOWN]
    rows = [["kernel and kind of call", "used", "measured"]]
    rows += [[kind, "yes" if f["used"] else "no", f["reason"]] for kind, f in ordered]
    return [f"kernels: {used} of {len(findings)} kinds of call use one", *table(rows)]


def _growth(run: Run) -> list[str]:
    rows = run.raw.get("growth")
    if not rows:
        return []
    cells = [["growth, tokens", "read in s", "step ms", *(f"{k} ms" for k in KINDS)]]
    cells[0] += ["cache MB", "formula"]
    for row in rows:
        cells.append(
            [
                f"{row['tokens']:.0f}",
                f"{row['seconds']:.2f}",
                *(f"{1e3 * row[kind]:.3f}" if kind in row else NONE for kind in ("step", *KINDS)),
                *(f"{row[what] / 1e6:.1f}" for what in ("cache", "formula")),
            ]
        )
    return [*table(cells), *in_words(rows)]
