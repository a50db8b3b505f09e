"""Autograd functions of the demo model: chunked delta rule, expert dispatch, cross-entropy.

Each function has the backward pass that is cheapest on a CPU. Symbols: B sequences, L tokens,
T = B·L, H hidden, V vocabulary, C chunk, N chunks, k experts a token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


class UnitLowerInverse(torch.autograd.Function):
    """``(I + A)⁻¹`` of a strictly lower triangular ``A [..., C, C]``, C a power of two, in float32.

    Blocks of 16 use ``Π (I + (−A)^(2^j))``; a product of blocks joins two inverted ones.
    """

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            inverse = UnitLowerInverse._invert(a.float())
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.mT.to(grad.dtype)
        return -(transposed @ grad @ transposed).tril(-1).float()

    @staticmethod
    def _invert(a: Tensor) -> Tensor:
        size = a.shape[-1]
        if size <= 16:
            power, inverse = -a, torch.eye(size) - a
            for _ in range(int(math.log2(size)) - 1):
                power = power @ power
                inverse = inverse + inverse @ power
            return inverse
        half = size // 2
        top, bottom = UnitLowerInverse._invert(
            torch.stack([a[..., :half, :half], a[..., half:, half:]])
        )
        inverse = torch.zeros_like(a)
        inverse[..., :half, :half] = top
        inverse[..., half:, half:] = bottom
        inverse[..., half:, :half] = -(bottom @ a[..., half:, :half] @ top)
        return inverse


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The chunked gated delta rule (Yang et al. 2024, arXiv:2412.06464, section 3.3).

    The first state is zero. q and k are ``[B, L, heads, Dk]`` (already normalised and scaled), v is
    ``[B, L, heads, Dv]``, g (the log decay) and beta are ``[B, L, heads]``. Returns
    ``[B, L, heads, Dv]``.
    """
    batch, length, heads, _ = q.shape
    pad = -length % CHUNK

    def chunks(x):  # [B, L, heads, ...] -> [N, B·heads, C, ...]
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
        x = x.unflatten(1, (-1, CHUNK)).movedim(3, 1).movedim(2, 0)
        return x.flatten(1, 2)

    q, k, v, g, beta = map(chunks, (q, k, v, g, beta))
    total = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -math.inf).exp()
    beta = beta[..., None]
    mixing = ((k * beta) @ k.mT * decay).tril(-1)
    inverse = UnitLowerInverse.apply(mixing)
    reach = total.exp()[..., None]
    new = inverse @ (v * beta)
    seen = inverse @ (k * (beta * reach))
    scores = q @ k.mT * decay
    q = q * reach
    k = k * (total[..., -1:] - total).exp()[..., None]
    keep = total[..., -1].exp()[..., None, None]

    state = torch.zeros(q.shape[1], q.shape[-1], v.shape[-1])
    outputs = []
    parts = (x.unbind() for x in (q, k, new, seen, scores, keep))
    for q_n, k_n, new_n, seen_n, scores_n, keep_n in zip(*parts, strict=True):
        delta = new_n - seen_n @ state
        outputs.append(q_n @ state + scores_n @ delta)
        state = state * keep_n + k_n.mT @ delta
    out = torch.stack(outputs, 1).view(batch, heads, -1, v.shape[-1])
    return out[:, :, :length].transpose(1, 2)


class Dispatch(torch.autograd.Function):
    """The rows of x ``[T, H]`` for each (token, slot) pair in expert order: ``[T·k, H]``."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.slots = slots
        return x.index_select(0, order // slots)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse).unflatten(0, (-1, ctx.slots))
        return grad.sum(1), None, None, None


class Reorder(torch.autograd.Function):
    """The rows of x permuted by ``order``, whose inverse permutation is ``inverse``."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of ``softmax(x Wᵀ)``; the forward pass computes the gradients too.

    x is ``[T, H]``, weight ``[V, H]``, targets ``[T]``. It works on slices of rows, so that
    the whole logits never take memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = 512
        low, w = x.bfloat16(), weight.bfloat16()
        loss = torch.zeros(())
        grad_x, grad_w = torch.empty_like(low), torch.zeros_like(weight)
        for i in range(0, len(x), rows):
            part, target = low[i : i + rows], targets[i : i + rows, None]
            logits = (part @ w.T).float()
            logits -= logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - chosen).sum()
            p = logits.div_(total)
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            p = p.bfloat16()
            grad_x[i : i + rows] = p @ w
            grad_w += p.T @ part
        ctx.save_for_backward(grad_x, grad_w)
        ctx.scale = 1 / len(x)
        return loss * ctx.scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad * ctx.scale
        return grad_x.float() * scale, grad_w * scale, None
