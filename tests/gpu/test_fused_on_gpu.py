"""Fused pieces of a layer on a GPU, compiled: one rounding from their definition, and one kernel each."""

from __future__ import annotations

import pytest
import torch
from models.fused_cases import PIECES, assert_exact_to_rounding, value_and_gradient
from torch.profiler import ProfilerActivity, profile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", PIECES)
def test_a_kernel_rounds_once(name: str) -> None:
    assert_exact_to_rounding(PIECES[name], "cuda", torch.bfloat16, roundings=1.1)


@pytest.mark.parametrize("name", PIECES)
def test_fp32_is_exact_to_its_rounding(name: str) -> None:
    assert_exact_to_rounding(PIECES[name], "cuda", torch.float32, roundings=8)


@pytest.mark.parametrize("name", PIECES)
def test_one_kernel_forward_and_one_backward(name: str) -> None:
    piece = PIECES[name]
    x, *constants = (tensor.cuda() for tensor in piece.inputs(40, 3))
    x = x.bfloat16().requires_grad_()
    gradient = torch.ones_like(piece.fused(x, *constants))
    value_and_gradient(piece.fused, x, *constants)  # compiles both
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.autograd.grad(piece.fused(x, *constants), x, gradient)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels
