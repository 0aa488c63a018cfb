"""Decoding that computes finished tokens once: their keys and values are kept, and later calls see them.

Of whole sequences, by local attention. What a call sees takes the route of an `AttentionLayout`, Megatron's
`attention_bias` argument, in its place. Keys have been given their rotary phases by then, so kept ones need none. A
rank keeps those of its own heads and layers.

Shapes: B samples, Q new places of a call, K all places that it sees, S = Q, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megadiff.models.whole import WholeDenoiser


@dataclass(eq=False)
class KeyValueCache:
    """Keys and values that calls have kept."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By the number of the layer, [S, B, G, D] each."""
    num_kept: int = 0
    """Places that every layer has kept."""


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """The visibility rule of a call whose places see all that is kept, and each other by block."""

    cache: KeyValueCache
    block_Q: Tensor
    """A new place sees those new places whose number here is not above its own; int64."""
    num_kept: int
    """How many of the new places, the first ones, the call keeps."""

    @cached_property
    def visible_QK(self) -> Tensor:
        """Which new places see which keys, kept ones first, bool; made once for all layers."""
        sees_all_QK = self.block_Q.new_ones(len(self.block_Q), self.cache.num_kept, dtype=torch.bool)
        return torch.cat([sees_all_QK, self.block_Q <= self.block_Q[:, None]], dim=1)

    def with_kept(self, layer_number: int, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Return kept and new keys and values of a layer, [K, B, G, D] each, and keep what the call keeps."""
        before = self.cache.kept.get(layer_number)
        if before is not None:
            key_SBGD, value_SBGD = (torch.cat(pair) for pair in zip(before, (key_SBGD, value_SBGD), strict=True))
        num_kept = self.cache.num_kept + self.num_kept
        self.cache.kept[layer_number] = (key_SBGD[:num_kept], value_SBGD[:num_kept])
        return key_SBGD, value_SBGD


class CachedDecoder:
    """A denoiser that remembers finished tokens: `megadiff.diffusion.Decode`, from its first call on."""

    def __init__(self, denoiser: WholeDenoiser) -> None:
        """Begin without memories."""
        self._denoiser = denoiser
        self._cache = KeyValueCache()

    def __call__(
        self, ids_BQ: Tensor, position_BQ: Tensor, block_Q: Tensor, num_kept: int, log_snr_BQ: Tensor | None = None
    ) -> Tensor:
        """Logits [B, Q, V] at new places; see `megadiff.diffusion.Decode`."""
        seen = CachedAttention(self._cache, block_Q, num_kept)
        logits_BQV = self._denoiser(ids_BQ, position_BQ, seen, log_snr_BQ)
        self._cache.num_kept += num_kept
        return logits_BQV
