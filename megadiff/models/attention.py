"""Core attention and normalisation that sequence parallelism may use.

Megatron-Core's own local modules are causal-minded: its attention fixes the mask at construction and its norms refuse
sequence parallelism. These two do the arithmetic only; `SelfAttention`, its projections and its rotary phases stay
Megatron-Core's. Who may see whom arrives with every call as an `AttentionLayout`, through Megatron's
`attention_bias` argument: that is the one route that survives pipelining and activation recomputation.

Shapes: S model length, B micro-batch, N query heads of this rank, G key-value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from megadiff.diffusion.layout import AttentionLayout


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain; statistics in fp32.

    The constructor takes what Megatron's `build_module` passes for norms. Under sequence parallelism every rank sees
    other positions, so the gain is marked for Megatron to sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; any shape, result in the input's dtype."""
        x_fp32 = x.float()
        scale = torch.rsqrt(x_fp32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x_fp32 * scale * self.weight.float()).to(x.dtype)


class CoreAttention(nn.Module):
    """softmax(q kᵀ / √D) v over this rank's heads, by torch's scaled-dot-product attention.

    Communication: none. Heads are already divided over tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: None,
        /,
        *,
        attention_bias: AttentionLayout | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend as the layout says.

        Args:
            attention_bias: the `AttentionLayout`; None is bidirectional.

        Returns:
            [S, B, N·D].
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=attention_bias is not None and attention_bias.kind == "causal",
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)
