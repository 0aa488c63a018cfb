"""The fused pieces of a layer with their definitions, for tests on CPUs and on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadiff.models import fused


class Piece(NamedTuple):
    """A fused piece of one differentiable tensor."""

    fused: Callable[..., Tensor]
    defined: Callable[..., Tensor]
    """The same in other words, for float64."""
    kernels: tuple[Any, Any]
    """What is compiled: forward of the inputs, and backward of a gradient and what is kept."""
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    """From a length and a batch size, float32: the differentiable tensor, and constants."""
    keeps: slice
    """Which inputs are kept from forward to backward."""


def turned_numbers(x_SBND: Tensor, cos_SB1P: Tensor, sin_SB1P: Tensor) -> Tensor:
    """Pairs as complex numbers, times numbers on the unit circle."""
    product = torch.complex(*x_SBND.chunk(2, dim=-1)) * torch.complex(cos_SB1P, sin_SB1P)
    return torch.cat([product.real, product.imag], dim=-1)


def heads_and_phases(length: int, batch_size: int) -> tuple[Tensor, ...]:
    """Heads as a slice of what a matrix returns, and phases of positions up to 3·length."""
    x_SBND = torch.randn(length, batch_size, 3, 24, generator=torch.Generator().manual_seed(0))[..., 8:]
    positions = torch.arange(3 * length)[::3, None].expand(length, batch_size)
    angle_SB1P = positions[..., None, None] * 100.0 ** (-torch.arange(8) / 8)
    return x_SBND, angle_SB1P.cos(), angle_SB1P.sin()


def wide(length: int, batch_size: int) -> tuple[Tensor, ...]:
    """What a feed-forward layer's first matrix returns."""
    return (torch.randn(length, batch_size, 24, generator=torch.Generator().manual_seed(0)),)


def silu_times(product_SBX: Tensor) -> Tensor:
    """Even columns through SiLU, times odd ones."""
    gate, up = product_SBX[..., ::2], product_SBX[..., 1::2]
    return gate / (1 + torch.exp(-gate)) * up


PIECES = {
    "rotate": Piece(
        fused.rotate, turned_numbers, (fused.turned, fused.turned_back), heads_and_phases, keeps=slice(1, 3)
    ),
    "squared_relu": Piece(
        fused.squared_relu,
        lambda x: torch.where(x > 0, x**2, 0.0),
        (fused.squared, fused.squared_gradient),
        wide,
        keeps=slice(0, 1),
    ),
    "swiglu": Piece(fused.swiglu, silu_times, (fused.gated, fused.gated_gradient), wide, keeps=slice(0, 1)),
}


def value_and_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """A piece of its inputs, and the gradient of a sum of it, weighted at random, over the first of them."""
    x = inputs[0].detach().requires_grad_()
    value = function(x, *inputs[1:])
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(value)
    return [value.detach(), *torch.autograd.grad(value, x, weight)]


def assert_exact_to_rounding(piece: Piece, device: str, dtype: torch.dtype, *, roundings: float) -> None:
    """Hold value and gradient against the definition in float64.

    Args:
        roundings: how many roundings to `dtype` an element may be off by, counted as those of 1 where it is smaller.
    """
    x, *constants = (tensor.to(device) for tensor in piece.inputs(40, 3))
    x = x.to(dtype)
    ours = value_and_gradient(piece.fused, x, *constants)
    exact = value_and_gradient(piece.defined, *(tensor.double() for tensor in (x, *constants)))
    for result, reference in zip(ours, exact, strict=True):
        assert result.dtype == dtype and result.shape == reference.shape
        allowed = roundings * torch.finfo(dtype).eps / 2
        assert ((result.double() - reference).abs() <= allowed * reference.abs().clamp(min=1.0)).all()
