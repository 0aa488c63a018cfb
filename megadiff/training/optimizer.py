"""The optimizer factory and the learning-rate schedule.

Megatron's own factory picks the Adam that happens to be importable, knows no LaProp, and offloads to torch's AdamW
alone. Here the optimizer is chosen in one place and handed to Megatron's wrappers, which add what distribution needs:
fp32 master weights, gradient norms over tensor and pipeline ranks, and sharded state.

The learning rate is a function of the step alone, so nothing about it is saved or restored.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    param_group_identifier_keys,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megadiff.accelerations import resolve_adam
from megadiff.fields import require, require_choices
from megadiff.models.parametrization import Scales
from megadiff.parallel.groups import Groups, ParallelConfig
from megadiff.training.adam import MOMENTS, fused_adam, initialize_state, torch_adam
from megadiff.training.distributed_optimizer import ReshardableDistributedOptimizer
from megadiff.training.laprop import LaProp
from megadiff.training.offload import CpuAdam, DeepSpeedAdam, OffloadedAdam


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or LaProp, and the learning-rate schedule."""

    algorithm: Literal["adamw", "laprop"] = "adamw"
    """AdamW, or LaProp, which normalises gradients before it averages them; a run keeps the one it began with."""
    lr: float = 3e-4
    """Peak learning rate; with model.parametrization complete_p the base of all groups, near 0.3."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    decoupled_lr: float | None = None
    """Peak learning rate of embedding and head, by default `lr`, with complete_p 0.02·lr; follows the same schedule."""
    lr_decay_style: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warm-up: constant and then down (wsd: warm-up, stable, decay), half a cosine, or constant."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    lr_decay_fraction: float = 0.2
    """Share of all steps that wsd spends going down, as 1 - √x."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; gains and biases are exempt, with complete_p embedding and head, too, and the
    rest is multiplied by model.hidden_size, by which the learning rate is divided."""
    adam_beta1: float = 0.9
    """Decay of the first moment, of either algorithm."""
    adam_beta2: float = 0.99
    """Decay of the second moment, of either algorithm."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment, with complete_p divided by model.hidden_size·model.num_layers."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    implementation: Literal["auto", "torch", "apex", "transformer_engine"] = "auto"
    """Whose fused Adam updates weights on the device; auto takes Transformer Engine's or Apex's where there is a CUDA
    device and one can be imported, else torch's. LaProp is torch's alone. The run records which."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer state and fp32 weights in host memory and update them there."""
    optimizer_offload_fraction: float = 1.0
    """Share of the parameters that is offloaded; the rest is updated on the device."""
    cpu_adam: CpuAdam = "deepspeed"
    """Whose Adam updates offloaded weights; deepspeed needs the extra megadiff[offload]."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step, smaller at the beginning:
    min(ema_decay, (1 + t) / (10 + t))."""

    def __post_init__(self) -> None:
        require_choices(self, "optimizer")
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
        fraction, decay = self.optimizer_offload_fraction, self.ema_decay
        require(0 <= fraction <= 1, "optimizer.optimizer_offload_fraction", fraction, "lie in [0, 1]")
        require(decay is None or 0 <= decay < 1, "optimizer.ema_decay", decay, "lie in [0, 1), or be none")
        if self.algorithm == "laprop" and self.optimizer_cpu_offload:
            raise ValueError(
                "optimizer.optimizer_cpu_offload is on, but what updates weights on the host is AdamW and "
                "optimizer.algorithm is laprop: set one of them back"
            )
        if self.algorithm == "laprop" and self.implementation not in ("auto", "torch"):
            raise ValueError(
                f"optimizer.implementation is {self.implementation}, whose kernels are Adam's, but optimizer.algorithm "
                "is laprop: choose auto or torch"
            )
        if self.optimizer_cpu_offload and self.implementation not in ("auto", "torch"):
            raise ValueError(
                f"optimizer.implementation is {self.implementation}, but with optimizer.optimizer_cpu_offload torch's "
                "Adam updates what stays on the device: choose auto or torch"
            )

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Check that Megatron can offload in a layout.

        Raises:
            ValueError: it cannot.
        """
        if self.optimizer_cpu_offload and not parallel.use_distributed_optimizer:
            raise ValueError(
                "optimizer.optimizer_cpu_offload is on, but Megatron offloads only what its distributed optimizer "
                "holds: set parallel.use_distributed_optimizer true, with any number of processes"
            )

    @property
    def description(self) -> str:
        """What updates the weights here, as a run records it.

        Raises:
            ValueError: the chosen implementation cannot run here.
        """
        if self.algorithm == "laprop":
            return "LaProp by torch"
        if not self.optimizer_cpu_offload:
            return f"AdamW by {resolve_adam(self.implementation)}"
        offloaded = f"{100 * self.optimizer_offload_fraction:g} %"
        return f"AdamW, {offloaded} on the host by {self.cpu_adam}, the rest on the device by torch"

    def learning_rate(self, step: int, train_steps: int) -> float:
        """Learning rate, before any scale of a group, at 0-based `step` of a run of `train_steps`.

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
"""The matrices of the layers and of conditioning; all gains and biases; embedding and head: the words of `Scales`.

Megatron recognises groups on restore by these four numbers alone: groups must differ in one of them, or their settings
are silently exchanged, and none may depend on a setting, or a run could not go on with another one.
"""


