"""Computes the speed that Apple machines might reach with the 80B model at 4 bits.

    python examples/projection.py [--context N]

Nothing here is measured. A decoded token takes bytes / bandwidth + launches x overhead. The bytes
are counted from the model's shapes (mlx_qwen3next/bench/traffic.py), and the launches in the graph
(examples/launches.py). The bandwidths are Apple's figures. The overhead of a launch is the time
that published speeds leave after the bytes: mlx-lm, 1,923 launches, at 99.2 tokens a second on an
M5 Max and 67.7 on an M3 Ultra; AX Engine, 960 launches and 1.96 GB, at 117.7 on an M5 Max. The
smallest and the largest overhead give the range.
"""

import argparse

from mlx_qwen3next.bench import shapes
from mlx_qwen3next.bench.traffic import traffic
from mlx_qwen3next.model.config import Config

BANDWIDTHS = {  # GB/s
    "M1 Ultra": 800,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3 Ultra": 819,
    "M4 Max": 546,
    "M5 Max": 614,
}
OURS, STOCK = 40, 160  # launches of a period, as examples/launches.py counts them
OUTSIDE = 3  # embedding, last norm, output
# (launches, GB a token, GB/s, tokens a second) as published
PUBLISHED = [(1923, 2.18, 614, 99.2), (1923, 2.18, 819, 67.7), (960, 1.96, 614, 117.7)]


def overheads() -> tuple[float, float]:
    """The smallest and the largest seconds a launch, from the published speeds."""
    left = [(1 / speed - size / rate) / launches for launches, size, rate, speed in PUBLISHED]
    return min(left), max(left)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of context")
    context = parser.parse_args().context

    config = Config.from_dict(shapes.config("80b", shapes.FULL))
    moved = traffic(shapes.headers("80b", shapes.FULL), config, itemsize=2)
    size = moved.plain(context)
    least, most = overheads()
    print(f"{size / 1e9:.2f} GB a token after {context} tokens; {least * 1e6:.1f} to", end=" ")
    print(f"{most * 1e6:.1f} µs a launch. Computed, not measured: tokens a second\n")
    print(f"{'':10} {'GB/s':>5} {'bandwidth alone':>16} {'mlx-lm launches':>17} {'here':>12}")
    for machine, rate in BANDWIDTHS.items():
        seconds = size / rate / 1e9
        cells = []
        for launches in (STOCK, OURS):
            queued = shapes.FULL // shapes.PERIOD * launches + OUTSIDE
            slow, fast = (1 / (seconds + queued * overhead) for overhead in (most, least))
            cells.append(f"{slow:.0f} to {fast:.0f}")
        print(f"{machine:10} {rate:5} {1 / seconds:16.0f} {cells[0]:>17} {cells[1]:>12}")


if __name__ == "__main__":
    main()
