"""Rotary phases, by which positions enter the model: made once per model call, and applied at the door of attention.

They take the route of the layout, Megatron's `attention_bias` argument, and go with it through pipelining and
recomputation. Megatron's own route would compute cosines anew for queries and keys of every layer, and turn by a dozen
kernels. Core attention turns what it is given before anything else: before context-parallel ranks gather keys, and
before a cache keeps them.

Shapes: S model length, B micro-batch, N query heads, G key-value heads, D head size, P = D/2 pairs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megadiff.models.attention import CoreAttention
from megadiff.models.fused import rotate
from megadiff.models.te_attention import TransformerEngineAttention

if TYPE_CHECKING:
    from megadiff.diffusion.layout import AttentionLayout
    from megadiff.models.key_value_cache import CachedAttention


@dataclass(frozen=True, eq=False)
class PhasedLayout:
    """What core attention is told in a model call: who may see whom, and the phases of the places of this rank."""

    layout: AttentionLayout | CachedAttention
    cos_SB1P: Tensor
    sin_SB1P: Tensor

    @classmethod
    def of(
        cls, layout: AttentionLayout | CachedAttention, position_BS: Tensor, inverse_frequency_P: Tensor
    ) -> PhasedLayout:
        """The phases of these positions: angles, cosines and sines in fp32."""
        angle_SB1P = position_BS.t()[..., None, None].float() * inverse_frequency_P
        return cls(layout, angle_SB1P.cos(), angle_SB1P.sin())

    def phased(self, x_SBND: Tensor) -> Tensor:
        """Queries or keys with their phases."""
        return rotate(x_SBND, self.cos_SB1P, self.sin_SB1P)


class _Rotary:
    """Before a core attention: turns queries and keys, and hands on the layout."""

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, *others: Any, attention_bias: PhasedLayout, **settings: Any
    ) -> Tensor:
        """Attend as the layout says, with the phases of the positions; see `CoreAttention.forward`."""
        turned = attention_bias.phased(query_SBND), attention_bias.phased(key_SBGD)
        return super().forward(*turned, *others, attention_bias=attention_bias.layout, **settings)  # type: ignore[misc]


class RotaryCoreAttention(_Rotary, CoreAttention):  # type: ignore[misc]
    """torch's attention of queries and keys with phases."""


class RotaryTransformerEngineAttention(_Rotary, TransformerEngineAttention):  # type: ignore[misc]
    """Transformer Engine's attention of queries and keys with phases."""
