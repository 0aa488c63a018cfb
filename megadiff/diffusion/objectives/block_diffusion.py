"""Block diffusion: autoregressive over blocks of tokens, masked diffusion inside each block.

The model reads the sample twice, [noised | clean]: a noised block sees itself and the clean blocks before it, so that
one pass gives the loss of every block under its true context. Block size 1 is autoregressive, block size L plain masked
diffusion (with a clean half that nobody looks at).

Source: Arriola et al., "Block diffusion: interpolating between autoregressive and diffusion language models"
(arXiv 2503.09573), §3 and appendix B.6–B.7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.masking import Masking
from megadiff.diffusion.rows import NoisedBatch
from megadiff.diffusion.samples import Samples, random_lengths


def doubled_length(num_tokens: int, block_size: int) -> int:
    """Return S = 2L for samples of L = `num_tokens` tokens in blocks.

    Raises:
        ValueError: If the samples do not divide into blocks.
    """
    if block_size < 1 or num_tokens % block_size:
        raise ValueError(
            f"block_size must be a positive divisor of the {num_tokens} tokens of a sample, got {block_size}; "
            "change either."
        )
    return 2 * num_tokens


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionObjective:
    """A noised and a clean copy of the sample, one level or count per block, prediction in place."""

    masking: Masking
    """How hidden tokens are chosen, and what they weigh; every block is a group."""
    block_size: int
    """Tokens of a block, a divisor of L."""
    random_length_fraction: float = 0.0
    """Share of the training samples that are cut to a random length."""

    def sequence_length(self, num_tokens: int) -> int:
        """Return 2L; see `doubled_length`."""
        return doubled_length(num_tokens, self.block_size)

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Hide tokens of the first copy and build its rows; see `Objective.noised_batch`.

        Validation hides exact counts. Rows of the second copy, which is context, have no weight and do not count.

        Raises:
            ValueError: If the samples do not divide into blocks.
        """
        place_S = torch.arange(self.sequence_length(samples.length), device=samples.device)
        if not validation:
            samples = samples.shortened_at_random(self.random_length_fraction, seed)
        masking = self.masking.exact if validation else self.masking
        masked = masking.masked(samples, self.block_size, seed, validation=validation)
        noised_BS = torch.cat([masked.noised_BL, samples.tokens_BL], dim=1)
        document_BL = samples.document_BL
        return NoisedBatch(
            noised_BS=noised_BS,
            position_BS=samples.position_BL.repeat(1, 2),
            layout=AttentionLayout(
                "block_diffusion",
                None if document_BL is None else document_BL.repeat(1, 2),
                block_size=self.block_size,
                query_Q=place_S,
                key_K=place_S,
            ),
            rows=masking.rows(
                samples.tokens_BL.repeat(1, 2),
                _followed_by(masked.elbo_weight_BL, 0.0),
                _followed_by(samples.counted_BL, False),
            ),
            log_snr_BS=_followed_by(masked.log_snr_BL, masking.schedule.max_log_snr),
        )

    def count_active_rows(
        self,
        ordinal_B: Tensor,
        num_tokens: int,
        seed: int,
        *,
        validation: bool = False,
        index_S: Tensor | None = None,
    ) -> int | None:
        """Count the hidden tokens of the first copy; see `Objective.count_active_rows`."""
        fraction = 0.0 if validation else self.random_length_fraction
        length_B = random_lengths(ordinal_B, num_tokens, fraction, seed)
        index_L = None if index_S is None else index_S[index_S < num_tokens]
        masking = self.masking.exact if validation else self.masking
        return masking.count(
            ordinal_B, length_B, num_tokens, self.block_size, seed, validation=validation, index_S=index_L
        )


def _followed_by(first_BL: Tensor, value: float) -> Tensor:
    """Return a tensor of the noised copy with a constant for the clean one, [B, 2L]."""
    return torch.cat([first_BL, torch.full_like(first_BL, value)], dim=1)
