"""Optimizer state and step in host memory, so that the device keeps weights, gradients and activations.

Megatron's `HybridDeviceOptimizer` divides the parameters between an optimizer on the device and one on the host, which
owns fp32 copies: gradients are copied down, both halves step, weights are copied up. Megatron's factory always puts
torch's AdamW on the host; here the host's Adam is chosen by name. Results are the device's, to rounding.

A parameter on the host costs the device nothing but its model weight and its gradient, and the host 16 bytes: fp32
weight, two moments, and the gradient that is copied down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

CpuAdam = Literal["deepspeed", "torch"]
_HANDLE = 0


def deepspeed_kernel() -> Any:
    """DeepSpeed's CPU Adam, which is compiled when it is first used on a machine (about a minute).

    Raises:
        ValueError: DeepSpeed is missing, or cannot compile.
    """
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder
    except ImportError as error:
        raise ValueError(
            "optimizer.cpu_adam is deepspeed, but DeepSpeed is not installed: pip install megadiff[offload], or choose "
            "torch"
        ) from error
    try:
        return CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # whatever its builder, torch's or the compiler raises
        raise ValueError(
            f"optimizer.cpu_adam is deepspeed, but DeepSpeed cannot compile its CPU Adam "
            f"({' '.join(str(error).split())[:200]}): install g++ and ninja, or choose torch"
        ) from error


class DeepSpeedAdam(torch.optim.Optimizer):
    """AdamW of parameters in host memory by DeepSpeed's kernel.

    DeepSpeed's own class is not used for three reasons. Its kernel keeps β₁ᵗ and β₂ᵗ as running fp32 products, so a
    resumed run would round differently from an unbroken one; here every step begins with a new handle, whose powers are
    computed from t. It creates its state at the first step, where a checkpoint wants it before. And it spends a second
    on asking the operating system about the processor.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        self._kernel = deepspeed_kernel()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter, whose gradient is contiguous and in host memory."""
        for group in self.param_groups:
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            decoupled_weight_decay, log, correct_bias = True, False, True
            self._kernel.create_adam(_HANDLE, *settings, decoupled_weight_decay, log)
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                self._kernel.adam_update(
                    _HANDLE,
                    int(state["step"]),
                    *settings,
                    correct_bias,
                    parameter.data,
                    parameter.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                )
            self._kernel.destroy_adam(_HANDLE)


class OffloadedAdam(HybridDeviceOptimizer):
    """Megatron's hybrid optimizer with a chosen Adam on either side, on machines with and without CUDA."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        fraction: float,
        host_adam: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        device_adam: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        """Divide the parameters of `groups`.

        Args:
            fraction: share of this rank's elements that is offloaded, from the first parameter on; a parameter is on
                one side as a whole.
        """
        pin_memory = torch.cuda.is_available()
        super().__init__(
            groups,
            offload_fraction=fraction,
            cpu_optimizer_cls=host_adam,
            gpu_optimizer_cls=device_adam,
            param_update_in_fp32=True,
            pin_cpu_grads=pin_memory,
            pin_cpu_params=pin_memory,
            overlap_cpu_optimizer_d2h_h2d=False,
        )

    def main_weight(self, parameter: Tensor) -> Tensor:
        """The fp32 weight that is updated in the place of `parameter`, on the host or on the device."""
        return self.param_to_inner_param[parameter]

    def share_state(self) -> None:
        """Show the state of both halves as this optimizer's own, for checkpoints."""
        self._sync_sub_optimizers_state_to_hdo()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """Megatron's division, which asks parameters whether they are on CUDA, without that question."""
        wanted = offload_fraction * sum(p.numel() for group in self.param_groups for p in group["params"])
        offloaded = 0
        host_groups: list[dict[str, Any]] = []
        device_groups: list[dict[str, Any]] = []
        host_copy: dict[Tensor, Tensor] = {}
        original: dict[Tensor, Tensor] = {}
        fp32_copy: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            host: list[Tensor] = []
            device: list[Tensor] = []
            for parameter in group["params"]:
                if offloaded < wanted:
                    offloaded += parameter.numel()
                    copy = parameter.detach().to("cpu", torch.float32, copy=True)
                    copy = copy.pin_memory() if self.pin_cpu_params else copy
                    host_copy[parameter], original[copy], fp32_copy[parameter] = copy, parameter, copy
                    host.append(copy)
                elif parameter.dtype != torch.float32:
                    fp32_copy[parameter] = parameter.detach().float()
                    device.append(fp32_copy[parameter])
                else:
                    device.append(parameter)
            for divided, members in ((host_groups, host), (device_groups, device)):
                if members:
                    divided.append({**group, "params": members})
        return host_groups, device_groups, host_copy, original, fp32_copy

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Nothing: both halves share their state with this optimizer, and checkpoints are loaded into it in place."""
