"""Speculation for one model: what was measured, and the drafters of its sequences."""

from __future__ import annotations

from typing import Literal

from ...model.cache import Cache
from ...model.qwen3_next import Model
from ..draft_depth import (
    MAX_DEPTH,
    MOST_COPIED,
    DecidedDepth,
    Depth,
    FixedDepth,
    MeasuredDepth,
    Promise,
)
from . import Drafter, dflash, lookup, mtp
from .dflash import DFlashDrafter
from .lookup import LookupDrafter
from .mtp import MTPDrafter

MTP = Literal["auto", "off"] | int
Lookup = Literal["auto", "off"] | int | None


class Speculation:
    """Keeps a model's measurements and makes its drafters; see :meth:`of`.

    Attributes:
        measured: the rounds that pay by measurement, for all sequences of the model.
    """

    def __init__(self, model: Model):
        self._model = model
        self.measured = MeasuredDepth()
        self._head, self._copies = mtp.new_shares(), lookup.new_shares()
        self._blocks = dflash.new_shares()

    @classmethod
    def of(cls, model: Model) -> Speculation:
        """The model's own, which is made at its first use."""
        known = vars(model).get("_speculation")
        if known is None:
            known = vars(model)["_speculation"] = cls(model)
        return known

    def drafter(self, cache: Cache | None = None) -> MTPDrafter:
        """The drafter of the model's MTP head, for one sequence.

        Args:
            cache: made by ``model.mtp.make_cache()``; drafting goes on from there.
        """
        return MTPDrafter(self._model, cache, self._head)

    def drafters(self, depth: Depth, cache: Cache, position: int = 0) -> list[Drafter]:
        """The drafters of one sequence, in the order in which they are asked.

        Args:
            depth: chooses among them; those that are idle by it are left out.
            cache: the head's, as for :meth:`drafter`, which it then has to keep up to date. Empty
                for none.
            position: the number of tokens before those that a DFlash drafter will be told of.
        """
        found: list[Drafter] = [] if depth.idle("lookup") else [LookupDrafter(self._copies)]
        if self._model.dflash is not None and not depth.idle("dflash"):
            found.append(DFlashDrafter(self._model, position, self._blocks))
        return [*found, self.drafter(cache)] if cache else found

    def head_cache(self, depth: Depth) -> Cache:
        """A new cache for the MTP head; empty if there is none, or it is idle or not used."""
        head = self._model.mtp
        unused = head is None or self._model.dflash is not None or depth.idle("mtp")
        return [] if unused else head.make_cache()

    def depth(self, mtp: MTP, lookup: Lookup = None) -> Depth:
        """The chooser of who drafts and how many tokens.

        Args:
            mtp, lookup: as for :func:`mlx_qwen3next.generate_step`.

        Raises:
            ValueError: the model cannot draft to that depth.
        """
        check_depth(mtp, self._model)
        group = self._model.group
        alone = group.size == 1
        measured = self.measured if alone else DecidedDepth(self.measured, group.decide)
        return FixedDepth(_number(mtp), _number(check_lookup(lookup, mtp)), measured)

    def explain(self) -> list[Promise]:
        """What a plain step and rounds with the MTP head's drafts promise by what was measured.

        Empty as long as that is nothing, or if there is no head.
        """
        return [] if self._model.mtp is None else self.measured.explain(self.drafter().offer())


def _number(depth: Literal["auto", "off"] | int) -> int | None:
    """A depth as a number, None for "auto"."""
    return None if depth == "auto" else 0 if depth == "off" else depth


def check_depth(mtp: MTP, model: Model | None = None) -> MTP:
    """Returns ``mtp`` if it is "auto", "off" or 1…8 (and the model has a head to draft with).

    Raises:
        ValueError: it is something else.
    """
    if mtp in ("auto", "off"):
        return mtp
    if isinstance(mtp, bool) or not isinstance(mtp, int) or not 1 <= mtp <= MAX_DEPTH:
        raise ValueError(f"mtp must be 'auto', 'off' or 1 to {MAX_DEPTH}, got {mtp!r}")
    if model is not None and not model.drafts:
        raise ValueError(f"mtp is {mtp}, but this model has no MTP head; use 'auto' or 'off'")
    return mtp


def most_drafted(mtp: MTP, lookup: Lookup, model: Model) -> int:
    """Returns the most tokens that a round may draft; the arguments are :func:`generate_step`'s.

    Raises:
        ValueError: ``mtp`` or ``lookup`` is none of their values.
    """
    depth, copied = _number(check_depth(mtp, model)), _number(check_lookup(lookup, mtp))
    if depth is None:
        depth = MAX_DEPTH if model.dflash is None else MOST_COPIED
    return max(depth if model.drafts else 0, MOST_COPIED if copied is None else copied)


def check_lookup(lookup: Lookup, mtp: MTP) -> Literal["auto", "off"] | int:
    """Returns ``lookup`` if it is "auto", "off" or 1…15; None is "auto" where ``mtp`` is, or "off".

    Raises:
        ValueError: it is something else, or does not go with ``mtp``.
    """
    if lookup is None:
        return "auto" if mtp == "auto" else "off"
    if lookup == "auto" and isinstance(mtp, int):
        raise ValueError(
            f"lookup 'auto' compares with plain steps, which mtp {mtp} excludes; use mtp 'auto' or "
            f"'off', or lookup 'off' or 1 to {MOST_COPIED}"
        )
    if lookup in ("auto", "off"):
        return lookup
    if isinstance(lookup, bool) or not isinstance(lookup, int) or not 1 <= lookup <= MOST_COPIED:
        raise ValueError(f"lookup must be 'auto', 'off' or 1 to {MOST_COPIED}, got {lookup!r}")
    return lookup
