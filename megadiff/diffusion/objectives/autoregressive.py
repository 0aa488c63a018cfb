"""Autoregressive cross-entropy: the baseline of every table, with the model, the head and the loss of the others.

Every position reads the token before it and predicts its own. So a sample of L tokens has L targets, rows stay where
their targets are, and the loss is −log p(x) itself: a bound without a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.rows import NoisedBatch, cross_entropy_rows
from megadiff.diffusion.samples import Samples, random_lengths, shifted_inputs


@dataclass(frozen=True, kw_only=True)
class AutoregressiveObjective:
    """Next-token prediction under causal attention; every document begins after a BOS of its own."""

    mask_id: int
    bos_id: int
    random_length_fraction: float = 0.0
    """Share of the training samples that are cut to a random length."""

    def sequence_length(self, num_tokens: int) -> int:
        """Return L itself: the model reads one position per token."""
        return num_tokens

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Build inputs and rows; nothing is noised. See `Objective.noised_batch`."""
        if not validation:
            samples = samples.shortened_at_random(self.random_length_fraction, seed)
        weight_BL = samples.counted_BL.float()
        return NoisedBatch(
            noised_BS=shifted_inputs(samples.tokens_BL, self.bos_id, samples.document_BL),
            position_BS=samples.position_BL,
            layout=AttentionLayout("causal", samples.document_BL),
            rows=cross_entropy_rows(
                samples.tokens_BL, samples.counted_BL, self.mask_id, weight_BS=weight_BL, elbo_weight_BS=weight_BL
            ),
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
        """Count the tokens that are not cut off: all of them weigh something. See `Objective.count_active_rows`."""
        fraction = 0.0 if validation else self.random_length_fraction
        index_S = torch.arange(num_tokens) if index_S is None else index_S
        length_B = random_lengths(ordinal_B, num_tokens, fraction, seed)
        return int((index_S < length_B[:, None]).sum())
