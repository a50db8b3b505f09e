"""Measures speculation: tokens a round, passes of the trunk, time beside plain decoding.

    python examples/speculation.py [--model DIR] [--prompts N] [--dense] [--layers N] [--check]

The program continues held-out library files (``mlx_qwen3next/bundled/heldout.txt``) and answers
questions about the names that they define. It decodes greedily, with drafts of the MTP head at
fixed depths, with copies of earlier text alone ("copies") and with whatever pays by measurement
("auto"). It decodes every prompt in all ways in turns; the ratio of the speeds
is the median over the prompts.

``--dense`` computes with float32 weights, not with quantized ones. ``--layers`` makes the trunk
larger: the demo model's MTP head is a fifth of the whole, the 80B model's head a fiftieth. This
option repeats the trunk's layers with outputs of zero, which changes no token. ``--check`` measures
no time; it compares tokens and accepted drafts at every depth with a simulation by plain steps.
"""

import argparse
import ast
import copy
import itertools
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from heldout import files
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model
from tqdm import tqdm

from mlx_qwen3next import generate_step, load
from mlx_qwen3next.decoding.draft_depth import MAX_DEPTH
from mlx_qwen3next.decoding.speculative import Acceptance, Token
from mlx_qwen3next.model.qwen3_next import Model

TOKENS = 256
Way = str | int  # a key of the next
WAYS: dict[Way, dict[str, Any]] = {
    "off": {"mtp": "off"},
    **{depth: {"mtp": depth} for depth in (1, 2, 3, 4)},
    "copies": {"mtp": "off", "lookup": "auto"},
    "auto": {},
}
QUESTIONS = ["What does {} do?", "How do I use {}?", "What is the signature of {}?", "Explain {}."]


def code_prompts(tokenizer: TokenizerWrapper) -> list[list[int]]:
    """The first 64, 192 and 448 tokens of each file, if it has at least 64 tokens more."""
    prompts = []
    for file in files():
        tokens = tokenizer.encode("<|endoftext|>" + file.read_text(encoding="utf-8")[:8000])
        prompts += [tokens[:n] for n in (64, 192, 448) if n + 64 < len(tokens)]
    return prompts


def names(file: Path) -> list[str]:
    """The first three public names that a file defines."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    defined = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return [f"{file.stem}.{name}" for name in defined if not name.startswith("_")][:3]


def chat_prompts(tokenizer: TokenizerWrapper) -> list[list[int]]:
    """The prompts of a question about each name."""
    asked = [name for file in files() for name in names(file)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)].format(name)}],
            add_generation_prompt=True,
        )
        for i, name in enumerate(asked)
    ]


def deepen(model: Model, layers: int) -> None:
    """Repeats the trunk's layers up to the given number; the added layers add zeros."""
    own = model.model.layers
    for layer in range(len(own), layers):
        own.append(copy.deepcopy(own[layer % 4]))
        for path, module in own[layer].named_modules():
            if path.split(".")[-1] in ("out_proj", "o_proj", "down_proj"):
                module.update({name: mx.zeros_like(x) for name, x in module.items()})


def decode(model: Model, prompt: list[int], way: Way) -> tuple[list[int], float, Acceptance]:
    """The tokens, the seconds a token after the first one, and the acceptance of the drafts."""
    tokens, counted, start = [], Acceptance(), 0.0
    for step in generate_step(prompt, model, max_tokens=TOKENS, **WAYS[way]):
        start = start or time.perf_counter()
        tokens.append(step.token)
        counted.add(step)
    return tokens, (time.perf_counter() - start) / (TOKENS - 1), counted


def simulated(model: Model, prompt: list[int], n: int) -> tuple[list[int], dict[int, list[int]]]:
    """The prompt with its greedy continuation and, for each of n positions, drafts after it.

    The tokens come from plain steps. The drafts, at most MAX_DEPTH a position, come from recursion
    on copies of the head's cache.
    """
    cache, head = model.make_cache(), model.mtp.make_cache()
    tokens, drafts, hidden = list(prompt), {}, None
    for at in range(n):
        drafts[at] = []
        if hidden is not None:
            m = model.mtp(hidden, mx.array([[tokens[at]]]), head)
            provisional = [copy.copy(head[0])]
            # Drafts inside the prompt are not needed.
            while at >= len(prompt) - 1 and len(drafts[at]) < MAX_DEPTH:
                drafts[at].append(model.logits(m).argmax().item())
                m = model.mtp(m, mx.array([[drafts[at][-1]]]), provisional)
        hidden = model.model(mx.array([[tokens[at]]]), cache)
        if at == len(tokens) - 1:
            tokens.append(model.logits(hidden).argmax().item())
    return tokens, drafts


