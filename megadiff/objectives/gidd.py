"""Settings of generalised interpolating discrete diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import (
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    UniformMixing,
)
from megadiff.objectives.base import ObjectiveConfig, Vocabulary
from megadiff.training.noising import fused_noise_rows


@dataclass(frozen=True, kw_only=True)
class GiddConfig(ObjectiveConfig):
    """Generalised interpolating discrete diffusion by log-SNR (arXiv 2512.10858)."""

    name: Literal["gidd"] = "gidd"
    noise: Literal["masked", "uniform", "hybrid"] = "hybrid"
    """What takes a token's place: the mask, a random token, or either, by noise level."""
    shift: float = 0.0
    """Hybrid noise: b in σ(a·λ + b), the uniform share at log-SNR λ; published values are -2, 0 and 2."""
    scale: float = 1.0
    """Hybrid noise: a in σ(a·λ + b); a valid process needs |a| ≤ 1."""
    min_log_snr: float = -9.0
    """Noisiest level."""
    max_log_snr: float = 9.0
    """Cleanest level."""
    loss_weighting: Literal["gidd", "nelbo"] = "gidd"
    """Training weight: w (the published loss), or w/p (the bound itself)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.scale) > 1:
            raise ValueError(
                f"objective.scale is {self.scale}, but hybrid noise is a Markov process only for |scale| ≤ 1: "
                "the published value is 1"
            )
        NoiseSchedule(self.min_log_snr, self.max_log_snr)

    def process(self, vocabulary: Vocabulary) -> DiffusionProcess:
        """The noise process over a vocabulary."""
        mixing: MixingDistribution
        if self.noise == "masked":
            mixing = MaskedMixing(vocabulary.size, vocabulary.mask_id)
        elif self.noise == "uniform":
            mixing = UniformMixing(vocabulary.size, vocabulary.mask_id)
        else:
            mixing = HybridMixing(vocabulary.size, vocabulary.mask_id, self.shift, self.scale)
        return DiffusionProcess(NoiseSchedule(self.min_log_snr, self.max_log_snr), mixing)

    def build(self, vocabulary: Vocabulary) -> GiddObjective:
        """The objective over a vocabulary."""
        return GiddObjective(self.process(vocabulary), loss_weighting=self.loss_weighting, noise=fused_noise_rows)