_GROUP_KEYS = ("params", *param_group_identifier_keys)


def _param_groups(chunks: Sequence[DistributedDataParallel]) -> list[dict[str, Any]]:
    """The parameters of this rank by group; every stage has all groups, empty ones too."""
    groups: dict[str, dict[str, Any]] = {name: {"params": [], **identity} for name, identity in _GROUPS.items()}
    for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
        is_outer = getattr(parameter, "is_embedding_or_output_parameter", False)
        name = "gains" if parameter.dim() == 1 else "outer" if is_outer else "inner"
        groups[name]["params"].append(parameter)
    return list(groups.values())


def set_hyperparameters(
    optimizer: MegatronOptimizer, config: OptimizerConfig, scales: Scales, learning_rate: float
) -> None:
    """Give every group its settings; called before each step.

    Args:
        scales: of the model, on the learning rate, weight decay and ε.
        learning_rate: of this step, by `OptimizerConfig.learning_rate`.
    """
    outer_lr = scales.outer_lr if config.decoupled_lr is None else config.decoupled_lr / config.lr
    of_name = {
        "inner": (scales.inner_lr, scales.inner_weight_decay),
        "gains": (scales.gain_lr, 0.0),
        "outer": (outer_lr, scales.outer_weight_decay),
    }
    for group in optimizer.param_groups:
        lr, weight_decay = of_name[_name(group)]
        group["lr"] = learning_rate * lr
        group["weight_decay"] = config.weight_decay * weight_decay
        group["betas"] = (config.adam_beta1, config.adam_beta2)
        group["eps"] = config.adam_eps * scales.eps


def _name(group: dict[str, Any]) -> str:
    return next(name for name, identity in _GROUPS.items() if identity.items() <= group.items())


