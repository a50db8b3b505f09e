"""What the model made of earlier prompts, for those that begin alike.

Linear layers keep a state that cannot be trimmed, so a text can be gone on with only where a
*checkpoint* was kept: the states at a position, beside the keys and values of all before it. Of
the 80B model a checkpoint's states are 77 MB, keys and values 24.5 KB a token; the latter must
therefore be kept once, however many checkpoints and texts share them. Hence a radix tree: a node
is a piece of text, its path from the root all that comes before, its checkpoint that at its end.

What is dropped first follows GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching
Algorithms", 1997): the checkpoint that saves least work for its memory, counted from a clock that
what is dropped moves on, so that nothing stays for what it was once worth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .cache import Cache
from .prompt_files import Folder, logger, read_file, write_file
from .prompt_pieces import Arrays, Piece, assemble, read, size, take_apart

Tokens = Sequence[int] | np.ndarray | mx.array
T = TypeVar("T")

SPACING = 256  # tokens between checkpoints at the beginnings of turns, at least…
EVERY = 4096  # …and between any two of a prompt, at most
TURN = "<|im_start|>"  # what begins a turn in Qwen's templates…
THINK = "<think>"  # …and what a prompt may end with, but no turn that is over has…
OPENING = 12  # …within so many tokens


class _Node:
    """A piece of text in the tree; it replaces the parent's child that begins alike."""

    def __init__(self, piece: Piece, parent: _Node | None, saved: bool):
        self.piece = piece
        self.parent = parent or self  # the root is its own
        self.children: dict[int, _Node] = {}  # by their first token
        self.saved = saved  # whether its file says what it holds
        self._text = parent.text(piece) if parent else hashlib.blake2b(digest_size=16)
        if parent:
            parent.children[int(piece.tokens[0])] = self

    @property
    def name(self) -> str:
        """Its file's: a hash of all tokens up to its end."""
        return self._text.hexdigest()

    def text(self, piece: Piece) -> hashlib.blake2b:
        """The hash of all tokens up to the end of a piece that comes next."""
        text = self._text.copy()
        text.update(piece.tokens.tobytes())
        return text

    def read(self, *parts: Arrays) -> None:
        """Reads these parts of the piece, by default all, if they are still in the node's file.

        Raises:
            _Damaged: they cannot be read.
        """
        try:
            for arrays in parts or self.piece.parts.values():
                read(arrays)
        except ValueError as error:
            raise _Damaged(self, str(error)) from None


class _Damaged(ValueError):
    """A node's file does not say what the node held."""

    def __init__(self, node: _Node, reason: str):
        super().__init__(reason)
        self.node = node


