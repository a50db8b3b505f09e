"""Checkpoints of earlier texts, for prompts that begin alike.

The state of a linear layer cannot be trimmed, so a text can be continued only from a *checkpoint*:
the states at a position, with the keys and values of all tokens before it. For the 80B model a
checkpoint's states take 77 MB, keys and values 24.5 KB a token. Keys and values are therefore kept
once, however many checkpoints and texts share them, in a radix tree: a node is a piece of text, the
path from the root to it is the text before, and its checkpoint belongs to its end.

GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", 1997) decides what is
dropped first: the checkpoint that saves least work for its memory. Each drop moves a clock on from
which worth is counted, so that nothing stays for its worth long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..group import ALONE, Group
from ..model.cache import Cache
from .files import Folder, logger, read_file, write_file
from .pieces import Piece, assemble, size, take_apart
from .tree import Damaged, Node, common, tree

Tokens = Sequence[int] | np.ndarray | mx.array
T = TypeVar("T")

SPACING = 256  # tokens between checkpoints at the beginnings of turns, at least…
EVERY = 4096  # …and between any two of a prompt, at most
TURN = "<|im_start|>"  # what begins a turn in Qwen's templates…
THINK = "<think>"  # …and what a prompt may end with, but no turn that is over has…
OPENING = 12  # …within so many tokens


class PromptCache:
    """Checkpoints of texts, in memory and, if wanted, on disk as well. For one thread at a time.

    Args:
        max_bytes: the most it may hold, files that have not been read yet included; an attribute.
        max_sequences: how many texts that are no beginning of another; None for any number.
        tokenizer: knows how turns begin, for :meth:`places`.
        directory: keeps it on disk, in a subdirectory named ``fingerprint``. Files there are taken
            over; damaged and foreign ones are removed with a warning. The directory is locked as
            long as this object lives; if it cannot be locked, there is a warning, and everything is
            kept in memory alone.
        fingerprint: of the model and its options, see
            :func:`mlx_qwen3next.checkpoint.fingerprint.fingerprint`.
        group: of processes that each keep their part of the same texts; rank 0 decides what is
            dropped.

    Raises:
        ValueError: there is a directory, but the fingerprint is no plain name.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_sequences: int | None = None,
        tokenizer: Any = None,
        directory: Path | None = None,
        fingerprint: str = "",
        group: Group = ALONE,
    ):
        self.max_bytes, self._max_sequences = max_bytes, max_sequences
        self._turn, self._think = (
            None if tokenizer is None else tokenizer.convert_tokens_to_ids(mark)
            for mark in (TURN, THINK)
        )
        self._fingerprint, self._group = fingerprint, group
        self._folder: Folder | None = None
        self._root = Node(Piece(0, np.zeros(0, np.uint32), {}, {}, {}), None, saved=True)
        self._nbytes, self._clock = 0, 0.0
        # The nodes with a checkpoint, least recently used first, and the clock at that time.
        self._used: dict[Node, float] = {}
        if directory is not None:
            if not fingerprint.isalnum():
                raise ValueError(f"fingerprint must be letters and digits, got {fingerprint!r}")
            self._folder = Folder.take(directory / fingerprint, fingerprint)
        if self._folder is not None:
            self._restore(self._folder)
            self.trim(max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, whether they have been read from their files or not."""
        return self._nbytes

    def __len__(self) -> int:
        """The number of checkpoints."""
        return len(self._used)

    # --- looking up ------------------------------------------------------------------------------
    def fetch(self, tokens: Tokens) -> tuple[Cache | None, int]:
        """Finds the longest known beginning of a prompt that leaves at least one token to process.

        Args:
            tokens: ids ``[L]``.

        Returns:
            A cache as ``model.make_cache()`` makes it, plus the MTP head's entry if that is known,
            and how many tokens it holds; (None, 0) if no beginning is known. The cache is the
            caller's to change.
        """
        return self._undamaged(lambda: self._fetch(_ids(tokens)[:-1]))

    def _fetch(self, tokens: np.ndarray) -> tuple[Cache | None, int]:
        path = self._path(tokens)
        if not path:
            return None, 0
        last = path[-1]
        last.read(last.piece.checkpoint)
        for node in path:
            node.read(node.piece.kv, node.piece.head)
        self._touch(last)
        return assemble([node.piece for node in path]), last.piece.end

    def _path(self, tokens: np.ndarray) -> list[Node]:
        """The nodes, from the root's child on, to the longest beginning that has a checkpoint."""
        path, node = [], self._root
        while (end := node.piece.end) < tokens.size:
            child = node.children.get(int(tokens[end]))
            if child is None or common(child.piece.tokens, tokens[end:]) < child.piece.tokens.size:
                break
            path.append(node := child)
        while path and path[-1] not in self._used:
            path.pop()
        return path

    # --- keeping ---------------------------------------------------------------------------------
    def places(self, tokens: Tokens, held: int = 0) -> list[int]:
        """The positions of a prompt where checkpoints belong, for other prompts that begin alike.

        At the beginnings of turns, now and then where there are none, and at the end: before the
        last token, or before the reasoning that the prompt opens, which templates leave out once
        the turn is over. The further from the end, the further apart: a checkpoint is left out if
        to go on from the one before takes a quarter more, or few tokens. Their number thus grows
        with the logarithm of the prompt's length.

        Args:
            tokens: ids ``[L]``.
            held: how many of them are in a cache already; only places after them are given.
        """
        ids = _ids(tokens)
        turns = [] if self._turn is None else np.flatnonzero(ids == self._turn).tolist()
        end, opening = ids.size - 1, ids[-OPENING:].tolist()
        if self._think in opening:
            end -= len(opening) - 1 - opening.index(self._think)
        places = []
        for place in [*turns, end]:
            # A fifth of what comes after one checkpoint is a quarter of that after the next.
            while place - held > (step := max(EVERY, (end - held) // 5)):
                places.append(held := held + step)
            # Other chats begin with the same system prompt.
            apart = SPACING if place in turns[:2] else max(SPACING, (end - place) // 4)
            if place - held >= apart or (place == end and end > held):
                places.append(held := place)
        return places

    def insert(self, tokens: Tokens, cache: Cache) -> None:
        """Keeps a checkpoint, by copying what is not known of it yet.

        An MTP head that did not follow the text from its beginning is not kept. Plain keys and
        values take the place of quantized ones, which can be made of them.

        Args:
            tokens: ids ``[L]``.
            cache: as ``model.make_cache()`` made it, advanced by exactly these tokens, with the MTP
                head's entry or without. It is settled; nothing refers to it afterwards.

        Raises:
            ValueError: the cache is empty, or does not hold that many tokens.
        """
        ids = _ids(tokens)
        self._touch(self._undamaged(lambda: self._add(self._root, take_apart(ids, cache))))
        self.trim(self.max_bytes)

    def _add(self, node: Node, piece: Piece, saved: bool = False) -> Node:
        """Adds a piece and its checkpoint after ``node``; returns the node that ends with it."""
        while (end := node.piece.end) < piece.end:
            rest = piece.tokens[end - piece.start :]
            known = node.children.get(int(rest[0]))
            if known is None:
                new = piece.part(end, piece.end)
                new.own()
                node = Node(new, node, saved)
                if new.checkpoint:
                    self._used[node] = self._clock
                self._weigh(node)
            else:
                n = common(known.piece.tokens, rest)
                node = known if n == known.piece.tokens.size else self._split(known, n)
                self._merge(node, piece)
                saved = False
        return node

    def _split(self, node: Node, n: int) -> Node:
        """Gives the node's first ``n`` tokens a node of their own above it, which is returned."""
        node.read(node.piece.kv, node.piece.head)
        start, end = node.piece.start, node.piece.end
        first, node.piece = node.piece.part(start, start + n), node.piece.part(start + n, end)
        first.own()
        node.piece.own()
        above = Node(first, node.parent, saved=False)
        above.children[int(node.piece.tokens[0])] = node
        node.parent, node.saved = above, False
        self._weigh(above)
        self._weigh(node)
        return above

    def _merge(self, node: Node, piece: Piece) -> None:
        """Adds to a node the arrays that a piece of the same text has and it lacks."""
        known = node.piece
        head = piece.head and not known.head
        plain = known.quantization and not piece.quantization
        states = known.end == piece.end and not piece.checkpoint.keys() <= known.checkpoint.keys()
        if not (head or plain or states):
            return
        part = piece.part(known.start, known.end)
        if head:
            known.head = part.head
        if plain:
            known.kv, known.quantization = part.kv, None
        if states:
            known.checkpoint = part.checkpoint
            self._used.setdefault(node, self._clock)
        known.own()
        node.saved = False
        self._weigh(node)

    def _weigh(self, node: Node) -> None:
        """Updates the sizes of a node, which has changed."""
        before, node.nbytes = node.nbytes, node.piece.nbytes
        node.states = size(node.piece.checkpoint)
        self._nbytes += node.nbytes - before

    def _touch(self, node: Node) -> None:
        del self._used[node]
        self._used[node] = self._clock

    # --- dropping --------------------------------------------------------------------------------
    def trim(self, max_bytes: int) -> None:
        """Drops the least worthy checkpoints until no more than ``max_bytes`` are held."""
        while least := self._agreed(self._least(max_bytes)):
            self._clock = max(self._clock, self._best(least))
            self._discard(least)

    def _least(self, max_bytes: int) -> list[Node]:
        """The nodes to be dropped next; none if all may stay."""
        if self._used and self.nbytes > max_bytes:
            return [min(self._used, key=self._worth)]
        if self._max_sequences is not None:
            leaves = [node for node in self._used if not node.children]
            if len(leaves) > self._max_sequences:
                return min(map(self._stem, leaves), key=self._best)
        return []

    def _agreed(self, nodes: list[Node]) -> list[Node]:
        """The nodes that rank 0 names: a pipeline's ranks do not hold equally much of a text."""
        if self._group.size == 1:
            return nodes
        named = {node.name: node for node in tree(self._root)}
        names = self._group.decide("dropped", [node.name for node in nodes])
        return [named[name] for name in names]

    def clear(self) -> None:
        """Drops everything, the files included."""
        self._discard(reversed([*tree(self._root)]))

    def _worth(self, node: Node) -> float:
        """The tokens a byte that it saves, counted from the clock at its last use.

        A checkpoint that others follow counts its states alone: they need its keys and values.
        """
        above = node.parent
        while above is not self._root and above not in self._used:
            above = above.parent
        freed = node.states
        if not node.children:
            bare = takewhile(lambda n: n not in self._used, self._stem(node)[1:])
            freed = node.nbytes + sum(n.nbytes for n in bare)
        return self._used[node] + (node.piece.end - above.piece.end) / freed

    def _best(self, nodes: list[Node]) -> float:
        return max(self._worth(node) for node in nodes if node in self._used)

    def _stem(self, leaf: Node) -> list[Node]:
        """The nodes that lead to this leaf alone, the leaf first."""
        stem = [leaf]
        while (above := stem[-1].parent) is not self._root and len(above.children) == 1:
            stem.append(above)
        return stem

    def _discard(self, nodes: Iterable[Node]) -> None:
        """Drops the nodes' checkpoints, and the nodes that served no other."""
        for node in nodes:
            if self._used.pop(node, None) is not None:
                node.piece.checkpoint, node.saved = {}, False
                self._weigh(node)
            self._prune(node)

    def _prune(self, node: Node) -> None:
        """Removes the node, and those above it, if they serve no checkpoint; some may be gone."""
        while not node.children and node not in self._used and node is not self._root:
            if node.parent.children.pop(int(node.piece.tokens[0]), None) is not None:
                self._nbytes -= node.nbytes
                if self._folder is not None:
                    self._folder.remove(node.name)
            node = node.parent

    def _undamaged(self, action: Callable[[], T]) -> T:
        """Returns the result of an action that drops damaged nodes, with their children."""
        while True:
            try:
                return action()
            except Damaged as error:
                logger.warning("Part of the prompt cache is dropped: %s", error)
                self._discard(reversed([*tree(error.node)]))

    # --- on disk ---------------------------------------------------------------------------------
    def save_next(self) -> bool:
        """Writes one node that is not on disk yet; returns whether it did.

        If that fails there is one warning, and no other attempt for a minute.
        """
        return self._undamaged(self._save_next)

    def _save_next(self) -> bool:
        if self._folder is None:
            return False
        # Parents come first, so that every file can be reached.
        node = next((node for node in tree(self._root) if not node.saved), None)
        if node is None:
            return False
        node.read()
        node.saved = self._folder.write(node.name, node.parent.name, node.piece)
        return node.saved

    def save(self) -> None:
        """Writes everything that is not on disk yet, unless that fails."""
        while self.save_next():
            pass

    def _restore(self, folder: Folder) -> None:
        """Takes over the files on disk; a text's end without a checkpoint is removed."""
        found = folder.read()
        below: dict[str, list[str]] = {}
        for name, (parent_name, _) in found.items():
            below.setdefault(parent_name, []).append(name)
        parents = [self._root]
        while parents:
            parent = parents.pop()
            for name in below.pop(parent.name, []):
                _, piece = found.pop(name)
                try:
                    if parent.text(piece).hexdigest() != name:
                        raise ValueError("it has another file's name")
                    if int(piece.tokens[0]) in parent.children:  # it was stopped within a split
                        piece.read()
                    parents.append(self._add(parent, piece, saved=True))
                except ValueError as error:
                    folder.reject(name, str(error))
        for name in found:
            folder.reject(name, "what comes before it is missing")
        for node in [*tree(self._root)]:
            self._prune(node)

    def export(self, tokens: Tokens, file: Path) -> None:
        """Writes the checkpoints of a text's beginnings to one file; without any, it writes none.

        Args:
            tokens: ids ``[L]``.

        Raises:
            ValueError: the file cannot be written.
        """
        pieces = self._undamaged(lambda: self._read(_ids(tokens)))
        try:
            if pieces:
                write_file(file, pieces, self._fingerprint)
        except OSError as error:
            raise ValueError(f"{file} cannot be written: {error.strerror}") from None

    def _read(self, tokens: np.ndarray) -> list[Piece]:
        path = self._path(tokens)
        for node in path:
            node.read()
        return [node.piece for node in path]

    @classmethod
    def load(
        cls, file: Path, *, max_bytes: int, tokenizer: Any = None, fingerprint: str = ""
    ) -> PromptCache:
        """Reads a cache, for memory alone, from a file that :meth:`export` wrote.

        Args:
            max_bytes, tokenizer, fingerprint: as for a new one.

        Raises:
            ValueError: the file cannot be read, is damaged, or belongs to another model.
        """
        parent, pieces = read_file(file, fingerprint)
        if parent:
            raise ValueError(f"{file} is a part of a prompt cache: it begins within a text")
        cache = cls(max_bytes=max_bytes, tokenizer=tokenizer, fingerprint=fingerprint)
        node = cache._root
        for piece in pieces:
            piece.read()
            node = cache._add(node, piece)
        cache.trim(max_bytes)
        return cache


def _ids(tokens: Tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.uint32)
