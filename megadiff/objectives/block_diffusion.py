"""Settings of block diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import BlockDiffusionObjective
from megadiff.diffusion.objectives.block_diffusion import doubled_length
from megadiff.objectives.base import MaskFeature, Vocabulary
from megadiff.objectives.masked import MaskedConfig


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(MaskedConfig):
    """Autoregressive over blocks, masked diffusion inside each (arXiv 2503.09573)."""

    name: Literal["block_diffusion"] = "block_diffusion"
    block_size: int = 16
    """Tokens of a block, a divisor of data.sequence_length: 1 is autoregressive, data.sequence_length plain masked
    diffusion."""

    def build(self, vocabulary: Vocabulary) -> BlockDiffusionObjective:
        """The objective over a vocabulary."""
        return BlockDiffusionObjective(
            masking=self.build_masking(vocabulary),
            block_size=self.block_size,
            random_length_fraction=self.random_length_fraction,
        )

    def model_length(self, num_tokens: int) -> int:
        """S = 2L.

        Raises:
            ValueError: the samples do not divide into blocks.
        """
        return doubled_length(num_tokens, self.block_size)

    def mask_features(self, *, documents: bool, prompts: bool) -> frozenset[MaskFeature]:
        """Blocks, and what every objective has."""
        return super().mask_features(documents=documents, prompts=prompts) | {"block diffusion"}