@torch.no_grad()
def grad_norms(optimizer: MegatronOptimizer) -> dict[str, float]:
    """Gradient norm of every group over the whole job, before or after clipping; a collective of it.

    The filters of Megatron's own norm, which counts shared and replicated gradients once, on fewer parameters; and one
    reduction and one read from the device for all groups.
    """
    squares = []
    for identity in _GROUPS.values():
        parameters = [
            parameter
            for group in optimizer.param_groups
            if identity.items() <= group.items()
            for parameter in group["params"]
        ]
        of_group = copy.copy(optimizer)
        of_group.get_parameters = lambda parameters=parameters: parameters
        squares.append(_sum_of_squares(of_group.get_main_grads_for_grad_norm()))
    sums = torch.stack(squares)
    # all-reduce over the ranks that hold other gradients, as many fp32 numbers as there are groups
    dist.all_reduce(sums, group=optimizer.get_grad_stats_parallel_group())
    return dict(zip(_GROUPS, sums.sqrt().tolist(), strict=True))


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Of all elements of fp32 tensors, on their device; a pipeline stage may have none."""
    if not gradients:
        return torch.zeros((), device=torch.cuda.current_device())
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def load_optimizer(optimizer: MegatronOptimizer, state_dict: dict[str, Any]) -> None:
    """Load fp32 weights and moments into the state that is there; `set_step_count` has to follow.

    Nothing else is taken over: the settings of all groups are this run's, and every optimizer keeps others beside them.

    Args:
        state_dict: a loaded `optimizer.sharded_state_dict`.
    """
    if isinstance(optimizer, ReshardableDistributedOptimizer):
        optimizer.load_state_dict(state_dict)
        return
    parameters = optimizer.get_parameters()
    for index, moments in state_dict.get("optimizer", state_dict)["state"].items():
        if index != "common_step":
            for name in MOMENTS:
                optimizer.state[parameters[index]][name].copy_(moments[name])
    main_weights = itertools.chain.from_iterable(state_dict.get("fp32_from_fp16_params", []))
    for parameter, loaded in zip(parameters, main_weights, strict=False):
        parameter.data.copy_(loaded)


def build_optimizer(
    config: OptimizerConfig,
    chunks: Sequence[DistributedDataParallel],
    groups: Groups,
    *,
    scales: Scales,
    dtype: torch.dtype,
) -> MegatronOptimizer:
    """The chosen optimizer behind the Megatron wrapper that the layout and precision ask for.

    Megatron's wrappers replace the parameters of the groups by fp32 main weights, or shards of them, and one accepts
    only certain classes: they are built around a placeholder, and what will step upon the groups they made.

    Args:
        chunks: this rank's virtual stages, wrapped for data parallelism; their configuration says whether optimizer
            state is sharded and whether updated parameters are gathered at once or during the next forward.
        scales: of the model, on the settings of the groups.
        dtype: of the parameters; bf16 parameters get fp32 master weights.

    Returns:
        `DistributedOptimizer` with a distributed optimizer, else `Float16OptimizerWithFloat16Params` for bf16 and
        `FP32Optimizer` for fp32.

    Raises:
        ValueError: the chosen Adam cannot run here.
    """
    ddp_config, model_config = chunks[0].ddp_config, chunks[0].config
    half_precision = dtype == torch.bfloat16
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=half_precision,
        params_dtype=dtype,
        use_distributed_optimizer=ddp_config.use_distributed_optimizer,
        overlap_param_gather=ddp_config.overlap_param_gather,
        optimizer_cpu_offload=config.optimizer_cpu_offload,
        optimizer_offload_fraction=config.optimizer_offload_fraction,
        fp8_recipe=model_config.fp8_recipe if model_config.fp8_param else None,
    )
    # fp32 weights are then the inner optimizer's affair, and no second copy of them stays on the device. Megatron's
    # public switch for it, use_precision_aware_optimizer, asks Transformer Engine for its version even here.
    megatron_config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = config.optimizer_cpu_offload and half_precision
    placeholder = torch.optim.AdamW(_param_groups(chunks))
    wrapped: MegatronOptimizer
    if ddp_config.use_distributed_optimizer:
        named = ProcessGroupCollection.setup_process_groups_for_optimizer(groups.collection, list(chunks), False)
        instances = named["inter_dist_opt_group"]
        wrapped = ReshardableDistributedOptimizer(
            placeholder,
            megatron_config,
            None,
            _state_is_there,
            model_chunks=list(chunks),
            per_model_buffers={index: chunk.buffers for index, chunk in enumerate(chunks)},
            data_parallel_group=named["intra_dp_cp_group"],
            data_parallel_group_gloo=None,
            data_parallel_group_idx=groups.mp.rank(),
            distributed_optimizer_instance_id=0 if instances is None else instances.rank(),
        )
        wrapped.grad_stats_parallel_group = named["intra_dist_opt_group"]
    else:
        if half_precision:
            wrapped = Float16OptimizerWithFloat16Params(placeholder, megatron_config, None, _state_is_there)
        else:
            wrapped = FP32Optimizer(placeholder, megatron_config, _state_is_there)
        wrapped.grad_stats_parallel_group = groups.mp
    wrapped.tp_group = groups.tp
    param_groups = [{key: group[key] for key in _GROUP_KEYS} for group in placeholder.param_groups]
    for parameter in itertools.chain.from_iterable(group["params"] for group in param_groups):
        if not parameter.is_leaf:
            parameter.retain_grad()  # torch's sign that it may be optimized; shards of fp32 weights are views of them
    wrapped.optimizer = _inner_optimizer(config, param_groups)
    set_hyperparameters(wrapped, config, scales, config.lr)
    initialize_state(wrapped.optimizer)
    return wrapped


def _state_is_there(*_: Any) -> None:
    """Megatron asks for the optimizer's state before it loads a checkpoint."""


def _inner_optimizer(config: OptimizerConfig, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """What updates main weights."""
    if config.algorithm == "laprop":
        return LaProp(param_groups)
    if config.optimizer_cpu_offload:
        return OffloadedAdam(
            param_groups,
            fraction=config.optimizer_offload_fraction,
            host_adam=DeepSpeedAdam if config.cpu_adam == "deepspeed" else torch_adam,
            device_adam=torch_adam,
        )
    library = resolve_adam(config.implementation)
    return torch_adam(param_groups) if library == "torch" else fused_adam(param_groups, library)
