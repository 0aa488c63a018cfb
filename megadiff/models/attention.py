"""Core attention and normalisation that sequence parallelism may use.

Megatron-Core's own local modules are causal-minded: its attention fixes the mask at construction and its norms refuse
sequence parallelism. These two do the arithmetic only; `SelfAttention` and its projections stay Megatron-Core's. Who
may see whom arrives with every call as an `AttentionLayout`, through Megatron's `attention_bias` argument: that is the
one route that survives pipelining and activation recomputation. Rotary phases come with it and have been applied by
then (`megadiff.models.rotary`).

Shapes: S model length, B micro-batch, N query heads of this rank, G key-value heads of this rank, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from megadiff.models.key_value_cache import CachedAttention

if TYPE_CHECKING:
    from megadiff.diffusion.layout import AttentionLayout


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain; statistics in fp32.

    torch computes it in fp32 and rounds once, on CUDA in one fused kernel, which leaves nothing for Apex or Transformer
    Engine to add.

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
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@functools.cache
def _block_masked_attention() -> Callable[..., Tensor]:
    """FlexAttention, which skips blocks of keys that nobody may see; a kernel only when compiled.

    Packed documents so cost about the squares of their lengths, not that of the sequence's. It has no backward on CPUs.
    """
    return torch.compile(flex_attention)


class CoreAttention(nn.Module):
    """softmax(q kᵀ / √D) v over this rank's heads and queries, by torch's scaled-dot-product attention.

    Communication: none for heads, which are already divided over tensor-parallel ranks. Over context-parallel ranks
    keys and values are gathered in one all-gather of 2·S·B·G·D elements, and their gradients reduce-scattered. Queries
    stay where they are, so any number of heads divides over any number of ranks; with grouped-query attention the
    gathered part is the small one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.cp_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "context parallelism needs its process group"
            self.cp_group = pg_collection.cp

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: None,
        /,
        *,
        attention_bias: AttentionLayout | CachedAttention | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend as the layout says.

        Args:
            attention_bias: the `AttentionLayout`; None is bidirectional. In cached decoding, what is seen there.

        Returns:
            [S, B, N·D].
        """
        if self.cp_group is not None:
            # all-gather over cp, [S, B, G, 2·D]; reduce-scatter backward
            key_value = gather_from_sequence_parallel_region(
                torch.cat([key_SBGD, value_SBGD], dim=-1), tensor_parallel_output_grad=True, group=self.cp_group
            )
            key_SBGD, value_SBGD = key_value.chunk(2, dim=-1)
        if isinstance(attention_bias, CachedAttention):
            key_SBGD, value_SBGD = attention_bias.with_kept(self.layer_number, key_SBGD, value_SBGD)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        context = self._attend(query, key, value, attention_bias)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout | CachedAttention | None
    ) -> Tensor:
        """Attention of [B, N, Q, D] on [B, G, K, D], by the kernel that the layout and the device ask for."""
        shared: dict[str, Any] = {"scale": self.softmax_scale, "enable_gqa": query.shape[1] != key.shape[1]}
        if isinstance(layout, CachedAttention):
            return scaled_dot_product_attention(query, key, value, attn_mask=layout.visible_QK, **shared)
        if layout is None or layout.is_plain:
            causal = layout is not None and layout.kind == "causal"
            return scaled_dot_product_attention(query, key, value, is_causal=causal, **shared)
        if query.is_cuda:
            return _block_masked_attention()(query, key, value, block_mask=layout.block_mask, **shared)
        return scaled_dot_product_attention(query, key, value, attn_mask=layout.visible_BQK[:, None], **shared)
