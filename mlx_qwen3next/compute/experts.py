"""The router and the mixture of experts, in MLX's own operations.

:func:`route` has its equation in :mod:`mlx_qwen3next.compute.reference`; the tests hold the two
together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, cast

import mlx.core as mx
from mlx_lm.models.activations import swiglu

from ..metal_kernels import Experts
from . import cpu_matmul
from .cpu_matmul import TransposedWeights

Stored: TypeAlias = Experts | TransposedWeights
SharedExpert: TypeAlias = tuple[Stored, Stored]  # gate and up [2 I, H], down [H, I]

MANY = 64  # pairs of rows and experts from which on they are sorted, as in mlx-lm


class Slots(Protocol):
    """A stack that holds some of the experts at a time, and gets others in their place.

    The host has to know which experts are wanted, so :meth:`place` and :meth:`products` wait for
    the device.
    """

    def place(self, routing: mx.array) -> mx.array | None:
        """Returns a kernels' routing whose experts are numbers of slots, in the same order; None if
        it wants more experts than there are slots. All of them are there by then.
        """

    def read_by(self, result: mx.array) -> None:
        """Says that ``result`` reads slots, which stay as they are until it is evaluated."""

    def products(
        self, rows: mx.array, gate_up: Stored, down: Stored, indices: mx.array, is_sorted: bool
    ) -> mx.array:
        """Returns what :func:`products` does; ``gate_up`` and ``down`` are the slots."""


def route(
    logits: mx.array, top_k: int, normalise: bool, like: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Returns the top k experts of each token and their weights; ties go to the lowest index.

    Args:
        logits: ``[..., E]``.

    Returns:
        ``(experts, weights)``, each ``[..., top_k]``; weights float32, or in the dtype
        of ``like``, softmax over all experts, summing to one if ``normalise``.
    """
    logits, descending = _both_signs(logits)
    experts = mx.stop_gradient(mx.argsort(descending, axis=-1)[..., :top_k])
    weights = mx.take_along_axis(mx.softmax(logits, axis=-1), experts, axis=-1)
    total = weights.sum(axis=-1, keepdims=True) if normalise else mx.array(1.0)
    return experts, _shares(weights, total, weights if like is None else like)


# Compiled, so that each takes one launch.
@partial(mx.compile, shapeless=True)
def _both_signs(logits: mx.array) -> tuple[mx.array, mx.array]:
    logits = logits.astype(mx.float32)
    return logits, -logits


@partial(mx.compile, shapeless=True)
def _shares(weights: mx.array, total: mx.array, like: mx.array) -> mx.array:
    return (weights / total).astype(like.dtype)


@partial(mx.compile, shapeless=True)
def _gate(logits: mx.array, like: mx.array) -> mx.array:
    return mx.sigmoid(logits.astype(mx.float32)).astype(like.dtype)


def only_own(experts: mx.array, weights: mx.array, own: range) -> tuple[mx.array, mx.array]:
    """Returns the experts of each token that are in ``own``, counted from its start, with weights.

    Experts outside ``own`` become the first one, with weight 0.
    """
    here = (experts >= own.start) & (experts < own.stop)
    return mx.where(here, experts - own.start, 0), mx.where(here, weights, 0)


def choose(
    logits: mx.array, like: mx.array, *, experts: int, top_k: int, normalise: bool
) -> tuple[mx.array, mx.array]:
    """Returns the experts of each row, the shared one last, and their weights.

    Args:
        logits: ``[R, E]``, or ``[R, E + 1]`` if a shared expert is number E, its gate last.
        like: gives the weights' dtype. experts: E; top_k, normalise: as for :func:`route`.

    Returns:
        ``(experts, weights)``, each ``[R, top_k]`` or ``[R, top_k + 1]``.
    """
    chosen = route(logits[:, :experts], top_k, normalise, like)
    return _with_shared(*chosen, experts, logits[:, experts:], like)


def _with_shared(
    experts: mx.array, weights: mx.array, number: int, gate: mx.array, like: mx.array
) -> tuple[mx.array, mx.array]:
    """Adds the expert of a number, which all rows have, unless ``gate`` has no logit for it."""
    if gate.shape[1] == 0:
        return experts, weights
    shared = mx.full(gate.shape, number, experts.dtype)
    experts = mx.concatenate([experts, shared], axis=1)
    return experts, mx.concatenate([weights, _gate(gate, like)], axis=1)


def products(
    rows: mx.array, gate_up: Stored, down: Stored, indices: mx.array, is_sorted: bool
) -> mx.array:
    """Returns each row through its experts; ``rows`` ``[R, 1, 1, H]``, ``indices`` ``[R, k]``."""
    gate, up = mx.split(_gather(rows, gate_up, indices, is_sorted), 2, axis=-1)
    return _gather(swiglu(gate, up), down, indices, is_sorted)


def combine(y: mx.array, places: mx.array, weights: mx.array, residual: mx.array) -> mx.array:
    """Returns ``residual`` plus the weighted sum of each row's experts.

    Args:
        y: ``[N, H]``, the results of all pairs of rows and experts, in any order.
        places: ``[R, k]``, those of each row's pairs in it. weights: ``[R, k]``.
        residual: ``[R, H]``.

    Returns:
        ``[R, H]``.
    """
    return mx.addmm(residual[:, None], weights[:, None], y[places]).squeeze(-2)


