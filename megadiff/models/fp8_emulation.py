"""FP8 products without FP8 hardware: what goes into a product is rounded to FP8, what it computes is not.

Per-tensor current scaling, the recipe that Transformer Engine and Megatron call tensorwise. Each of the three products
of a linear layer takes two FP8 matrices, and each matrix is quantised once, with one scale:

    forward          y  = Q(x)·Q(W)ᵀ      E4M3, E4M3
    input gradient   dx = Q(dy)·Q(W)      E5M2 (hybrid) or E4M3, E4M3
    weight gradient  dW = Q(dy)ᵀ·Q(x)     E5M2 (hybrid) or E4M3, E4M3

    Q(x) = cast(saturate(x · s)) / s,     s = largest FP8 number / max |x|

Products of FP8 numbers are exact in fp32 (and in TF32); they are summed in fp32, multiplied by both scales there, and
rounded once to the type of the parameters. Tensor cores sum with fewer bits than fp32 between their promotions to it,
which is the one rounding that this leaves out.

A tensor is that of a micro-batch, whoever holds its parts: max |x| is taken over tensor- and context-parallel ranks,
one all-reduce MAX of 2 numbers forward and of 1 backward per linear layer, so that divided layers round as whole ones
do. Transformer Engine's tensorwise recipe scales the shards of a weight each by its own maximum instead, which rounds a
little less. Kept for backward are x and W in 8 bits. Other micro-batches have other scales: micro_batch_size is part
of the result here, as it is on the hardware.

Sources: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433); the recipe Float8CurrentScaling of
Transformer Engine's documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadiff.models.fp8 import Fp8Format
from megadiff.models.linears import Gated, Linears

_LARGEST_SCALE = torch.finfo(torch.float32).max


class Quantized(NamedTuple):
    """A tensor in FP8: values · inverse_scale."""

    values: Tensor
    inverse_scale: Tensor
    """fp32, a scalar on the device."""

    def dequantized(self) -> Tensor:
        """The numbers that this stands for, fp32."""
        return self.values.float() * self.inverse_scale


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x|, an fp32 scalar on the device."""
    return x.detach().abs().amax().float()


def quantize(x: Tensor, dtype: torch.dtype, amax: Tensor) -> Quantized:
    """Round to FP8, nearest and ties to even, after scaling `amax` to the largest number of the type.

    A tensor of zeros has scale 1. Numbers that are not finite stay so, and an infinity makes all others NaN: a run
    stops there, where hardware would saturate them.

    Args:
        dtype: float8_e4m3fn or float8_e5m2.
        amax: max |x|, of the whole tensor where x is a part of one.
    """
    largest = torch.finfo(dtype).max
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax)).clamp(max=_LARGEST_SCALE)
    return Quantized((x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal())


def fp8_matmul(a_MK: Quantized, b_KN: Quantized, dtype: torch.dtype) -> Tensor:
    """The product of two FP8 matrices, summed in fp32 and rounded once to `dtype`; [M, N]."""
    product = a_MK.values.float() @ b_KN.values.float()
    return (product * (a_MK.inverse_scale * b_KN.inverse_scale)).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """How the linear layers of a rank round what they multiply."""

    fp8_format: Fp8Format
    amax_group: dist.ProcessGroup
    """Ranks that hold parts of the same tensors: tensor x context."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        return torch.float8_e5m2 if self.fp8_format == "hybrid" else torch.float8_e4m3fn

    def amaxes(self, *tensors: Tensor) -> Tensor:
        """max |x| of each tensor as a whole, fp32; one all-reduce over the group, of parts and copies alike."""
        amaxes = torch.stack([largest_magnitude(x) for x in tensors])
        if self.amax_group.size() > 1:
            # all-reduce MAX over tensor x context ranks, [number of tensors]
            dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.amax_group)
        return amaxes


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, emulation: Emulation) -> Tensor:
        of_x, of_weight = emulation.amaxes(x, weight_OI)
        x_TI = quantize(x.flatten(0, -2), torch.float8_e4m3fn, of_x)
        weight = quantize(weight_OI, torch.float8_e4m3fn, of_weight)
        ctx.save_for_backward(*x_TI, *weight)
        ctx.emulation, ctx.dtypes = emulation, (x.dtype, weight_OI.dtype)
        y_TO = fp8_matmul(x_TI, weight._replace(values=weight.values.t()), x.dtype)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = ctx.saved_tensors
        x_TI, weight_OI = Quantized(*saved[:2]), Quantized(*saved[2:])
        [grad], (x_dtype, weight_dtype) = grads, ctx.dtypes
        grad_TO = quantize(grad.flatten(0, -2), ctx.emulation.gradient_dtype, *ctx.emulation.amaxes(grad))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = fp8_matmul(grad_TO, weight_OI, x_dtype).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            grad_weight = fp8_matmul(grad_TO._replace(values=grad_TO.values.t()), x_TI, weight_dtype)
        return grad_x, grad_weight, None


def fp8_linear(x: Tensor, weight_OI: Tensor, emulation: Emulation) -> Tensor:
    """x·Wᵀ as FP8 hardware computes it, and so its gradients.

    A collective of the amax group, forward and backward.

    Args:
        x: [..., I], bf16 or fp32.
        weight_OI: [O, I].

    Returns:
        [..., O], in the type of x.
    """
    return _Fp8Linear.apply(x, weight_OI, emulation)


class _Emulated:
    """Before one of Megatron's parallel linear layers: its product, which both kinds leave to `_forward_impl`.

    What Megatron communicates within its product is done around ours, by functions that communicate the gradient too.
    Weights and their names are those of Megatron's layers.
    """

    def __init__(self, *sizes: int, emulation: Emulation, **settings: Any) -> None:
        super().__init__(*sizes, **settings)  # type: ignore[call-arg]
        self.emulation = emulation

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return fp8_linear(input, weight, self.emulation)


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Megatron's column-parallel layer with an FP8 product."""


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    """Megatron's row-parallel layer with an FP8 product."""


class EmulatedSwiGLU(Gated, EmulatedColumnParallelLinear):
    """The first matrix of a gated feed-forward layer, with an FP8 product."""


def emulated_linears(emulation: Emulation, *, is_gated: bool) -> Linears:
    """The layers of `local_linears` with FP8 products."""

    def spec(module: type) -> ModuleSpec:
        return ModuleSpec(module=module, params={"emulation": emulation})

    return Linears(
        qkv=spec(EmulatedColumnParallelLinear),
        proj=spec(EmulatedRowParallelLinear),
        fc1=spec(EmulatedSwiGLU if is_gated else EmulatedColumnParallelLinear),
        fc2=spec(EmulatedRowParallelLinear),
    )
