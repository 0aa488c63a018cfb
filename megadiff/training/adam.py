"""The Adam that updates the weights: which one, its state, and its count of steps.

All of them compute AdamW in fp32 with moments called `exp_avg` and `exp_avg_sq`, so a run may be saved with one and go
on with another. They differ in where they count steps: torch's and DeepSpeed's beside the moments of every parameter,
the fused ones of Transformer Engine and Apex once per group. No saved count is read: a run knows its steps. State and
count of LaProp, which computes something else, are kept and set here in the same way.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megadiff.accelerations import FUSED_ADAMS
from megadiff.training.offload import OffloadedAdam

ParamGroups = list[dict[str, Any]]
MOMENTS = ("exp_avg", "exp_avg_sq")


def torch_adam(groups: ParamGroups) -> torch.optim.AdamW:
    """torch's fused AdamW, on any device."""
    return torch.optim.AdamW(groups, fused=True)


def fused_adam(groups: ParamGroups, library: str) -> torch.optim.Optimizer:
    """FusedAdam of Transformer Engine or Apex; master weights stay Megatron's.

    Args:
        library: a key of `FUSED_ADAMS` that `resolve_adam` has found to be live.
    """
    base = importlib.import_module(FUSED_ADAMS[library]).FusedAdam

    class FusedAdam(base):  # type: ignore[misc, valid-type]
        param_groups: ParamGroups
        counts_in_groups = True

        def step(self, *args: Any, **kwargs: Any) -> Any:
            """Step over groups without parameters: pipeline stages and shards may have such, Apex cannot bear them."""
            groups = self.param_groups
            self.param_groups = [group for group in groups if group["params"]]
            try:
                return super().step(*args, **kwargs)
            finally:
                self.param_groups = groups

    return FusedAdam(groups, adam_w_mode=True, bias_correction=True)


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that do the arithmetic: both halves of an offloaded one, or the one given."""
    return optimizer.sub_optimizers if isinstance(optimizer, OffloadedAdam) else [optimizer]


def initialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Create all state before the first step, so that a checkpoint has somewhere to be loaded into."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter.data) for name in MOMENTS}
                inner.state[parameter] = moments
    set_step_count(optimizer, 0)
    if isinstance(optimizer, OffloadedAdam):
        optimizer.share_state()


def set_step_count(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell the optimizer how many steps it has made, for its bias correction.

    Every parameter gets a count of its own: where they share one tensor, each of them raises it.
    """
    for inner in inner_optimizers(optimizer):
        counts_in_groups = getattr(inner, "counts_in_groups", False)
        for group in inner.param_groups:
            if counts_in_groups:
                group["step"] = step
            for parameter in group["params"]:
                if not counts_in_groups:
                    count = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
                    inner.state[parameter]["step"] = count