class PromptCache:
    """Checkpoints of texts, in memory and, if wanted, on disk as well. For one thread at a time.

    Args:
        max_bytes: what it may hold, files included that have not been read yet; an attribute.
        max_sequences: how many texts that are no beginning of another; None for any number.
        tokenizer: what knows how turns begin, for :meth:`places`.
        directory: where to keep it, in a subdirectory that is called ``fingerprint``. What is there
            is taken over; what is damaged or does not belong there is removed with a warning. For
            one process at a time.
        fingerprint: of the model and its options, see
            :func:`mlx_qwen3next.prompt_files.fingerprint`.

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
    ):
        self.max_bytes, self._max_sequences = max_bytes, max_sequences
        self._turn, self._think = (
            None if tokenizer is None else tokenizer.convert_tokens_to_ids(mark)
            for mark in (TURN, THINK)
        )
        self._fingerprint = fingerprint
        self._folder: Folder | None = None
        self._root = _Node(Piece(0, np.zeros(0, np.uint32), {}, {}, {}), None, saved=True)
        self._clock = 0.0
        # The nodes with a checkpoint, least recently used first, and the clock at that time.
        self._used: dict[_Node, float] = {}
        if directory is not None:
            if not fingerprint.isalnum():
                raise ValueError(f"fingerprint must be letters and digits, got {fingerprint!r}")
            self._folder = Folder(directory / fingerprint, fingerprint)
            self._restore(self._folder)
            self.trim(max_bytes)

    @property
    def nbytes(self) -> int:
        """Size of what is held, in bytes, whether it has been read from its files or not."""
        return sum(node.piece.nbytes for node in _tree(self._root))

    def __len__(self) -> int:
        """How many checkpoints there are."""
        return len(self._used)

    # --- looking up ------------------------------------------------------------------------------
    def fetch(self, tokens: Tokens) -> tuple[Cache | None, int]:
        """The longest known beginning of a prompt that leaves at least one token to process.

        Args:
            tokens: ids ``[L]``.

        Returns:
            A cache as ``model.make_cache()`` makes it, plus the MTP head's entry if that is known,
            and how many tokens it holds; (None, 0) if no beginning is known. It is the caller's:
            whatever becomes of it, nothing changes here.
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

    def _path(self, tokens: np.ndarray) -> list[_Node]:
        """The nodes, from the root's child on, to the longest beginning that has a checkpoint."""
        path, node = [], self._root
        while (end := node.piece.end) < tokens.size:
            child = node.children.get(int(tokens[end]))
            if child is None or _common(child.piece.tokens, tokens[end:]) < child.piece.tokens.size:
                break
            path.append(node := child)
        while path and path[-1] not in self._used:
            path.pop()
        return path

    # --- keeping ---------------------------------------------------------------------------------
    def places(self, tokens: Tokens, held: int = 0) -> list[int]:
        """Where checkpoints of a prompt belong, for others that begin alike.

        At the beginnings of turns, unless they are close together; now and then where there are
        none; and at the end, before the last token, or before the reasoning that the prompt opens:
        templates leave it out once the turn is over.

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
            while place - held > EVERY:
                places.append(held := held + EVERY)
            if place - held >= SPACING or (place == end and end > held):
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

    def _add(self, parent: _Node, piece: Piece, saved: bool = False) -> _Node:
        """Adds a piece and its checkpoint after ``parent``; returns the node that ends with it."""
        while (known := parent.children.get(int(piece.tokens[0]))) is not None:
            n = _common(known.piece.tokens, piece.tokens)
            if n < known.piece.tokens.size:
                known = self._split(known, n)
            if n == piece.tokens.size:
                self._merge(known, piece)
                return known
            self._merge(known, piece.cut(n))
            parent, saved = known, False
        piece.own()
        node = _Node(piece, parent, saved)
        if piece.checkpoint:
            self._used[node] = self._clock
        return node

    def _split(self, node: _Node, n: int) -> _Node:
        """Gives the node's first ``n`` tokens a node of their own above it, which is returned."""
        node.read(node.piece.kv, node.piece.head)
        first = node.piece.cut(n)
        first.own()
        node.piece.own()
        above = _Node(first, node.parent, saved=False)
        above.children[int(node.piece.tokens[0])] = node
        node.parent, node.saved = above, False
        return above

    def _merge(self, node: _Node, piece: Piece) -> None:
        """Adds to a node what another piece of the same text has beyond it."""
        known = node.piece
        new: dict[str, Any] = {}
        if piece.head and not known.head:
            new["head"] = piece.head
        if known.quantization and not piece.quantization:
            new |= {"kv": piece.kv, "quantization": None}
        if not piece.checkpoint.keys() <= known.checkpoint.keys():
            new["checkpoint"] = piece.checkpoint
            self._used.setdefault(node, self._clock)
        if new:
            vars(known).update(new)
            known.own()
            node.saved = False

    def _touch(self, node: _Node) -> None:
        del self._used[node]
        self._used[node] = self._clock

    # --- dropping --------------------------------------------------------------------------------
    def trim(self, max_bytes: int) -> None:
        """Drops what is worth least until what is held takes no more than ``max_bytes``."""
        while self._used:
            leaves = [node for node in self._used if not node.children]
            if self.nbytes > max_bytes:
                least = [min(self._used, key=self._worth)]
            elif self._max_sequences is not None and len(leaves) > self._max_sequences:
                least = min(map(self._stem, leaves), key=self._best)
            else:
                return
            self._clock = max(self._clock, self._best(least))
            self._discard(least)

    def clear(self) -> None:
        """Drops everything, the files included."""
        self._discard(reversed([*_tree(self._root)]))

    def _worth(self, node: _Node) -> float:
        """The tokens a byte that would have to be processed again, from the clock at its last use.

        A checkpoint that others follow takes its states alone: they need the keys and values.
        """
        above = node.parent
        while above is not self._root and above not in self._used:
            above = above.parent
        freed = size(node.piece.checkpoint)
        if not node.children:
            bare = takewhile(lambda n: n not in self._used, self._stem(node)[1:])
            freed = node.piece.nbytes + sum(n.piece.nbytes for n in bare)
        return self._used[node] + (node.piece.end - above.piece.end) / freed

    def _best(self, nodes: list[_Node]) -> float:
        return max(self._worth(node) for node in nodes if node in self._used)

    def _stem(self, leaf: _Node) -> list[_Node]:
        """The nodes that lead to this leaf alone, the leaf first."""
        stem = [leaf]
        while (above := stem[-1].parent) is not self._root and len(above.children) == 1:
            stem.append(above)
        return stem

    def _discard(self, nodes: Iterable[_Node]) -> None:
        """Drops the nodes' checkpoints, and the nodes that served no other."""
        for node in nodes:
            if self._used.pop(node, None) is not None:
                node.piece.checkpoint, node.saved = {}, False
            self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Removes the node, and those above it, if they serve no checkpoint; some may be gone."""
        while not node.children and node not in self._used and node is not self._root:
            node.parent.children.pop(int(node.piece.tokens[0]), None)
            if self._folder is not None:
                self._folder.remove(node.name)
            node = node.parent

    def _undamaged(self, action: Callable[[], T]) -> T:
        """What the action returns once it meets no damaged node: those go, with what follows."""
        while True:
            try:
                return action()
            except _Damaged as error:
                logger.warning("Part of the prompt cache is dropped: %s", error)
                self._discard(reversed([*_tree(error.node)]))

    # --- on disk ---------------------------------------------------------------------------------
    def save_next(self) -> bool:
        """Writes one node that is not on disk yet; returns whether it did.

        If that fails there is one warning, and no other attempt for a minute.
        """
        return self._undamaged(self._save_next)

    def _save_next(self) -> bool:
        # Those above come first, so that what is there can always be reached.
        node = next((node for node in _tree(self._root) if not node.saved), None)
        if self._folder is None or node is None:
            return False
        node.read()
        node.saved = self._folder.write(node.name, node.parent.name, node.piece)
        return node.saved

    def save(self) -> None:
        """Writes all that is not on disk yet, unless that fails."""
        while self.save_next():
            pass

    def _restore(self, folder: Folder) -> None:
        """Takes over what is on disk; what ends a text without a checkpoint is of no use."""
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
        for node in [*_tree(self._root)]:
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
        """A cache, in memory alone, of what :meth:`export` wrote.

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


def _tree(node: _Node) -> Iterator[_Node]:
    """The node and all below it, parents before their children."""
    nodes = [node]
    while nodes:
        node = nodes.pop()
        yield node
        nodes += node.children.values()


def _ids(tokens: Tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.uint32)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    n = min(a.size, b.size)
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n
