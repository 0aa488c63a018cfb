"""Duo: uniform-state diffusion with the mask among the states, and its Gaussian curriculum.

Source: Sahoo et al., "The diffusion duality" (arXiv 2506.10892); trained on the bound throughout, without curriculum,
in "Scaling beyond masked diffusion language models" (arXiv 2602.15014).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadiff.diffusion.gaussian import GaussianCurriculum
from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.noising import NoisedRows, NoiseRows, noise_rows, sequence_log_snr, sequence_time
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.rows import NoisedBatch, Rows
from megadiff.diffusion.samples import Samples
from megadiff.philox import VALIDATION_OFFSET


@dataclass(frozen=True)
class DuoObjective:
    """One noise level per sequence, every token re-drawn on its own, prediction in place, trained on the bound itself.

    The published Rao-Blackwellised loss equals w/p·(KL + IS) at every point, hence the rows are those of any uniform
    noise.

    Raises:
        ValueError: If max_loss_weight is not positive, or random_length_fraction does not lie in [0, 1].
    """

    process: DiffusionProcess
    """The noise: uniform over all V ids."""
    max_loss_weight: float | None = None
    """Largest weight of a row in the training loss (not in the NELBO); None clips nothing, as published."""
    curriculum: GaussianCurriculum | None = None
    """Soft inputs at the beginning of training; None: discrete noise from the first sample on."""
    random_length_fraction: float = 0.0
    """Share of training samples that are cut to a random length."""
    noise: NoiseRows = noise_rows
    """What draws the noise: `noise_rows` or a fused version of it."""

    def __post_init__(self) -> None:
        if self.max_loss_weight is not None and not self.max_loss_weight > 0:
            raise ValueError(
                f"max_loss_weight must be positive or None, got {self.max_loss_weight}; None clips nothing."
            )
        if not 0.0 <= self.random_length_fraction <= 1.0:
            raise ValueError(
                f"random_length_fraction must lie in [0, 1], got {self.random_length_fraction}; published is 0.01."
            )

    def sequence_length(self, num_tokens: int) -> int:
        """Return L itself: the model reads one position per token."""
        return num_tokens

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Noise a batch and build its rows; see `Objective.noised_batch`."""
        if not validation:
            samples = samples.shortened_at_random(self.random_length_fraction, seed)
        purpose_offset = VALIDATION_OFFSET if validation else 0
        log_snr_B = sequence_log_snr(self.process.schedule, seed, samples.ordinal_B, purpose_offset)
        log_snr_BL = log_snr_B[:, None].to(samples.device)
        noised = self.noise(
            samples.tokens_BL,
            log_snr_BL,
            samples.ordinal_B.to(samples.device),
            samples.counted_BL,
            seed,
            self.process,
            validation=validation,
        )
        if self.curriculum is None or validation or not (covered_B := self.curriculum.covers(samples.ordinal_B)).any():
            return self._batch(samples, noised, log_snr_BL)
        return self._softened(samples, noised, log_snr_BL, covered_B, self.curriculum, seed)

    def _batch(self, samples: Samples, noised: NoisedRows, log_snr_BL: Tensor) -> NoisedBatch:
        """Put the rows of a noise, whose levels are [B, L] or [B, 1], and what the model reads into one."""
        noised_BL = samples.with_given_clean(noised.noised)
        weight_BL = noised.elbo_weight
        if self.max_loss_weight is not None:
            weight_BL = weight_BL.clamp(max=self.max_loss_weight)
        rows = Rows(
            target=samples.tokens_BL,
            noised=noised_BL,
            alpha=noised.alpha,
            uniform_mass=noised.uniform_mass,
            kl_weight=weight_BL,
            is_weight=weight_BL,
            elbo_weight=noised.elbo_weight,
            counted=samples.counted_BL,
            any_uniform_mass=True,
        )
        return NoisedBatch(
            noised_BS=noised_BL,
            position_BS=samples.position_BL,
            layout=AttentionLayout("bidirectional", samples.document_BL),
            rows=rows,
            log_snr_BS=samples.with_given_levels(log_snr_BL, self.process.schedule.max_log_snr),
        )

    def _softened(
        self,
        samples: Samples,
        discrete: NoisedRows,
        discrete_log_snr_BL: Tensor,
        covered_B: Tensor,
        curriculum: GaussianCurriculum,
        seed: int,
    ) -> NoisedBatch:
        """Noise the samples that the curriculum covers by the argmax of Gaussians; all inputs become mixtures.

        The rows are those of discrete noise at α = T(γ), weighted for the density of α that the straight path of γ has:
        −α'/(α(1 − α)) takes the place of 1/p.
        """
        device, tokens_BL = samples.device, samples.tokens_BL
        gamma_B, alpha_B, slope_B = curriculum.level(sequence_time(seed, samples.ordinal_B))
        log_snr_BL = torch.logit(alpha_B)[:, None].to(device)
        inverse_pdf_BL = (-slope_B / (alpha_B * (1.0 - alpha_B)))[:, None].to(device)
        drawn = curriculum.draw(tokens_BL, gamma_B.to(device), samples.ordinal_B.to(device), seed)
        loss_weight_BL = self.process.loss_weight(log_snr_BL, tokens_BL, drawn.noised_BL).where(samples.counted_BL, 0.0)

        covered_BL = covered_B[:, None].to(device)
        noised = NoisedRows(
            noised=torch.where(covered_BL, drawn.noised_BL, discrete.noised),
            alpha=torch.where(covered_BL, self.process.alpha(log_snr_BL).float(), discrete.alpha),
            uniform_mass=torch.where(covered_BL, self.process.uniform_mass(log_snr_BL).float(), discrete.uniform_mass),
            loss_weight=torch.where(covered_BL, loss_weight_BL.float(), discrete.loss_weight),
            elbo_weight=torch.where(covered_BL, (loss_weight_BL * inverse_pdf_BL).float(), discrete.elbo_weight),
        )
        batch = self._batch(samples, noised, torch.where(covered_BL, log_snr_BL, discrete_log_snr_BL))
        is_soft_BL1 = (covered_BL if samples.given_BL is None else covered_BL & ~samples.given_BL)[..., None]
        first_K = (torch.arange(drawn.ids_BLK.shape[-1], device=device) == 0).float()
        return replace(
            batch,
            soft_ids_BSK=torch.where(is_soft_BL1, drawn.ids_BLK, batch.noised_BS[..., None]),
            soft_weights_BSK=torch.where(is_soft_BL1, drawn.weights_BLK, first_K),
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
        """Return None: under uniform noise every row weighs something."""
        return None
