"""Muon for hidden matrices and stacks of experts, Adam for all other parameters.

Both rules ignore the scale of the gradient, so no clipping is needed.
"""

import torch
from torch import Tensor, nn

MUON_RATE, ADAM_RATE = 0.02, 4e-3  # peaks
MOMENTUM, WEIGHT_DECAY = 0.95, 0.05  # of Muon
BETAS, EPS = (0.9, 0.95), 1e-10  # of Adam
OUTER = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "conv1d", "in_proj_ba")


def orthogonalize(g: Tensor) -> Tensor:
    """Newton–Schulz iterations towards ``UVᵀ`` of g ``[..., m, n]`` (Jordan et al. 2024, Muon)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Updates named parameters; the moments are tensors that processes can share."""

    def __init__(self, model: nn.Module):
        self.parameters = dict(model.named_parameters())
        self.first = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.second = {n: torch.zeros_like(p) for n, p in self.parameters.items() if self.outer(n)}

    def outer(self, name: str) -> bool:
        """Whether Adam updates the parameter."""
        return self.parameters[name].dim() < 2 or any(part in name for part in OUTER)

    def shares(self, count: int) -> list[list[str]]:
        """The parameters' names in ``count`` lists of about equal work."""

        def cost(name):
            p = self.parameters[name]
            return p.numel() * (30 if self.outer(name) else 20 * min(p.shape[-2:]))

        lists, costs = [[] for _ in range(count)], [0] * count
        for name in sorted(self.parameters, key=cost, reverse=True):
            least = costs.index(min(costs))
            lists[least].append(name)
            costs[least] += cost(name)
        return lists

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, step: int, factor: float) -> None:
        """Updates a parameter in one step (counted from 0), at ``factor`` times the peak rate."""
        p, first = self.parameters[name], self.first[name]
        if self.outer(name):
            second = self.second[name]
            first.lerp_(grad, 1 - BETAS[0])
            second.lerp_(grad.square(), 1 - BETAS[1])
            debiased = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPS)
            p.addcdiv_(first, debiased, value=-ADAM_RATE * factor / (1 - BETAS[0] ** (step + 1)))
            return
        first.lerp_(grad, 1 - MOMENTUM)
        update = grad.lerp(first, MOMENTUM)
        if name.endswith("gate_up_proj"):  # two matrices
            update = update.unflatten(1, (2, -1))
        update = orthogonalize(update)
        scale = max(1, update.shape[-2] / update.shape[-1]) ** 0.5
        p.mul_(1 - MUON_RATE * factor * WEIGHT_DECAY)
        p.add_(update.reshape(p.shape), alpha=-MUON_RATE * factor * scale)
