"""A load test of the server with many clients: it finds wrong tokens, leaks and stuck requests.

    python examples/server_load.py [--minutes 10] [--clients 32] [--faults]
    python examples/server_load.py --longest 32768 --total 200 --requests 40 --clients 4

First the program sends each request of a pool alone, to a server without prompt cache and drafts.
Then many clients send these requests at random; a client disconnects in the middle of a fifth of
them. The program compares every complete answer. With ``--longest`` the requests have prompts of up
to so many tokens, and half of those who disconnect do so while their prompt is read. With
``--faults``, forwards fail now and then, the disk of the prompt cache is sometimes full, files of
the cache are damaged, and the server is killed and started again. Linux only (the program reads
memory from /proc).
"""

import argparse
import collections
import inspect
import json
import random
import signal
import statistics
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

from served import OURS, Answer, Served, float32_copy

LEAVE = 0.2  # the share of requests whose client disconnects in the middle
LEFT = "left"
CHARACTERS = 3  # of a token, about
KEPT = "200MB"  # of the prompt cache
KEPT_OF_LONG = "40MB"  # full after the first long prompts, so that memory must stay flat from there

# A server in which some forwards and some writes of the prompt cache fail.
FAULTY = """
import errno, random, sys
from mlx_qwen3next.model.qwen3_next import Trunk
from mlx_qwen3next.prompt_cache import files
from mlx_qwen3next.server.__main__ import main
forward, write = Trunk.__call__, files.write_file
def failing(self, *args):
    if random.random() < 1 / 1000:
        raise RuntimeError("injected: the forward failed")
    return forward(self, *args)
def full(*args, **options):
    if random.random() < 0.05:
        raise OSError(errno.ENOSPC, "injected: no space left on device")
    write(*args, **options)
Trunk.__call__, files.write_file = failing, full
sys.exit(main(sys.argv[1:]))
"""


def pool(size: int) -> list[dict]:
    """Requests of many lengths. Many begin alike; most are greedy, and some have a seed."""
    rng = random.Random(1)
    source = inspect.getsource(textwrap) + inspect.getsource(statistics)
    systems = [None, *(source[: 4 ** rng.randint(2, 6)] for _ in range(5))]
    requests = []
    for i in range(size):
        system = rng.choice(systems)
        messages = [] if system is None else [{"role": "system", "content": system}]
        for _ in range(rng.choice([1, 1, 2, 3])):
            start = rng.randrange(len(source) - 2000)
            content = source[start : start + 2 ** rng.randint(4, 9)]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": "?"},
            ]
        options = {"max_tokens": rng.choice([1, 5, 20, 60, 120])}
        if i % 4 == 0:
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": i}
        if i % 5 == 0:
            options |= {"stop": ["\n\n", "def "]}
        requests.append({"messages": messages[:-1], **options})
    return requests


def long_pool(size: int, longest: int) -> list[dict]:
    """Requests whose prompts have up to so many tokens, short ones as often as long ones."""
    rng = random.Random(2)
    source = (inspect.getsource(textwrap) + inspect.getsource(statistics)) * 8
    requests = []
    for i in range(size):
        tokens = longest ** rng.uniform(0.5, 1)
        start = rng.randrange(4) * 5000  # some begin alike
        content = source[start : start + int(CHARACTERS * tokens)] + f"# {i}"
        messages = [{"role": "user", "content": content}]
        requests.append({"messages": messages, "max_tokens": rng.choice([1, 10, 40])})
    return requests


class Load:
    """The clients, and the outcomes of their requests."""

    def __init__(self, served: Served, requests: list[dict], right: list[Answer]):
        self._served, self._requests, self._right = served, requests, right
        self.leaves_prompts = False
        self.over = threading.Event()
        self.down = threading.Event()  # the server is stopped on purpose
        self.seen: collections.Counter = collections.Counter()
        self.wrong: list[tuple[int, str, str]] = []
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        """Sends one request after the other until the test is over."""
        rng = random.Random(number)
        while not self.over.is_set():
            i = rng.randrange(len(self._requests))
            leave = rng.randrange(20) if rng.random() < LEAVE else None
            hurries = self.leaves_prompts and leave is not None and rng.random() < 0.5
            seen = self._ask(i, leave, rng.uniform(0.1, 0.9) if hurries else 600)
            with self._lock:
                self.seen[seen] += 1
            if seen == "no connection":
                time.sleep(0.5)

    def _ask(self, i: int, leave: int | None, patience: float) -> str:
        restarting = self.down.is_set()
        try:
            answer = self._served.ask(leave_after=leave, patience=patience, **self._requests[i])
        except TimeoutError:
            return LEFT if patience < 1 else "no answer"
        except OSError as error:
            gone = restarting or self.down.is_set()
            return "no connection" if gone else f"connection: {type(error).__name__}"
        if answer.status != 200:
            return f"status {answer.status}: {answer.text[:90]}"
        if leave is not None and answer.finish_reason is None:
            return LEFT
        if answer.finish_reason is None:
            return "cut off" if self.down.is_set() or restarting else "cut off without reason"
        right = self._right[i]
        if (answer.text, answer.finish_reason) != (right.text, right.finish_reason):
            with self._lock:
                self.wrong.append((i, right.text, answer.text))
            return "WRONG"
        return "right"


