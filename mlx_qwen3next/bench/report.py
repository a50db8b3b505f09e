"""The figures as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..model.capacity import GB
from .agreement import TIES
from .growth import in_words
from .measure import Plan
from .shapes import FULL
from .sides import partner
from .summary import deepened, of
from .traffic import Traffic

NONE = "-"
KINDS = ("linear", "attention")
SHOWN = 12  # kernels that are listed at most


def lines(
    plan: Plan, medians: Mapping[str, Any], traffic: Mapping[str, Traffic], model: Mapping[str, Any]
) -> list[str]:
    """The whole report but its heading.

    Args:
        model: ``shape`` (of random weights, or None) and their ``layers``.
    """
    parts = [
        _sides(plan),
        _agreement(plan),
        _speed("prefill", plan, medians, "prefill"),
        _speed("decoding", plan, medians, "decode") + _limit(plan, medians),
        _turns(plan, medians["turns"]),
        _speculation(plan, medians, traffic),
        _extrapolation(plan, model),
        _kernels(plan),
        _growth(plan),
        [f"Note: {note}." for note in plan.notes],
    ]
    return [line for part in parts if part for line in ["", *part]]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines; the first column is text, the others are figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return lines


def _sides(plan: Plan) -> list[str]:
    rows = [["", "import", "load", "weights", "peak", "operations queued a token"]]
    for side in plan.sides:
        loads = plan.raw["loads"][side.label]
        peaks = [s["peak"] for some in plan.raw["speed"][side.label].values() for s in some]
        rows.append(
            [
                side.label,
                f"{of(loads, 'import'):.2f} s",
                f"{of(loads, 'load'):.2f} s",
                f"{loads[-1]['bytes'] / GB:.3f} GB",
                f"{max(peaks) / GB:.3f} GB",
                str(plan.raw["steps"][side.label]["queued"]),
            ]
        )
    return table(rows)


def _agreement(plan: Plan) -> list[str]:
    result = []
    for side in plan.sides:
        if side.which == "ours":
            continue
        check = plan.raw["checks"][side.label]
        equal = {context: (n, count) for context, n, count in check["tokens"]}
        parted = [str(n) for n, count in equal.values() if n < count]
        tokens = f"the same {sum(n for n, _ in equal.values())} greedy tokens"
        if parted:
            tokens = f"greedy tokens the same or, at ties, up to number {', '.join(parted)}"
        result.append(
            f"{side.label}: logits agree to {check['error']:.0e} (bound {check['bound']:.0e}), "
            f"{tokens}"
        )
    if "speculation" in plan.raw:
        samples = plan.raw["speculation"]["samples"]
        same = all(
            sample["tokens"] == plain["tokens"]
            for some in samples.values()
            for sample, plain in zip(some, samples["off"], strict=False)
        )
        result.append(f"here, every depth: {'' if same else 'but for ties '}the same tokens")
    ties = f"a tie: tokens whose logits are within {TIES:g} times what logits differ by anyway"
    return ["Agreement, checked before any figure", *result, ties]


def _speed(title: str, plan: Plan, medians: Mapping[str, Any], what: str) -> list[str]:
    rates: Mapping[str, Mapping[int, float]] = medians[what]
    rows = [[f"{title}, tokens a second", *map(str, plan.contexts)]]
    for side in plan.sides:
        left_out = plan.raw["left_out"].get(side.label, {})
        rows.append([side.label, *(_rate(rates[side.label], left_out, n) for n in plan.contexts)])
    for side in plan.sides:
        if side.which == "stock":
            ours, theirs = rates[partner(side, plan.sides).label], rates[side.label]
            ratios = [_ratio(ours, theirs, n, "{:.2f}x") for n in plan.contexts]
            rows.append([f"  beside {side.label}", *ratios])
    if what == "decode":
        for side in plan.sides:
            mine, limits = rates[side.label], medians["limit"][side.label]
            shares = [_ratio(mine, limits, n, "{:.1%}") for n in plan.contexts]
            rows.append([f"  of the limit: {side.label}", *shares])
    return table(rows)


def _figure(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _ratio(a: Mapping[int, float], b: Mapping[int, float], context: int, form: str) -> str:
    return form.format(a[context] / b[context]) if a.keys() & b.keys() & {context} else NONE


def _rate(rates: Mapping[int, float], left_out: Mapping[int, float], context: int) -> str:
    if context in rates:
        return _figure(rates[context])
    return f"{NONE}, about {left_out[context]:.0f} s" if context in left_out else NONE


def _limit(plan: Plan, medians: Mapping[str, Any]) -> list[str]:
    """What the limit is."""
    ours = plan.sides[0].label
    limits = ", ".join(_figure(rate) for rate in medians["limit"][ours].values())
    return [
        f"  the limit: {plan.raw['bandwidth'] / GB:.1f} GB/s, which MLX copies or reads at, "
        f"over the bytes of a token; {ours}: {limits}"
    ]


def _turns(plan: Plan, turns: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [["ms to the first token", f"{plan.middle} tokens", "a turn later"]]
    for name, seconds in turns.items():
        rows.append([name, *(f"{1e3 * seconds[what]:.0f}" for what in ("first", "second"))])
    return table(rows) if turns else []


def _speculation(
    plan: Plan, medians: Mapping[str, Any], traffic: Mapping[str, Traffic]
) -> list[str]:
    if "speculation" not in medians:
        return []
    rows, ours = medians["speculation"], plan.sides[0].label
    bandwidth, moved = plan.raw["bandwidth"], traffic[ours]
    if plan.random:
        lines = [["depth", "ms a round", "to break even"]]
        for mode, row in rows.items():
            needs = f"{row['needs']:.2f} tokens a round"
            lines.append([_mode(mode), f"{1e3 * row['round']:.2f}", needs])
        title = (
            f"speculation, {ours}, {plan.middle} tokens: of random weights the cost alone counts"
        )
        return [title, *table(lines)]
    lines = [["depth", "ms a token", "tokens a round", "beside plain", "of the limit"]]
    for mode, row in rows.items():
        share = NONE
        if mode != "auto":
            depth = 0 if mode == "off" else int(mode)
            share = f"{moved.round(plan.middle, depth) / bandwidth / row['round']:.1%}"
        lines.append(
            [
                _mode(mode),
                f"{1e3 * row['token']:.2f}",
                f"{row['per_round']:.2f}",
                f"{row['speed']:.2f}x",
                share,
            ]
        )
    title = f"speculation with the MTP head, {ours}, after {plan.middle} tokens"
    return [title, *table(lines), *_auto(rows["auto"], plan.raw["speculation"]["auto"])]


def _mode(mode: str) -> str:
    return {"off": "0 (plain)"}.get(mode, mode)


def _auto(row: Mapping[str, Any], promises: Sequence[Sequence[float]]) -> list[str]:
    """Which depths "auto" used, and why."""
    rounds = sum(row["drafted"].values())
    used = ", ".join(f"{d}: {n / rounds:.0%}" for d, n in sorted(row["drafted"].items()))
    known = ", ".join(
        f"{depth}: {1e3 * seconds:.2f} ms for {tokens:.2f} tokens"
        for depth, (seconds, tokens, timed) in enumerate(promises)
        if timed
    )
    lines = [f"auto used depth (of its rounds) {used}", f"it measured, a round of depth {known}"]
    if len([None for promise in promises if promise[2]]) == 1:
        lines.append("a round of one draft takes more than two plain steps: it drafts nothing")
    return lines


def _extrapolation(plan: Plan, model: Mapping[str, Any]) -> list[str]:
    """What 48 layers would do, from fewer."""
    layers = model.get("layers", FULL)
    if model["shape"] != "80b" or layers == FULL:
        return []
    rows = [[f"extrapolated to {FULL} layers, tokens a second", *map(str, plan.contexts)]]
    for side in plan.sides:
        fixed = plan.raw["steps"][side.label]["fixed"]
        speed = plan.raw["speed"][side.label]
        for what, name in (("first", "prefill"), ("further", "decoding")):
            cells = []
            for n in plan.contexts:
                if n not in speed:
                    cells.append(NONE)
                    continue
                seconds = deepened(of(speed[n], what), fixed, layers)
                cells.append(_figure((n if what == "first" else 1) / seconds))
            rows.append([f"{name}, {side.label}", *cells])
    method = (
        f"  time of {layers} layers, less what is outside them (embedding, norm, output, choice, "
        f"timed by itself), times {FULL}/{layers}, plus the latter"
    )
    return [*table(rows), method]


def _kernels(plan: Plan) -> list[str]:
    findings, ours = plan.raw["findings"], plan.sides[0]
    loaded = plan.raw["loads"][ours.label][-1]
    if "cpu" in loaded["device"]:
        return [
            "no Metal GPU: MLX's own operations; "
            f"{loaded['turned']} of {loaded['matrices']} matrices turned around at loading, where "
            "that is faster on this CPU"
        ]
    if not findings:
        return ["no kernel of this package runs here: MLX's own operations"]
    used = sum(finding["used"] for finding in findings.values())
    # Those that are not used are what a reader looks for.
    ordered = sorted(findings.items(), key=lambda item: item[1]["used"])[:SHOWN]
    rows = [["kernel and kind of call", "used", "measured"]]
    rows += [[kind, "yes" if f["used"] else "no", f["reason"]] for kind, f in ordered]
    return [f"kernels: {used} of {len(findings)} kinds of call use one", *table(rows)]


def _growth(plan: Plan) -> list[str]:
    rows = plan.raw.get("growth")
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
