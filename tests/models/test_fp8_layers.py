"""Divided linear layers with FP8 products: what each rank computes is its part of what one process computes.

Their inputs are equal to the bit, so that nothing is rounded to another FP8 number: differences are those of sums in
another order, and a maximum over a part would be 10 000 times as much.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

TOLERANCE = 1e-6
LENGTH, BATCH, NARROW, WIDE = 8, 3, 24, 40


def tensor(seed: int, *shape: int) -> Tensor:
    """Normal numbers with one outlier, so that parts have other maxima than the whole."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[seed] = 9.0
    return x


def run_linears(tensor_size: int, context: int, sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    """Outputs and gradients of a column- and a row-parallel layer, put together over the ranks."""
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import transformer_config
    from megadiff.models.fp8_emulation import EmulatedColumnParallelLinear, EmulatedRowParallelLinear, Emulation
    from megadiff.models.weights import draw_nothing
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(
        parallel_groups.ParallelConfig(
            tensor_model_parallel_size=tensor_size,
            context_parallel_size=context,
            sequence_parallel=sequence_parallel,
        )
    )
    settings: dict[str, Any] = {
        "config": transformer_config(DenoiserConfig(), groups.config, torch.float32),
        "init_method": draw_nothing,
        "bias": False,
        "skip_bias_add": True,
        "tp_group": groups.tp,
        "emulation": Emulation(fp8_format="hybrid", amax_group=groups.collection.tp_cp),
    }
    column = EmulatedColumnParallelLinear(NARROW, WIDE, gather_output=False, **settings)
    row = EmulatedRowParallelLinear(WIDE, NARROW, input_is_parallel=True, **settings)

    def share(x: Tensor, dim: int, divided: bool) -> Tensor:
        return x.chunk(tensor_size, dim)[groups.tp.rank()].clone() if divided else x.clone()

    def together(x: Tensor, group: Any, dim: int) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    found = {}
    for name, layer, of_weight, of_input, of_output in (
        ("column", column, 0, None, -1),
        ("row", row, 1, -1, None),
    ):
        narrow, wide = (NARROW, WIDE) if name == "column" else (WIDE, NARROW)
        x, grad, weight = tensor(0, LENGTH, BATCH, narrow), tensor(1, LENGTH, BATCH, wide), tensor(2, wide, narrow)
        x, grad = (whole.chunk(context)[groups.cp.rank()] for whole in (x, grad))
        # Between the matrices positions are divided with sequence parallelism; else columns, or nothing.
        dims = [0 if sequence_parallel and dim is None else dim for dim in (of_input, of_output)]
        x, grad = (share(whole, dim or 0, dim is not None) for whole, dim in zip((x, grad), dims, strict=True))
        x.requires_grad_()
        layer.weight.data.copy_(share(weight, of_weight, True))
        y, _ = layer(x)
        y.backward(grad)
        torch.distributed.all_reduce(layer.weight.grad, group=groups.cp)
        parts = {"y": (y.detach(), dims[1]), "x": (x.grad, dims[0])}
        found[name] = {"weight": together(layer.weight.grad, groups.tp, of_weight)}
        for quantity, (part, dim) in parts.items():
            assert part is not None
            whole = part if dim is None else together(part, groups.tp, dim)
            found[name][quantity] = together(whole, groups.cp, 0)
    parallel_groups.shutdown()
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    [found] = run_ranks(1, run_linears, 1, 1, False)
    return found


@pytest.mark.parametrize("layout", [(2, 1, False), (2, 1, True), (1, 2, False)])
def test_parts_are_parts_of_the_whole(layout: tuple[int, int, bool], whole: dict[str, dict[str, Tensor]]) -> None:
    for found in run_ranks(2, run_linears, *layout):
        for layer, quantities in whole.items():
            for name, expected in quantities.items():
                error = (found[layer][name] - expected).abs().max() / expected.abs().max()
                assert error <= TOLERANCE, f"{layer} {name}: {error}"
