"""Elementwise pieces of a layer that would be several kernels each, and are one on CUDA.

They compute next to nothing: what they cost is the memory they move. In torch's operators, every operator reads and
writes a tensor as large as the queries or as wide as a feed-forward layer, and autograd keeps some of them. Here each
piece is an `autograd.Function` that says what is kept, and whose forward and backward are plain functions:

    piece           reads and writes                            keeps
    rotate          x, result; backward the same                cos, sin: one pair for all layers
    squared_relu    x, result; backward x and two gradients     x
    swiglu          product, result; backward product and       product
                    two gradients

On CUDA, torch.compile makes one kernel of each such function, which computes in fp32 and rounds once. Elsewhere the
functions run as they are written: compiling takes a C++ compiler and seconds, and a CPU gains little by it. Both keep
the same tensors. Sizes that change (batches of validation, growing texts of a sampler) become symbols, so that most new
ones need no compilation. Sizes of 1 and other orders in memory do; what comes after torch's eighth, as only a sampler's
could, runs as it is written.

Shapes: S model length, B micro-batch, N heads, D head size, P = D/2 pairs of a head, F feed-forward width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from megadiff.accelerations import why_not_compiled


def one_kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tensors on one device: compiled on CUDA, at its first call there, as it is elsewhere.

    Nor is it compiled where Triton or the C compiler that it needs is missing: `megadiff doctor` says so.
    """

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        return function if why_not_compiled() else torch.compile(function)

    @functools.wraps(function)
    def call(*tensors: Tensor) -> Tensor:
        return (compiled() if tensors[0].is_cuda else function)(*tensors)

    return call


@one_kernel
def turned(x_SBND: Tensor, cos_SB1P: Tensor, sin_SB1P: Tensor) -> Tensor:
    """Every pair (x_p, x_{p+P}) turned by the angle of its position, in fp32 at least, and rounded to the type of x."""
    return _turned(x_SBND, cos_SB1P, sin_SB1P)


@one_kernel
def turned_back(x_SBND: Tensor, cos_SB1P: Tensor, sin_SB1P: Tensor) -> Tensor:
    """`turned` by the opposite angles: its inverse, and its gradient."""
    return _turned(x_SBND, cos_SB1P, -sin_SB1P)


def _turned(x_SBND: Tensor, cos_SB1P: Tensor, sin_SB1P: Tensor) -> Tensor:
    first, second = x_SBND.chunk(2, dim=-1)
    turned = torch.cat([first * cos_SB1P - second * sin_SB1P, second * cos_SB1P + first * sin_SB1P], dim=-1)
    return turned.to(x_SBND.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cos_SB1P: Tensor, sin_SB1P: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SB1P, sin_SB1P)
        return turned(x_SBND.detach(), cos_SB1P, sin_SB1P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return turned_back(*grads, *ctx.saved_tensors), None, None


def rotate(x_SBND: Tensor, cos_SB1P: Tensor, sin_SB1P: Tensor) -> Tensor:
    """Queries or keys with the rotary phases of their positions.

    Args:
        x_SBND: any number of heads N.
        cos_SB1P, sin_SB1P: of the angles, [S, B, 1, D/2], fp32.

    Returns:
        [S, B, N, D] in the type of x.

    Source: Su et al. (arXiv 2104.09864), pairs in halves as in GPT-NeoX and Llama.
    """
    return _Rotation.apply(x_SBND, cos_SB1P, sin_SB1P)


@one_kernel
def squared(x: Tensor) -> Tensor:
    """ReLU²."""
    return x.relu().square()


@one_kernel
def squared_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """2·ReLU times the gradient of ReLU²; made in place where it is not compiled."""
    return x.relu().mul_(2.0).mul_(gradient)


class _OfOneTensor(torch.autograd.Function):
    """A function of one tensor, which it keeps, and its gradient, each as a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[..., Tensor], gradient: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return value(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(*grads, *ctx.saved_tensors), None, None


def squared_relu(x: Tensor) -> Tensor:
    """ReLU², elementwise; any shape and floating-point type.

    Source: So et al. (arXiv 2109.08668).
    """
    return _OfOneTensor.apply(x, squared, squared_gradient)


@one_kernel
def gated(product_SBX: Tensor) -> Tensor:
    """silu(gate)·up of columns gate, up, gate, up, …"""
    gate_SBF, up_SBF = product_SBX.unflatten(-1, (-1, 2)).unbind(-1)
    return silu(gate_SBF) * up_SBF


@one_kernel
def gated_gradient(gradient_SBF: Tensor, product_SBX: Tensor) -> Tensor:
    """Both derivatives of silu(gate)·up times its gradient, in the order of the columns."""
    gate_SBF, up_SBF = product_SBX.unflatten(-1, (-1, 2)).unbind(-1)
    of_gate_SBF = torch.ops.aten.silu_backward(up_SBF, gate_SBF).mul_(gradient_SBF)
    of_up_SBF = silu(gate_SBF).mul_(gradient_SBF)
    return torch.stack([of_gate_SBF, of_up_SBF], dim=-1).flatten(-2)


def swiglu(product_SBX: Tensor) -> Tensor:
    """silu(gate)·up of a product whose columns are gate and up in turn.

    Args:
        product_SBX: [S, B, 2·F].

    Returns:
        [S, B, F].

    Source: Shazeer (arXiv 2002.05202).
    """
    return _OfOneTensor.apply(product_SBX, gated, gated_gradient)
