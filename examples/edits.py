"""Counts the passes of the trunk that real edits take, by the source of the drafts.

    python examples/edits.py [--history REVISION] [--mtp-files N] [--without-packages]

An answer that repeats most of its prompt can be drafted by copying. The answers are forced: the
passes depend on the text and on the drafts alone, so that copying needs no model. The MTP head is
the demo model's, which would not have written these texts itself, so its share of right drafts is
lower than on its own; it runs on some files only.

"copy" is this package's copying drafter, which always drafts 15 tokens here. "copy, priced" drafts
as many as promise the most tokens for the bytes (below), by how often its copies were right. Two
more to compare with: "suffix 2-8" looks for the last place where the last 8 tokens stood before, or
the last 7, … or 2, and drafts what followed there. "best copy" knows the answer and takes the
longest run of its next tokens that stands anywhere in the text so far.

The last table computes the speed of Macs from the rounds' sizes, by the bytes alone: a round of
r rows reads all weights but the routed experts once, and E (1 - (1 - k/E)^r) experts of each layer
(k of E experts for each row, independent and equally likely; neighbouring tokens agree more often,
so the bytes are an upper estimate).
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import mlx.core as mx
from edit_corpus import TRANSCRIPTS, Edit, Turn, history, releases, transcript, whole_file
from mlx_lm.tokenizer_utils import TokenizerWrapper
from projection import BANDWIDTHS
from tqdm import tqdm

from mlx_qwen3next import load
from mlx_qwen3next.bench import shapes
from mlx_qwen3next.bench.traffic import traffic
from mlx_qwen3next.decoding.draft_depth import MOST_COPIED
from mlx_qwen3next.decoding.drafters.lookup import Copier, LookupDrafter, new_shares
from mlx_qwen3next.decoding.drafters.mtp import MTPDrafter
from mlx_qwen3next.model.config import Config
from mlx_qwen3next.model.qwen3_next import Model

FILES = 51
HEAD = 3  # drafts of the MTP head
SUFFIXES = range(8, 1, -1)  # lengths that "suffix 2-8" looks for
CONTEXT = 8192  # tokens of text that the projection assumes


class Source(Protocol):
    """Drafts of what follows a text."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The text grew."""

    def propose(self, most: int) -> list[int]:
        """At most so many drafts."""


@dataclasses.dataclass
class Rounds:
    """The rounds that an answer took: the drafts of each, and how many were right."""

    drafted: list[int] = dataclasses.field(default_factory=list)
    right: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens_a_pass(self) -> float:
        """Tokens that a pass of the trunk gave."""
        return 1 + sum(self.right) / len(self.right)

    @property
    def share_right(self) -> float:
        """The share of right drafts among all."""
        return sum(self.right) / max(sum(self.drafted), 1)

    @property
    def share_drafted(self) -> float:
        """The share of the tokens that were drafted."""
        return sum(self.right) / (sum(self.right) + len(self.right))


def play(make: Callable[[Sequence[int]], Source], turns: Iterable[Turn]) -> Rounds:
    """Decodes the answers of some turns with drafts.

    Args:
        make: makes a source from a turn's whole text; all but the bounds ignore what is to come.
    """
    rounds = Rounds()
    for turn in turns:
        source = make(turn.prompt + turn.answer)
        source.extend(turn.prompt)
        place = 0
        while place < len(turn.answer):
            drafts = source.propose(len(turn.answer) - place - 1)
            coming = turn.answer[place : place + len(drafts)]
            pairs = zip(drafts, coming, strict=True)
            right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(drafts))
            rounds.drafted.append(len(drafts))
            rounds.right.append(right)
            source.extend(turn.answer[place : place + right + 1])
            place += right + 1
    return rounds


# --- sources -------------------------------------------------------------------------------------
class SuffixCopy:
    """The baseline: the last place where the longest suffix of 2 to 8 tokens stood before."""

    def __init__(self, _: Sequence[int]):
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # run of tokens -> its last end before this one

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in SUFFIXES:  # the run that the text ended with has a token after it now
                if len(self._text) >= n:
                    self._ends[tuple(self._text[-n:])] = len(self._text)
            self._text.append(token)

    def propose(self, most: int) -> list[int]:
        found = (self._ends.get(tuple(self._text[-n:])) for n in SUFFIXES)
        end = next((end for end in found if end is not None), len(self._text))
        return self._text[end : end + min(most, MOST_COPIED)]


class Copy:
    """This package's copying drafter, to the full depth."""

    def __init__(self, _: Sequence[int]):
        self._copier = Copier()

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._copier.append(token)

    def propose(self, most: int) -> list[int]:
        return self._copier.expected(min(most, MOST_COPIED))


