"""Generalised interpolating discrete diffusion: masked, uniform and hybrid noise under one bound.

Source: von Rütte et al., "Generalized interpolating discrete diffusion" (arXiv 2503.04482), in the log-SNR
form of "Scaling behavior of discrete diffusion language models" (arXiv 2512.10858).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from megadiff.diffusion.augment import Augmentation
from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.noising import NoiseRows, noise_rows, sequence_log_snr, token_log_snr
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.rows import NoisedBatch, Rows
from megadiff.diffusion.samples import Samples
from megadiff.philox import VALIDATION_OFFSET, WORD_RANGE, Purpose, random_words


@dataclass(frozen=True)
class GiddObjective:
    """Every token noised on its own, at the level of its sequence or at one of its own; prediction in place.

    Levels of their own, or linear in the position, make training another mixture of contexts than the bound has;
    validation always has one level per sequence, and no augmentation.

    Raises:
        ValueError: If the weighting is unknown, or a number out of range.
    """

    process: DiffusionProcess
    """The noise."""
    loss_weighting: Literal["gidd", "nelbo"] = "gidd"
    """`gidd`: w, the published training loss; `nelbo`: w/p(λ), the bound itself."""
    max_loss_weight: float | None = None
    """Cap on the training weight (not on the NELBO's); None: none."""
    beta_is_div: float = 1.0
    """Factor on the Itakura-Saito term of the training loss (not of the NELBO)."""
    independent_level_fraction: float = 0.0
    """Share of the training sequences in which every token has a level of its own."""
    linear_level_fraction: float = 0.0
    """Share of the training sequences whose noise rises with the position: token i of L has time (i + 1)/(L + 1)."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """What training does to the clean samples."""
    noise: NoiseRows = noise_rows
    """What draws the noise: `noise_rows` or a fused version of it."""

    def __post_init__(self) -> None:
        if self.loss_weighting not in ("gidd", "nelbo"):
            raise ValueError(
                f"loss_weighting must be 'gidd' or 'nelbo', got {self.loss_weighting!r}; pick one of the two."
            )
        if self.max_loss_weight is not None and not self.max_loss_weight > 0:
            raise ValueError(f"max_loss_weight must be positive, got {self.max_loss_weight}; None caps nothing.")
        if not (math.isfinite(self.beta_is_div) and self.beta_is_div >= 0):
            raise ValueError(f"beta_is_div must be finite and not negative, got {self.beta_is_div}; published is 1.")
        independent, linear = self.independent_level_fraction, self.linear_level_fraction
        if not (independent >= 0 and linear >= 0 and independent + linear <= 1):
            raise ValueError(
                "independent_level_fraction and linear_level_fraction must be shares whose sum is at most 1, got "
                f"{independent} and {linear}; the rest of the sequences have one level each."
            )

    def sequence_length(self, num_tokens: int) -> int:
        """Return L itself: the model reads one position per token."""
        return num_tokens

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Noise a batch and build its rows; see `Objective.noised_batch`."""
        process = self.process
        if not validation:
            samples = self.augmentation.augmented(samples, seed)
        tokens_BL, counted_BL = samples.tokens_BL, samples.counted_BL
        ordinal_B = samples.ordinal_B.to(samples.device)
        position_L = torch.arange(samples.length, device=samples.device)
        log_snr_BL = self._log_snr(samples.ordinal_B, position_L, samples.length, seed, validation)
        noised = self.noise(tokens_BL, log_snr_BL, ordinal_B, counted_BL, seed, process, validation=validation)
        noised_BL = samples.with_given_clean(noised.noised)
        weight_BL = noised.loss_weight if self.loss_weighting == "gidd" else noised.elbo_weight
        if self.max_loss_weight is not None:
            weight_BL = weight_BL.clamp(max=self.max_loss_weight)
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
            layout=AttentionLayout("bidirectional", samples.document_BL, samples.given_BL),
            rows=rows,
            log_snr_BS=samples.with_given_levels(log_snr_BL, process.schedule.max_log_snr),
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
        any_token = 0 if process.mixing.mask_id != 0 else 1
        tokens_BL = torch.full((len(ordinal_B), num_tokens), any_token, device=ordinal_B.device)
        samples = Samples(tokens_BL=tokens_BL, counted_BL=torch.ones_like(tokens_BL).bool(), ordinal_B=ordinal_B)
        if not validation:  # where all tokens count, they do so with empty ones between them
            samples = replace(self.augmentation, max_empty_token_fraction=0.0).augmented(samples, seed)
        position_S = torch.arange(num_tokens) if index_S is None else index_S
        counted_BS = samples.counted_BL[:, position_S]
        noised = self.noise(
            tokens_BL[:, position_S],
            self._log_snr(ordinal_B, position_S, num_tokens, seed, validation) - 1e-9,
            ordinal_B,
            counted_BS,
            seed,
            process,
            validation=validation,
            position_L=position_S,
        )
        return int((counted_BS & (noised.noised == process.mixing.mask_id)).sum())

    def _log_snr(self, ordinal_B: Tensor, position_L: Tensor, num_tokens: int, seed: int, validation: bool) -> Tensor:
        """Return the level of each sequence, float64 [B, 1], or of each token, [B, L], on the positions' device.

        Args:
            ordinal_B: Places in the training stream, on the host.
            position_L: Places inside the whole sample.
            num_tokens: Tokens of the whole sample.
        """
        device, schedule = position_L.device, self.process.schedule
        purpose_offset = VALIDATION_OFFSET if validation else 0
        log_snr_B1 = sequence_log_snr(schedule, seed, ordinal_B, purpose_offset)[:, None].to(device)
        independent = round(self.independent_level_fraction * WORD_RANGE)
        linear = round(self.linear_level_fraction * WORD_RANGE)
        if validation or independent + linear == 0:
            return log_snr_B1
        kind_word_B1 = random_words(seed, ordinal_B, 0, Purpose.SEQUENCE)[:, 1:2].to(device)
        independent_BL = token_log_snr(schedule, seed, ordinal_B.to(device), position_L)
        linear_L = schedule.log_snr((position_L + 1).double() / (num_tokens + 1))
        log_snr_BL = torch.where(kind_word_B1 < independent + linear, linear_L, log_snr_B1)
        return torch.where(kind_word_B1 < independent, independent_BL, log_snr_BL)
