"""The matrices of a layer: which module multiplies by each, and what a gated feed-forward layer needs of its first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megadiff.models.fused import swiglu


@dataclass(frozen=True, kw_only=True)
class Linears:
    """What a layer is built of beside attention: modules, or specs of modules."""

    qkv: Any
    proj: Any
    fc1: Any
    fc2: Any
    fuses_norms: bool = False
    """Whether qkv and fc1 normalise what they multiply, so that the layer needs no norms of its own."""
    canonical_names: dict[str, str] = field(default_factory=dict)
    """How names of parameters begin in this layer, and how they begin in checkpoints."""


class Gated:
    """Before a column-parallel layer: silu(gate)·up of its product, [S, B, H] to [S, B, F].

    Rows of gate and up alternate. So a tensor-parallel rank holds a range of rows as of any other matrix, which every
    layout can save, load and initialise; Megatron's gated layers hold two ranges, of which the rest here knows nothing.

    Source: Shazeer (arXiv 2002.05202).
    """

    def __init__(self, input_size: int, output_size: int, **settings: Any) -> None:
        super().__init__(input_size, 2 * output_size, **settings)  # type: ignore[call-arg]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The product of both halves, and no bias."""
        product, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return swiglu(product), bias


class SwiGLU(Gated, ColumnParallelLinear):
    """Megatron's column-parallel layer, gated."""


def local_linears(*, is_gated: bool) -> Linears:
    """Megatron's own parallel layers, which run everywhere."""
    return Linears(
        qkv=ColumnParallelLinear,
        proj=RowParallelLinear,
        fc1=SwiGLU if is_gated else ColumnParallelLinear,
        fc2=RowParallelLinear,
    )
