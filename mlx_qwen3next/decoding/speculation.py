"""Speculation for one model: the depth that was measured, and the drafters of its sequences."""

from __future__ import annotations

from typing import Literal

from ..model.cache import Cache
from ..model.qwen3_next import Model
from .draft_depth import MAX_DEPTH, DecidedDepth, Depth, FixedDepth, MeasuredDepth
from .drafters import Drafter
from .drafters.dflash import DFlashDrafter
from .drafters.mtp import MTPDrafter

MTP = Literal["auto", "off"] | int


class Speculation:
    """Keeps a model's measurements and makes its drafters; see :meth:`of`.

    Attributes:
        measured: the depth that pays by measurement, for all sequences of the model.
    """

    def __init__(self, model: Model):
        self._model = model
        self.measured = MeasuredDepth()

    @classmethod
    def of(cls, model: Model) -> Speculation:
        """The model's own, which is made at its first use."""
        known = vars(model).get("_speculation")
        if known is None:
            known = vars(model)["_speculation"] = cls(model)
        return known

    def drafter(self, cache: Cache | None = None, position: int = 0) -> Drafter | None:
        """A drafter for one sequence; None for a model that has none.

        Args:
            cache: made by ``model.mtp.make_cache()``; drafting goes on from there.
            position: the tokens of the sequence that the drafter is not told of, for one that has
                no such cache.
        """
        if self._model.dflash is not None:
            return DFlashDrafter(self._model, position)
        return None if self._model.mtp is None else MTPDrafter(self._model, cache)

    def depth(self, mtp: MTP) -> Depth:
        """The chooser of the depth of drafting.

        Args:
            mtp: as for :func:`mlx_qwen3next.generate_step`.

        Raises:
            ValueError: the model cannot draft to that depth.
        """
        check_depth(mtp, self._model)
        if mtp == "auto" and self._model.drafts:
            group = self._model.group
            alone = group.size == 1
            return self.measured if alone else DecidedDepth(self.measured, group.decide)
        return FixedDepth(mtp if isinstance(mtp, int) else 0)


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
