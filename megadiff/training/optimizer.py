"""The optimizer factory and the learning-rate schedule.

Megatron's own factory picks the Adam that happens to be importable and knows no other optimizer. Here the class is
chosen in one place, explicitly, and handed to Megatron's wrappers, which add what distribution needs: fp32 master
weights, gradient norms over tensor and pipeline ranks, and sharded state.

The learning rate is a function of the step alone, so nothing about it is saved or restored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megadiff.fields import require
from megadiff.parallel.groups import Groups
from megadiff.training.distributed_optimizer import ReshardableDistributedOptimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    decoupled_lr: float | None = None
    """Peak learning rate of embedding and head, where it differs from `lr`; follows the same schedule."""
    lr_decay_style: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warm-up: constant and then down (wsd: warm-up, stable, decay), half a cosine, or constant."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    lr_decay_fraction: float = 0.2
    """Share of all steps that wsd spends going down, as 1 - √x."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; gains are exempt."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.99
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        outer_lr = self.lr if self.decoupled_lr is None else self.decoupled_lr
        require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "be positive and finite")
        require(0 < outer_lr < math.inf, "optimizer.decoupled_lr", outer_lr, "be positive and finite, or none")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"lie in [0, optimizer.lr = {self.lr}]")
        require(self.lr_warmup_steps >= 0, "optimizer.lr_warmup_steps", self.lr_warmup_steps, "be at least 0")
        require(
            0 <= self.lr_decay_fraction <= 1, "optimizer.lr_decay_fraction", self.lr_decay_fraction, "lie in [0, 1]"
        )
        require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "be at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "lie in [0, 1)")
        require(0 < self.adam_eps < math.inf, "optimizer.adam_eps", self.adam_eps, "be positive and finite")
        require(0 <= self.clip_grad < math.inf, "optimizer.clip_grad", self.clip_grad, "be at least 0 (0 is off)")

    @property
    def outer_lr_ratio(self) -> float:
        """Learning rate of embedding and head relative to that of the layers."""
        return 1.0 if self.decoupled_lr is None else self.decoupled_lr / self.lr

    def learning_rate(self, step: int, train_steps: int) -> float:
        """Learning rate of the layers at 0-based `step` of a run of `train_steps`.

        The warm-up reaches `lr` with its last step; decays reach `min_lr` one step after the run's last.
        """
        if step < self.lr_warmup_steps:
            return self.lr * (step + 1) / self.lr_warmup_steps
        if self.lr_decay_style == "constant":
            return self.lr
        if self.lr_decay_style == "cosine":
            progress = (step - self.lr_warmup_steps) / max(1, train_steps - self.lr_warmup_steps)
            remaining = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        else:
            decay_steps = max(1, round(self.lr_decay_fraction * train_steps))
            decayed = (step - (train_steps - decay_steps)) / decay_steps
            remaining = 1.0 - math.sqrt(min(1.0, max(0.0, decayed)))
        return self.min_lr + (self.lr - self.min_lr) * remaining


_GROUPS = {
    "inner": {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False},
    "gains": {"wd_mult": 0.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False},
    "outer": {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": True},
}
"""The matrices of the layers; all gains; embedding and head.

Megatron recognises groups on restore by these four numbers alone: groups must differ in one of them, or their settings
are silently exchanged, and none may depend on a setting, or a run could not go on with another one.
"""


def _param_groups(chunks: Sequence[DistributedDataParallel]) -> list[dict[str, Any]]:
    """The parameters of this rank by group; every stage has all groups, empty ones too."""
    groups: dict[str, dict[str, Any]] = {name: {"params": [], **identity} for name, identity in _GROUPS.items()}
    for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
        is_outer = getattr(parameter, "is_embedding_or_output_parameter", False)
        name = "gains" if parameter.dim() == 1 else "outer" if is_outer else "inner"
        groups[name]["params"].append(parameter)
    return list(groups.values())


def set_hyperparameters(optimizer: MegatronOptimizer, config: OptimizerConfig, learning_rate: float) -> None:
    """Give every group its settings.

    Called before each step, because restoring a checkpoint brings back the settings it was saved with.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (config.outer_lr_ratio if group["is_decoupled_lr"] else 1.0)
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps


def set_step_count(optimizer: MegatronOptimizer, step: int) -> None:
    """Tell Adam how many steps it has made, for its bias correction.

    Depending on what is installed, Megatron saves this count in different places or not at all, and it restores one
    tensor that all parameters share, which the first step would then raise once for each of them. A run knows the count
    anyway.
    """
    for state in optimizer.optimizer.state.values():
        state["step"] = torch.full_like(state["step"], step)


def _initialize_adam_state(optimizer: torch.optim.Optimizer, config: MegatronOptimizerConfig | None = None) -> None:
    """Create Adam's state before the first step, so that a checkpoint has somewhere to be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }


def build_optimizer(
    config: OptimizerConfig, chunks: Sequence[DistributedDataParallel], groups: Groups, *, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW behind the Megatron wrapper that the layout and precision ask for.

    Args:
        chunks: this rank's virtual stages, wrapped for data parallelism; their configuration says whether optimizer
            state is sharded and whether updated parameters are gathered at once or during the next forward.
        dtype: of the parameters; bf16 parameters get fp32 master weights.

    Returns:
        `DistributedOptimizer` with a distributed optimizer, else `Float16OptimizerWithFloat16Params` for bf16 and
        `FP32Optimizer` for fp32.
    """
    ddp_config = chunks[0].ddp_config
    distributed = ddp_config.use_distributed_optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=ddp_config.overlap_param_gather,
    )
    adam = torch.optim.AdamW(
        _param_groups(chunks),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    wrapped: MegatronOptimizer
    if distributed:
        named = ProcessGroupCollection.setup_process_groups_for_optimizer(groups.collection, list(chunks), False)
        instances = named["inter_dist_opt_group"]
        wrapped = ReshardableDistributedOptimizer(
            adam,
            megatron_config,
            None,
            _initialize_adam_state,
            model_chunks=list(chunks),
            per_model_buffers={index: chunk.buffers for index, chunk in enumerate(chunks)},
            data_parallel_group=named["intra_dp_cp_group"],
            data_parallel_group_gloo=None,
            data_parallel_group_idx=groups.mp.rank(),
            distributed_optimizer_instance_id=0 if instances is None else instances.rank(),
        )
        wrapped.grad_stats_parallel_group = named["intra_dist_opt_group"]
    else:
        if dtype == torch.bfloat16:
            wrapped = Float16OptimizerWithFloat16Params(adam, megatron_config, None, _initialize_adam_state)
        else:
            wrapped = FP32Optimizer(adam, megatron_config, _initialize_adam_state)
        wrapped.grad_stats_parallel_group = groups.mp
    wrapped.tp_group = groups.tp
    _initialize_adam_state(adam)
    return wrapped