def reads_longer(model: Path, tokens: int) -> None:
    """Lets a model read texts of so many tokens, whether or not it learned to understand them."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": tokens}))


def damage(directory: Path, rng: random.Random) -> None:
    """Damages one file of the prompt cache."""
    files = sorted(directory.rglob("*.safetensors"))
    if files:
        file = rng.choice(files)
        try:
            data = bytearray(file.read_bytes())
            for _ in range(20):
                data[rng.randrange(len(data))] ^= 0xFF
            file.write_bytes(data[: rng.choice([len(data), len(data) // 2])])
        except OSError:  # evicted in the meantime
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=60, help="requests in the pool")
    parser.add_argument("--longest", type=int, help="tokens of the longest prompt")
    parser.add_argument("--total", type=int, default=10**9, help="requests, after which it ends")
    parser.add_argument("--mtp", default="2")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--log", type=Path, help="file for the server's output")
    args = parser.parse_args()
    long = args.longest is not None
    requests = long_pool(args.requests, args.longest) if long else pool(args.requests)
    kept_bytes = KEPT_OF_LONG if long else KEPT
    with tempfile.TemporaryDirectory() as scratch:
        kept, model = Path(scratch) / "kept", Path(scratch) / "model"
        model.mkdir()
        float32_copy(model)
        if long:
            reads_longer(model, 2 * args.longest)
        with Served(OURS, "--model", model, "--prompt-cache-bytes", 1, "--mtp", "off") as alone:
            right = [alone.ask(**request) for request in requests]
        ends = collections.Counter(a.finish_reason for a in right)
        longest = max(answer.usage.get("prompt_tokens", 0) for answer in right)
        print(f"{len(right)} requests alone: {dict(ends)}, {longest} tokens at most", flush=True)
        command = [sys.executable, "-c", FAULTY] if args.faults else OURS
        options = ["--model", model, "--mtp", args.mtp, "--prompt-cache-dir", kept]
        options += ["--prompt-cache-bytes", kept_bytes]
        with Served(command, *options, log=args.log) as served:
            load = Load(served, requests, right)
            load.leaves_prompts = long
            threads = [threading.Thread(target=load.client, args=(i,)) for i in range(args.clients)]
            for thread in threads:
                thread.start()
            process, arrays = list[float](), list[float]()
            start, rng = time.monotonic(), random.Random(0)
            next_fault = 120.0
            while (seconds := time.monotonic() - start) < 60 * args.minutes:
                if sum(load.seen.values()) >= args.total:
                    break
                time.sleep(10)
                process.append(served.memory() / 1e6)
                arrays.append(served.metric("memory_active_bytes") / 1e6)
                print(f"{seconds:5.0f} s {process[-1]:6.0f} MB, of arrays", end=" ")
                print(f"{arrays[-1]:.0f}", dict(load.seen), flush=True)
                if args.faults and seconds > next_fault:
                    damage(kept, rng)
                    load.down.set()
                    served.stop(signal.SIGKILL)
                    damage(kept, rng)
                    served.start()
                    load.down.clear()
                    next_fault = time.monotonic() - start + 120
            load.over.set()
            for thread in threads:
                thread.join(120)
            stuck = sum(thread.is_alive() for thread in threads)
            healthy = served.healthy()
            last = served.ask(**requests[-1])
            status = served.stop()
        print("\noutcomes:", dict(load.seen))
        print(
            f"threads of clients that never ended: {stuck}; healthy at the end: {healthy}; ", end=""
        )
        print(f"one more answer right: {last.text == right[-1].text}; exit status {status}")
        for name, sizes in (("the process", process), ("its arrays", arrays)):
            parts = [sizes[i * len(sizes) // 4 : (i + 1) * len(sizes) // 4] for i in range(4)]
            quarters = ", ".join(f"{statistics.median(part):.0f}" for part in parts if part)
            print(f"{name}, MB: {quarters} by quarters (medians), {max(sizes):.0f} at most")
        for i, expected, got in load.wrong[:5]:
            print(f"request {i}: expected {expected!r}, got {got!r}")
    return bool(load.wrong or stuck or not healthy)


if __name__ == "__main__":
    sys.exit(main())
