"""An exponential moving average of the weights, divided over ranks exactly as the optimizer's fp32 weights are.

The average is kept apart from the optimizer's state: Megatron's distributed optimizer saves two moments and nothing
else, and an average must outlive a change of Adam. In a checkpoint it has the canonical names and whole shapes of the
weights, with `ema.` before them, so any layout restores it and an export finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

from megadiff.training.distributed_optimizer import ReshardableDistributedOptimizer

PREFIX = "ema"
"""Before the canonical names of averaged weights in a checkpoint, with a dot between."""


class WeightAverage:
    """The average of this rank's fp32 weights.

    After step t (1, 2, …): average ← d·average + (1 − d)·weight with d = min(decay, (1 + t) / (10 + t)), so that the
    initial weights are soon forgotten. d is a function of the step, and the average is all there is to save.
    """

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        """Begin at the present weights, beside which the average lives, on the host where the weight does."""
        self.decay = decay
        self._optimizer = optimizer
        self._weights = _main_weights(optimizer)
        self._averages = {parameter: weight.detach().clone() for parameter, weight in self._weights.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the present weights."""
        for parameter, average in self._averages.items():
            average.copy_(self._weights[parameter])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` completed steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._averages:
            torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), 1.0 - decay)

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[Any, Any]:
        """What a distributed checkpoint saves, or loads into.

        Args:
            model_state: the sharded state of all model chunks of this rank.
        """
        if isinstance(self._optimizer, ReshardableDistributedOptimizer):
            return self._optimizer.sharded_parts(model_state, PREFIX, self._averages, is_loading=is_loading)
        whole = {sharded.data: sharded for sharded in nested_values(model_state)}
        return {
            index: make_sharded_optimizer_tensor(whole[parameter], average, PREFIX)
            for index, (parameter, average) in enumerate(self._averages.items())
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[Any, Any]) -> None:
        """Take the average over from a loaded `sharded_state_dict`."""
        if isinstance(self._optimizer, ReshardableDistributedOptimizer):
            self._optimizer.load_parts(self._averages, state)
            return
        for index, average in enumerate(self._averages.values()):
            average.copy_(state[index])


def _main_weights(optimizer: MegatronOptimizer) -> dict[Tensor, Tensor]:
    """Model parameter -> the fp32 weight, or this rank's part of it, that the optimizer updates in its place."""
    if isinstance(optimizer, ReshardableDistributedOptimizer):
        return optimizer.main_weights()
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        return {parameter: parameter.main_param for group in optimizer.float16_groups for parameter in group}
    return {parameter: parameter for parameter in optimizer.get_parameters()}