def simulated_rounds(
    tokens: list[int], drafts: dict[int, list[int]], start: int, count: int, depth: int
) -> list[tuple[int, int]]:
    """The rounds (drafted, accepted) that give ``count`` tokens after the first ``start``."""
    result, at, room = [], start - 1, count
    while room:
        guesses = drafts[at][: min(depth, room - 1)]
        pairs = zip(guesses, tokens[at + 1 :], strict=False)
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        result.append((len(guesses), right))
        at, room = at + right + 1, room - right - 1
    return result


def rounds(steps: Iterable[Token]) -> list[tuple[int, int]]:
    """The rounds (drafted, accepted) that gave the tokens."""
    result, right = [], 0
    for step in steps:
        right += step.from_draft
        if not step.from_draft:
            result.append((step.drafted, right))
            right = 0
    return result


def check(model: Model, prompts: list[list[int]]) -> None:
    """Checks that tokens and accepted drafts at every depth equal those of the simulation.

    Raises:
        AssertionError: they differ.
    """
    compared = 0
    for prompt in tqdm(prompts, "checked", unit="prompt"):
        tokens, drafts = simulated(model, prompt, len(prompt) + TOKENS)
        for depth in range(1, MAX_DEPTH + 1):
            steps = list(generate_step(prompt, model, max_tokens=TOKENS, mtp=depth))
            if [step.token for step in steps] != tokens[len(prompt) :][:TOKENS]:
                raise AssertionError(f"depth {depth} changes tokens after {prompt}")
            counts = rounds(steps)
            if counts != simulated_rounds(tokens, drafts, len(prompt), TOKENS, depth):
                raise AssertionError(f"depth {depth} accepts other drafts after {prompt}")
            compared += len(counts)
    print(f"{len(prompts)} prompts, depths 1 to {MAX_DEPTH}: {compared} rounds as simulated")


def measure(model: Model, prompts: list[list[int]], name: str) -> None:
    """Prints a table with one line for each depth."""
    seconds = {mode: [] for mode in WAYS}
    counts = {mode: [] for mode in WAYS}
    for prompt in tqdm(prompts, name, unit="prompt", leave=False):
        for mode in WAYS:
            _, s, counted = decode(model, prompt, mode)
            seconds[mode].append(s)
            counts[mode].append(counted)
    print(f"\n{len(prompts)} {name} prompts, {TOKENS} tokens each")
    print("drafts  tokens a round  passes a token  ms a token  speed  accepted by depth")
    for mode in WAYS:
        length = statistics.mean(c.mean_length for c in counts[mode])
        passes = sum(c.rounds for c in counts[mode]) / TOKENS / len(prompts)
        ms = 1e3 * statistics.median(seconds[mode])
        ratios = [a / b for a, b in zip(seconds["off"], seconds[mode], strict=True)]
        shares = [c.by_depth for c in counts[mode] if c.by_depth]
        depths = range(min(4, max(map(len, shares), default=0)))
        accepted = " ".join(
            f"{statistics.mean(s[d] for s in shares if d < len(s)):.2f}" for d in depths
        )
        print(
            f"{mode!s:6}  {length:14.2f}  {passes:14.3f}  {ms:10.2f}"
            f"  {statistics.median(ratios):5.2f}  {accepted}"
        )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another model directory (default: the bundled one)")
    parser.add_argument("--prompts", type=int, help="prompts of each kind at most")
    parser.add_argument("--dense", action="store_true", help="compute with float32 weights")
    parser.add_argument("--layers", type=int, default=0, help="of the trunk (default: its own)")
    parser.add_argument("--check", action="store_true", help="compare with a simulation")
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype=mx.float32)
    if args.dense:
        dequantize_model(model).set_dtype(mx.float32)
    deepen(model, args.layers)
    mx.eval(model.parameters())
    kinds = {"code": code_prompts(tokenizer), "chat": chat_prompts(tokenizer)}
    for name, prompts in kinds.items():
        some = prompts[:: max(1, len(prompts) // (args.prompts or len(prompts)))][: args.prompts]
        if args.check:
            check(model, some)
        else:
            measure(model, some, name)


if __name__ == "__main__":
    main()
