"""The counts and times of the server, in the text form that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate

import mlx.core as mx

from ...model.streamed.experts import StreamedExperts

PREFIX = "qwen3next"
TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Name -> help and the names of its labels.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests that have ended; status 499: the client had gone", ("path", "status")),
    "prompt_tokens": ("Tokens of prompts, cached ones included", ()),
    "prompt_tokens_cached": ("Tokens of prompts that were in the prompt cache", ()),
    "generation_tokens": ("Tokens of answers", ()),
    "prompt_cache_lookups": ("Prompts looked up in the prompt cache", ()),
    "prompt_cache_hits": ("Prompts whose beginning was in the prompt cache", ()),
    "draft_rounds": (
        "Rounds that began with drafts; accept length: 1 + accepted / rounds",
        ("source",),
    ),
    "draft_tokens": ("Drafts", ("source",)),
    "draft_tokens_accepted": ("Right drafts", ("source",)),
    "experts_hits": ("Wanted experts that were in memory, where some are on disk", ()),
    "experts_misses": ("Wanted experts that were read from disk", ()),
    "experts_foreseen": ("Those of them whose reading began a layer before", ()),
    "experts_bytes": ("Bytes of experts that were read from disk", ()),
    "experts_waited": ("Seconds in which experts from disk were waited for", ()),
}
# Name -> help and the upper bounds of its buckets.
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": (
        "Seconds from a request's arrival to its first token, the wait in the queue included",
        (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
    ),
    "tokens_per_second": (
        "Tokens a second of an answer, after its first token",
        (2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300),
    ),
}
GAUGES = {
    "requests_running": "Requests that are being answered",
    "requests_waiting": "Requests that wait for a place",
    "prompt_cache_bytes": "Bytes of the prompt cache",
    "prompt_cache_checkpoints": "Checkpoints in the prompt cache",
    "memory_active_bytes": "Bytes of the arrays that MLX holds, the model's included",
    "memory_cache_bytes": "Bytes of freed arrays that MLX keeps for the next ones",
    "memory_peak_bytes": "Most bytes of arrays so far",
}

_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counts events; any thread may tell of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[_Labels, float]] = {
            name: defaultdict(int) for name in COUNTERS
        }
        self._times = {name: [0] * (len(bounds) + 1) for name, (_, bounds) in HISTOGRAMS.items()}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def add(self, name: str, count: float = 1, **labels: str) -> None:
        """Adds to a counter, which never falls."""
        with self._lock:
            self._counts[name][tuple(labels.items())] += count

    def add_experts(self, streamed: StreamedExperts | None) -> None:
        """Adds what is new to the counters of experts read from disk, if there are such."""
        for name, count in (streamed.news()._asdict() if streamed else {}).items():
            self.add(f"experts_{name}", count)

    def observe(self, name: str, value: float) -> None:
        """Takes a value into a histogram."""
        with self._lock:
            self._times[name][bisect_left(HISTOGRAMS[name][1], value)] += 1
            self._sums[name] += value

    def text(self, gauges: Mapping[str, float]) -> str:
        """All metrics as Prometheus reads them.

        Args:
            gauges: the values of this moment; those of MLX's memory are added.
        """
        memory = {
            "memory_active_bytes": mx.get_active_memory(),
            "memory_cache_bytes": mx.get_cache_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
        }
        with self._lock:
            lines = [*self._counters(), *self._histograms()]
        for name, value in {**gauges, **memory}.items():
            lines += _family(name, "gauge", GAUGES[name])
            lines.append(f"{PREFIX}_{name} {value:.16g}")
        return "".join(f"{line}\n" for line in lines)

    def _counters(self) -> Iterator[str]:
        for name, (told, labels) in COUNTERS.items():
            yield from _family(f"{name}_total", "counter", told)
            counts = self._counts[name] if labels else {(): self._counts[name][()]}
            for pairs, count in counts.items():
                yield f"{PREFIX}_{name}_total{_labels(pairs)} {count}"

    def _histograms(self) -> Iterator[str]:
        for name, (told, bounds) in HISTOGRAMS.items():
            yield from _family(name, "histogram", told)
            sums = [*accumulate(self._times[name])]
            for bound, count in zip((*bounds, "+Inf"), sums, strict=True):
                yield f"{PREFIX}_{name}_bucket{_labels((('le', str(bound)),))} {count}"
            yield f"{PREFIX}_{name}_sum {self._sums[name]:.16g}"
            yield f"{PREFIX}_{name}_count {sums[-1]}"


def _family(name: str, kind: str, told: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {told}", f"# TYPE {PREFIX}_{name} {kind}"]


def _labels(pairs: _Labels) -> str:
    """Labels in braces; their values are the server's own words, which need no escapes."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in pairs) + "}" if pairs else ""
