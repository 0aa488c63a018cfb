"""Fused pieces of a layer: exact, frugal in what they keep, and such that torch can compile them."""

from __future__ import annotations

import pytest
import torch
from models.fused_cases import PIECES, assert_exact_to_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    """Products that cancel round as the products do; on a CPU some pieces round between their operators, too."""
    assert_exact_to_rounding(PIECES[name], "cpu", dtype, roundings=8)


def test_rotation_rounds_once() -> None:
    """Half a unit in the last place of bf16, where rounded cosines would cost several."""
    assert_exact_to_rounding(PIECES["rotate"], "cpu", torch.bfloat16, roundings=1.01)


@pytest.mark.parametrize("name", PIECES)
def test_no_more_is_kept_than_said(name: str) -> None:
    x, *constants = PIECES[name].inputs(5, 2)
    x.requires_grad_()
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PIECES[name].fused(x, *constants)
    assert kept == [tensor.data_ptr() for tensor in (x, *constants)[PIECES[name].keeps]]


@pytest.mark.parametrize("name", PIECES)
def test_torch_compiles_each_kernel_whole_and_not_for_every_size(name: str) -> None:
    """Sizes of training, validation and a growing text: two compilations, and two for what is 1 long."""
    piece, sizes = PIECES[name], [(8, 4), (6, 3), (5, 2), (9, 7), (4, 3), (1, 3), (7, 1), (11, 1), (1, 5)]
    forward, backward = piece.kernels
    for kernel in piece.kernels:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(kernel.__wrapped__, backend=counter, fullgraph=True)
        for size in sizes:
            inputs = piece.inputs(*size)
            if kernel is backward:
                inputs = (torch.randn_like(forward(*inputs)), *inputs[piece.keeps])
            torch.testing.assert_close(compiled(*inputs), kernel(*inputs), rtol=1e-6, atol=1e-6)
        assert counter.frame_count <= 4
