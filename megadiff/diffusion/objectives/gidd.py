"""Generalised interpolating discrete diffusion: masked, uniform and hybrid noise under one bound.

Source: von Rütte et al., "Generalized interpolating discrete diffusion" (arXiv 2503.04482), in the log-SNR
form of "Scaling behavior of discrete diffusion language models" (arXiv 2512.10858).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.noising import NoiseRows, noise_rows, sequence_log_snr
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.rows import NoisedBatch, Rows
from megadiff.diffusion.samples import Samples
from megadiff.philox import VALIDATION_OFFSET


@dataclass(frozen=True)
class GiddObjective:
    """One noise level per sequence, every token noised on its own, prediction in place.

    Raises:
        ValueError: If the weighting is unknown, or beta_is_div is negative or not finite.
    """

    process: DiffusionProcess
    """The noise."""
    loss_weighting: Literal["gidd", "nelbo"] = "gidd"
    """`gidd`: w, the published training loss; `nelbo`: w/p(λ), the bound itself."""
    beta_is_div: float = 1.0
    """Factor on the Itakura-Saito term of the training loss (not of the NELBO)."""
    noise: NoiseRows = noise_rows
    """What draws the noise: `noise_rows` or a fused version of it."""

    def __post_init__(self) -> None:
        if self.loss_weighting not in ("gidd", "nelbo"):
            raise ValueError(
                f"loss_weighting must be 'gidd' or 'nelbo', got {self.loss_weighting!r}; pick one of the two."
            )
        if not (math.isfinite(self.beta_is_div) and self.beta_is_div >= 0):
            raise ValueError(f"beta_is_div must be finite and not negative, got {self.beta_is_div}; published is 1.")

    @property
    def name(self) -> str:
        return "gidd"

    def sequence_length(self, num_tokens: int) -> int:
        """Return L itself: the model reads one position per token."""
        return num_tokens

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Noise a batch and build its rows; see `Objective.noised_batch`."""
        process = self.process
        tokens_BL, counted_BL = samples.tokens_BL, samples.counted_BL
        ordinal_B = samples.ordinal_B.to(samples.device)
        log_snr_BL = self._log_snr_B1(samples.ordinal_B, seed, validation).to(samples.device)
        noised = self.noise(tokens_BL, log_snr_BL, ordinal_B, counted_BL, seed, process, validation=validation)
        noised_BL = noised.noised
        if samples.given_BL is not None:  # their weights are 0, since they do not count
            noised_BL = torch.where(samples.given_BL, tokens_BL, noised_BL)
        weight_BL = noised.loss_weight if self.loss_weighting == "gidd" else noised.elbo_weight
        rows = Rows(
            target=tokens_BL,
            noised=noised_BL,
            alpha=noised.alpha,
            uniform_mass=noised.uniform_mass,
            kl_weight=weight_BL,
            is_weight=self.beta_is_div * weight_BL,
            elbo_weight=noised.elbo_weight,
            counted=counted_BL,
            any_uniform_mass=process.any_uniform_mass,
        )
        return NoisedBatch(
            noised_BS=noised_BL,
            position_BS=samples.position_BL,
            layout=AttentionLayout("bidirectional", samples.document_BL),
            rows=rows,
            log_snr_BS=log_snr_BL.expand(tokens_BL.shape),
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
        """Count the masked tokens where all noise is the mask; see `Objective.count_active_rows`.

        Without uniform noise a kept token has the weight s·(…) = 0 exactly. With it every row may weigh something.
        Masked are all tokens of the batch's own noise, and one more in 4e9: the level is taken a hair noisier, so that
        the bound holds on a device whose exponential differs from the CPU's in the last bits.
        """
        process = self.process
        if process.any_uniform_mass:
            return None
        log_snr_BL = self._log_snr_B1(ordinal_B, seed, validation) - 1e-9
        any_token = 0 if process.mixing.mask_id != 0 else 1
        position_S = torch.arange(num_tokens) if index_S is None else index_S
        tokens_BS = torch.full((len(ordinal_B), len(position_S)), any_token, device=ordinal_B.device)
        counted_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        noised = self.noise(
            tokens_BS,
            log_snr_BL,
            ordinal_B,
            counted_BS,
            seed,
            process,
            validation=validation,
            position_L=position_S.to(ordinal_B.device),
        )
        return int((noised.noised == process.mixing.mask_id).sum())

    def _log_snr_B1(self, ordinal_B: Tensor, seed: int, validation: bool) -> Tensor:
        """Return the level of each sequence, float64 [B, 1]."""
        purpose_offset = VALIDATION_OFFSET if validation else 0
        return sequence_log_snr(self.process.schedule, seed, ordinal_B, purpose_offset)[:, None]
