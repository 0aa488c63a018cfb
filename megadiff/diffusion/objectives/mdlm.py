"""Masked diffusion in time form: some tokens are hidden, the model names them, clean ones are carried over.

Source: Sahoo et al., "Simple and effective masked diffusion language models" (arXiv 2406.07524); the weight 1 in
training from Sahoo et al. (arXiv 2602.15014).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.masking import Masking
from megadiff.diffusion.rows import NoisedBatch
from megadiff.diffusion.samples import Samples, random_lengths


@dataclass(frozen=True, kw_only=True)
class MdlmObjective:
    """Hidden tokens anywhere in the sample, attention both ways, prediction in place."""

    masking: Masking
    """How hidden tokens are chosen, and what they weigh; the sample is one group."""
    random_length_fraction: float = 0.0
    """Share of the training samples that are cut to a random length."""

    def sequence_length(self, num_tokens: int) -> int:
        """Return L itself: the model reads one position per token."""
        return num_tokens

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Hide tokens, in validation exact counts of them, and build their rows; see `Objective.noised_batch`."""
        if not validation:
            samples = samples.shortened_at_random(self.random_length_fraction, seed)
        masking = self.masking.exact if validation else self.masking
        masked = masking.masked(samples, samples.length, seed, validation=validation)
        return NoisedBatch(
            noised_BS=masked.noised_BL,
            position_BS=samples.position_BL,
            layout=AttentionLayout("bidirectional", samples.document_BL),
            rows=masking.rows(samples.tokens_BL, masked.elbo_weight_BL, samples.counted_BL),
            log_snr_BS=masked.log_snr_BL,
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
        """Count the hidden tokens; see `Objective.count_active_rows`."""
        fraction = 0.0 if validation else self.random_length_fraction
        length_B = random_lengths(ordinal_B, num_tokens, fraction, seed)
        masking = self.masking.exact if validation else self.masking
        return masking.count(ordinal_B, length_B, num_tokens, num_tokens, seed, validation=validation, index_S=index_S)
