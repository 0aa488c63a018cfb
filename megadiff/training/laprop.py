"""LaProp: momentum of normalised gradients, where Adam normalises the momentum of gradients.

    ν ← b₂·ν + (1 − b₂)·g²
    µ ← b₁·µ + (1 − b₁)·g / (√ν + ε)          b = 1 − (1 − β)/(1 − βᵏ) at step k = 1, 2, …
    θ ← θ − η·(µ + wd·θ)

A gradient enters µ normalised by the ν of its own step, so no later change of ν makes a large step of old momentum. The
betas begin at 0 and grow to β: µ and ν are averages at every step, with no correction afterwards, and the first step is
η·sign(g), whatever the scale of the gradient.

Source: Ziyin et al. (arXiv 2002.04839), with the corrected betas of the code of arXiv 2512.10858.
"""

from __future__ import annotations

from typing import Any

import torch


class LaProp(torch.optim.Optimizer):
    """LaProp with decoupled weight decay, all weights of a group at once, in the weights' own type.

    The moments have Adam's names, so that all that saves and restores them is the same. They do not have Adam's
    meaning: `exp_avg` is an average of numbers near ±1, Adam's one of gradients. A step makes one tensor of the size of
    the weights of the largest group, and leaves gradients as they are.
    """

    counts_in_groups = True

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every weight; each has a gradient, and its state is there (`adam.initialize_state`)."""
        for group in self.param_groups:
            group["step"] += 1
            weights = group["params"]
            if not weights:  # of this pipeline stage or shard; no foreach kernel takes an empty list
                continue
            beta1, beta2 = (_corrected(beta, group["step"]) for beta in group["betas"])
            gradients = [weight.grad for weight in weights]
            means = [self.state[weight]["exp_avg"] for weight in weights]
            squares = [self.state[weight]["exp_avg_sq"] for weight in weights]

            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_mul_(means, beta1)
            torch._foreach_addcdiv_(means, gradients, roots, 1 - beta1)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, means, alpha=-group["lr"])


def _corrected(beta: float, step: int) -> float:
    """The weight of what was before, at 1-based `step`."""
    return 1 - (1 - beta) / (1 - beta**step)