class Forms(NamedTuple):
    """The forms of the steps of :func:`sparse_experts`; the first and the last for many rows."""

    choose: Callable[..., tuple[mx.array, mx.array]] = choose
    products: Callable[[mx.array, Stored, Stored, mx.array, bool], mx.array] = products
    combine: Callable[..., mx.array] = combine


COMPOSITIONS = Forms()


def sparse_experts(
    x: mx.array,
    logits: mx.array,
    gate_up: Stored,
    down: Stored,
    residual: mx.array,
    *,
    experts: int,
    top_k: int,
    normalise: bool,
    shared: SharedExpert | None = None,
    own: range | None = None,
    forms: Forms = COMPOSITIONS,
) -> mx.array:
    """Returns ``residual`` plus the mixture of experts, on packed weights.

    Args:
        x, residual: ``[..., H]``.
        logits: ``[..., E]``, or ``[..., E + 1]`` if there is a shared expert, its gate last.
        gate_up: ``[E, 2 I, H]``, gate's rows first; down: ``[E, H, I]``. The shared expert is
            number E of them, or it is ``shared``.
        experts: E; top_k, normalise: as for :func:`route`.
        shared: the shared expert, if its quantization is another than the others'.
        own: the experts that ``gate_up`` and ``down`` have, if not all.
        forms: those of its steps.

    Returns:
        ``[..., H]``.
    """
    shape = x.shape
    x, logits, residual = (a.reshape(-1, a.shape[-1]) for a in (x, logits, residual))
    if own is None:
        columns = logits if shared is None else logits[:, :experts]
        indices, weights = forms.choose(
            columns, x, experts=experts, top_k=top_k, normalise=normalise
        )
    else:
        chosen = route(logits[:, :experts], top_k, normalise, like=x)
        indices, weights = only_own(*chosen, own)
        if shared is None:
            gate = logits[:, experts:]
            indices, weights = _with_shared(indices, weights, len(own), gate, x)
    if shared is not None:
        gate, up = mx.split(_multiply(x, shared[0]), 2, axis=-1)
        y = _multiply(swiglu(gate, up), shared[1])
        residual = residual + _gate(logits[:, experts:], like=x) * y

    def mixed(rows: mx.array, indices: mx.array, is_sorted: bool) -> mx.array:
        return forms.products(rows, gate_up, down, indices, is_sorted)

    mixture = _mixture(x, mixed, forms.combine, residual, indices, weights, own)
    return mixture.reshape(shape)


def _mixture(
    x: mx.array,
    mixed: Callable[[mx.array, mx.array, bool], mx.array],
    combine: Callable[..., mx.array],
    residual: mx.array,
    indices: mx.array,
    weights: mx.array,
    own: range | None,
) -> mx.array:
    """Returns ``residual`` plus each row's weighted experts.

    Args:
        x, residual: ``[R, H]``. indices, weights: ``[R, k]``. own: see :func:`sparse_experts`.
        mixed: :func:`products` on the weights. combine: the form for many rows.
    """
    if indices.size < MANY:
        y = mixed(x[:, None, None], indices, False)  # [R, k, 1, H]
        return mx.addmm(residual[:, None], weights[:, None], y.squeeze(-2)).squeeze(-2)
    # Sorted by expert, so that MLX reads an expert's weights once.
    k, indices, weights = indices.shape[1], indices.flatten(), weights.flatten()
    if own is None:
        order = mx.argsort(indices)
        y = mixed(x[order // k, None, None], indices[order, None], True)
        y, places = y.reshape(-1, x.shape[-1]), _inverse(order).reshape(-1, k)
        return combine(y, places, weights.reshape(-1, k), residual)
    # Pairs without weight belong to other ranks; their number has to be known here.
    here = weights > 0
    order = mx.argsort(mx.where(here, indices, len(own) + 1))
    order = order[: int(cast(int, here.sum().item()))]
    if order.size == 0:
        return residual
    rows = order // k
    y = mixed(x[rows, None, None], indices[order, None], True)
    y = y.reshape(-1, x.shape[-1]) * weights[order, None]
    return residual.at[rows].add(y)


def _inverse(order: mx.array) -> mx.array:
    """Returns the inverse of a permutation, without another sort."""
    places = mx.arange(order.size, dtype=order.dtype)
    return mx.put_along_axis(mx.zeros_like(order), order, places, axis=0)


def _multiply(x: mx.array, weights: Stored) -> mx.array:
    """Returns ``x`` times a single matrix."""
    if isinstance(weights, TransposedWeights):
        return cpu_matmul.multiply(x, weights)
    if weights.scales is None:
        return x @ weights.weight.T
    return mx.quantized_matmul(
        *(x, weights.weight, weights.scales, weights.biases),
        group_size=weights.group_size,
        bits=weights.bits,
    )


def _gather(x: mx.array, weights: Stored, indices: mx.array, is_sorted: bool) -> mx.array:
    if isinstance(weights, TransposedWeights):
        return cpu_matmul.gather(x, weights, indices)
    if weights.scales is None:
        return mx.gather_mm(
            x, weights.weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=is_sorted
        )
    return mx.gather_qmm(
        *(x, weights.weight, weights.scales, weights.biases),
        rhs_indices=indices,
        transpose=True,
        group_size=weights.group_size,
        bits=weights.bits,
        sorted_indices=is_sorted,
    )