class PricedCopy:
    """The same, to the depth that promises the most tokens for the bytes.

    Args:
        drafter: knows how often copies were right in the texts before.
        cost: the bytes of a round of so many rows.
    """

    def __init__(self, drafter: LookupDrafter, cost: Callable[[int], float]):
        self._drafter, self._cost, self._text = drafter, cost, list[int]()

    def extend(self, tokens: Sequence[int]) -> None:
        if not self._text:
            self._drafter.follow(tokens)
        for token in tokens if self._text else ():
            self._drafter.extend(token)
        self._text += tokens

    def propose(self, most: int) -> list[int]:
        best, best_value, share, expected = 0, 1 / self._cost(1), 1.0, 1.0
        for depth, each in enumerate(self._drafter.offer().shares[:most], start=1):
            share *= each
            expected += share
            if expected / self._cost(1 + depth) > best_value:
                best, best_value = depth, expected / self._cost(1 + depth)
        drafts = self._drafter.propose(mx.array(self._text[-1:]), best, lambda logits, _: logits)
        return [int(draft.item()) for draft in drafts]


class BestCopy:
    """The bound: knows the text to come, and where its longest beginning stands already."""

    def __init__(self, whole: Sequence[int]):
        self._whole, self._length = list(whole), 0
        self._places: dict[int, list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._places.setdefault(token, []).append(self._length)
            self._length += 1

    def propose(self, most: int) -> list[int]:
        coming = self._whole[self._length : self._length + min(most, MOST_COPIED)]
        best = 0
        for place in self._places.get(coming[0], []) if coming else []:
            there = self._whole[place : min(place + len(coming), self._length)]
            pairs = enumerate(zip(there, coming, strict=False))
            best = max(best, next((i for i, (a, b) in pairs if a != b), len(there)))
            if best == len(coming):
                break
        return coming[:best]


class Head:
    """The MTP head of a model."""

    def __init__(self, model: Model, whole: Sequence[int]):
        self._drafter = MTPDrafter(model)
        self._hidden = model.model(mx.array([whole], mx.uint32), model.make_cache())
        mx.eval(self._hidden)
        self._text: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        known = max(len(self._text) - 1, 0)  # the trunk has not read the last token
        self._text += tokens
        fed = mx.array(self._text[known:-1], mx.uint32)
        if fed.size:
            self._drafter.committed(fed, self._hidden[:, known : known + fed.size])

    def propose(self, most: int) -> list[int]:
        last = mx.array(self._text[-1:], mx.uint32)
        if most < 1:
            return []
        drafts = self._drafter.propose(
            last, min(most, HEAD), lambda logits, _: logits.argmax(-1).astype(mx.uint32)
        )
        values: list[int] = mx.concatenate(drafts).tolist()  # type: ignore[assignment]
        return values


class Chain:
    """The first of some sources that has drafts."""

    def __init__(self, *sources: Source):
        self._sources = sources

    def extend(self, tokens: Sequence[int]) -> None:
        for source in self._sources:
            source.extend(tokens)

    def propose(self, most: int) -> list[int]:
        return next(filter(None, (source.propose(most) for source in self._sources)), [])


# --- tables --------------------------------------------------------------------------------------
def row(name: str, rounds: Sequence[Rounds]) -> str:
    """A line of the table: medians over the texts, and the range of tokens a pass."""
    passes = [r.tokens_a_pass for r in rounds]
    together = Rounds([d for r in rounds for d in r.drafted], [n for r in rounds for n in r.right])
    return (
        f"| {name} | {statistics.median(passes):.1f} | {min(passes):.1f} to {max(passes):.1f} "
        f"| {together.share_right:.0%} | {together.share_drafted:.0%} |"
    )


def table(
    title: str,
    texts: Sequence[list[Turn]],
    model: Model,
    mtp_files: int,
    cost: Callable[[int], float],
) -> list[Rounds]:
    """Prints a table of one kind of texts; returns the rounds of the priced copies."""
    print(f"\n| {title}: {len(texts)} | tokens a pass, median | range | right | drafted |")
    print("| --- | --- | --- | --- | --- |")
    shares = new_shares()
    bar = tqdm(texts, title, leave=False, disable=None)
    priced = [play(lambda _: PricedCopy(LookupDrafter(shares), cost), turns) for turns in bar]
    print(row("copy", [play(Copy, turns) for turns in texts]))
    print(row("copy, priced", priced))
    print(row("suffix 2-8", [play(SuffixCopy, turns) for turns in texts]))
    print(row("best copy (knows the answer)", [play(BestCopy, turns) for turns in texts]))
    short = sorted(texts, key=lambda turns: sum(len(t.prompt + t.answer) for t in turns))
    short = short[:mtp_files]
    if short:
        bar = tqdm(short, f"{title}, MTP head", leave=False, disable=None)
        print(f"| *the {len(short)} shortest:* | | | | |")
        print(row("copy", [play(Copy, turns) for turns in short]))
        alone, chain = [], []
        for turns in bar:
            alone.append(play(lambda whole: Head(model, whole), turns))
            chain.append(play(lambda whole: Chain(Copy(whole), Head(model, whole)), turns))
        print(row(f"MTP, {HEAD} drafts", alone))
        print(row("copy, else MTP", chain))
    return priced


class Machine:
    """The bytes that rounds of the 80B model at 4 bits move, computed from its shapes.

    Attributes:
        fixed: bytes of a round besides the routed experts.
        expert: bytes of one expert in every layer.
    """

    def __init__(self) -> None:
        self._config = config = Config.from_dict(shapes.config("80b", shapes.FULL))
        headers = shapes.headers("80b", shapes.FULL)
        whole = traffic(headers, config, itemsize=2)
        without = traffic(headers, dataclasses.replace(config, num_experts_per_tok=0), itemsize=2)
        self.fixed = without.plain(CONTEXT)
        self.expert = (whole.trunk - without.trunk) / config.num_experts_per_tok

    def size(self, rows: int) -> float:
        """The bytes of a round of so many rows."""
        E, k = self._config.num_experts, self._config.num_experts_per_tok
        return self.fixed + E * (1 - (1 - k / E) ** rows) * self.expert


def project(machine: Machine, rounds: Sequence[Rounds]) -> None:
    """Prints the computed tokens a second of Macs, plain and with these rounds."""
    drafted = [d for r in rounds for d in r.drafted]
    tokens = len(drafted) + sum(n for r in rounds for n in r.right)
    moved = sum(machine.size(1 + d) for d in drafted) / tokens
    sizes = {rows: machine.size(rows) / 1e9 for rows in (1, 2, 4, 8, 16)}
    print(f"\nComputed, not measured, 4 bits, after {CONTEXT} tokens: a round reads", end=" ")
    print(
        f"{machine.fixed / 1e9:.2f} GB and its distinct experts, {machine.expert / 1e6:.1f}",
        end=" ",
    )
    print("MB each in all layers. GB by rows:", end=" ")
    print(", ".join(f"{rows}: {size:.2f}" for rows, size in sizes.items()), end=". ")
    print(f"{moved / 1e9:.2f} GB a token of all rounds above with priced copies.")
    print("\n| machine | GB/s | plain: tokens a second, bandwidth alone | priced copies |")
    print("| --- | --- | --- | --- |")
    for name, rate in BANDWIDTHS.items():
        plain, faster = (rate * 1e9 / x for x in (machine.size(1), moved))
        print(f"| {name} | {rate} | {plain:.0f} | {faster:.0f} |")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--history", default="HEAD", metavar="REVISION", help="where it ends")
    parser.add_argument("--mtp-files", type=int, default=3, metavar="N", help="for the MTP head")
    parser.add_argument("--without-packages", action="store_true", help="fetch nothing")
    args = parser.parse_args()

    model, tokenizer = load(dtype=mx.float32)
    own = history(args.history, FILES)
    others = [] if args.without_packages else releases()
    machine, rounds = Machine(), list[Rounds]()
    for title, edits in (("this history", own), ("releases of packages", others)):
        if edits:
            rounds += table(
                title, whole_files(edits, tokenizer), model, args.mtp_files, machine.size
            )
    agents = [transcript(edit, tokenizer) for edit in several_hunks(own + others)]
    rounds += table("agents' transcripts", agents, model, min(args.mtp_files, 2), machine.size)
    project(machine, rounds)


def whole_files(edits: Iterable[Edit], tokenizer: TokenizerWrapper) -> list[list[Turn]]:
    """The texts of edits that are answered with the whole file."""
    return [whole_file(edit, tokenizer) for edit in edits]


def several_hunks(edits: Sequence[Edit]) -> list[Edit]:
    """Some edits of middle size, evenly over the list."""
    middle = [e for e in edits if 4000 < len(e.old) < 12_000 and e.name.endswith(".py")]
    step = max(len(middle) // TRANSCRIPTS, 1)
    return middle[::step][:TRANSCRIPTS]


if __name__ == "__main__":
    main()
