"""Transformer Engine's linear layers, with norms inside them, and FP8 products where Megatron opens an FP8 context.

Modules of Megatron's extension as they are, up to three things. Their extra state, scales of FP8 in a pickle, stays out
of checkpoints, which hold the same tensors under the same names whoever computes: with recipe delayed, a resumed run
begins its history of maxima anew, as every run does. Their products add weight gradients into the fp32 buffer that
Megatron's `DistributedDataParallel` provides, without which they cannot be trained. And gated layers hold gate and up
row by row, as everywhere here.

Imported where they are asked for: the extension's classes need the package.
"""

from __future__ import annotations

import functools
from typing import Any

from megadiff.models.linears import Gated, Linears

CANONICAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where fused norms keep their gains, and under which names checkpoints have them."""


class _Layer:
    """Before a module of Transformer Engine's: it has parameters and no other state, and accumulates their gradients.

    Megatron's setting for the latter, `gradient_accumulation_fusion`, is one for all layers, and its own need Apex for
    it; Transformer Engine's products can do it in any case.
    """

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.fuse_wgrad_accumulation = True

    def get_extra_state(self) -> None:
        """Nothing."""

    def set_extra_state(self, state: Any) -> None:
        """Nothing is taken from checkpoints, whatever they hold."""


@functools.cache
def transformer_engine_linears(*, is_gated: bool) -> Linears:
    """Fused norm and column-parallel layer, and row-parallel layer, of the installed Transformer Engine.

    The same classes at every call.
    """
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    class NormAndColumn(_Layer, TELayerNormColumnParallelLinear):  # type: ignore[misc]
        """RMS norm and product with a matrix whose rows are divided."""

    class NormAndSwiGLU(Gated, NormAndColumn):
        """The same, and silu(gate)·up."""

    class Row(_Layer, TERowParallelLinear):  # type: ignore[misc]
        """Product with a matrix whose columns are divided."""

    return Linears(
        qkv=NormAndColumn,
        proj=Row,
        fc1=NormAndSwiGLU if is_gated else NormAndColumn,
        fc2=Row,
        fuses_norms=True,
        canonical_names=CANONICAL_NAMES,
    )
