"""Measures how long a live stream stands still while a long prompt is read beside it.

    python examples/fairness.py [--tokens N]

One client streams an answer; another one sends a long prompt. Printed are the longest time between
two pieces of the stream, and the time until the prompt is answered, beside the stream and alone.
Each is measured with ``--max-stall`` at its default and without a bound, on the demo model.
"""

from __future__ import annotations

import argparse
import threading
import time

from served import OURS, Served, _events

ENDLESS = {"logit_bias": {"2": -100, "0": -100}, "max_tokens": 2000, "temperature": 1, "seed": 3}


def answer(served: Served, prompt: list[int]) -> float:
    """The seconds until a prompt of tokens is answered by two tokens."""
    start = time.perf_counter()
    with served.request("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 2}) as response:
        assert response.status == 200, response.read()
        response.read()
    return time.perf_counter() - start


def measure(tokens: int, max_stall: float) -> tuple[float, float, float]:
    """The stream's longest gap, and the prompt's seconds beside it and alone."""
    options = ("--max-stall", max_stall, "--prompt-cache-bytes", "1GB", "--mtp", "off")
    with Served(OURS, *options) as served:
        alone = answer(served, [7 + i * i % 3000 for i in range(tokens)])
        messages = [{"role": "user", "content": "Tell me about lists."}]
        body = {"messages": messages, "stream": True} | ENDLESS
        beside: list[float] = []
        other = [9 + i * i % 2999 for i in range(tokens)]
        thread = threading.Thread(target=lambda: beside.append(answer(served, other)))
        gaps, pieces = [], 0
        with served.request("POST", "/v1/chat/completions", body) as response:
            last = time.perf_counter()
            for _ in _events(response):
                now = time.perf_counter()
                pieces += 1
                if pieces == 20:
                    thread.start()
                elif pieces > 20:
                    gaps.append(now - last)
                last = now
                if beside:
                    break
        thread.join()
        return max(gaps), beside[0], alone


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=6000, metavar="N", help="of the prompt")
    tokens = parser.parse_args().tokens
    print(f"{tokens} tokens; seconds: longest gap of the stream, prompt beside it, prompt alone")
    for max_stall in (0.5, 1000.0):
        gap, beside, alone = measure(tokens, max_stall)
        print(f"--max-stall {max_stall:<6g} {gap:10.2f} {beside:10.2f} {alone:10.2f}")


if __name__ == "__main__":
    main()
