"""The tree that a prompt cache keeps its pieces in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from .pieces import Arrays, Piece, read


class Node:
    """A piece of text in the tree; it replaces the parent's child that begins alike."""

    def __init__(self, piece: Piece, parent: Node | None, saved: bool):
        self.piece = piece
        self.parent = parent or self  # the root is its own
        self.children: dict[int, Node] = {}  # by their first token
        self.saved = saved  # whether its file says what it holds
        self.nbytes = self.states = 0  # sizes of the piece and of its checkpoint
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
            Damaged: they cannot be read.
        """
        try:
            for arrays in parts or self.piece.parts.values():
                read(arrays)
        except ValueError as error:
            raise Damaged(self, str(error)) from None


class Damaged(ValueError):
    """A node's file does not say what the node held."""

    def __init__(self, node: Node, reason: str):
        super().__init__(reason)
        self.node = node


def tree(node: Node) -> Iterator[Node]:
    """The node and all below it, parents before their children."""
    nodes = [node]
    while nodes:
        node = nodes.pop()
        yield node
        nodes += node.children.values()


def common(a: np.ndarray, b: np.ndarray) -> int:
    """The number of tokens that two texts have in common at their beginning."""
    n = min(a.size, b.size)
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n
