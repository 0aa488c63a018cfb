"""Settings of generalised interpolating discrete diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import (
    Augmentation,
    CosineSchedule,
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    Objective,
    TabulatedSchedule,
    UniformMixing,
)
from megadiff.fields import require
from megadiff.objectives.base import MaskFeature, Vocabulary
from megadiff.objectives.in_place import InPlaceObjectiveConfig
from megadiff.objectives.noising import fused_noise_rows

_ANY_VOCABULARY = Vocabulary(size=5, bos_id=0, eos_id=1, pad_id=2, mask_id=3)


@dataclass(frozen=True, kw_only=True)
class GiddConfig(InPlaceObjectiveConfig):
    """Generalised interpolating discrete diffusion by log-SNR (arXiv 2512.10858)."""

    name: Literal["gidd"] = "gidd"
    noise: Literal["masked", "uniform", "hybrid"] = "hybrid"
    """What takes a token's place: the mask, a random token, or either, by noise level."""
    shift: float = 0.0
    """Hybrid noise: b in σ(a·λ + b), the uniform share at log-SNR λ; published are -2 (low-uniform), 0 (balanced) and
    2 (high-uniform), and -1000 and 1000 for what noise=masked and noise=uniform are exactly."""
    scale: float = 1.0
    """Hybrid noise: a in σ(a·λ + b); a valid process needs |a| ≤ 1."""
    min_log_snr: float = -9.0
    """Noisiest level."""
    max_log_snr: float = 9.0
    """Cleanest level."""
    schedule: Literal["linear", "cosine", "table"] = "linear"
    """How often training visits levels: those of α = 1 - t, of α = cos²(πt/2), or of alpha_table, for uniform times t.
    The bound is the same for all; with loss_weighting=gidd the loss weighs levels as they are visited."""
    alpha_table: tuple[float, ...] = ()
    """schedule=table: α at evenly spaced times, falling from 1 to 0; linear in between."""
    loss_weighting: Literal["gidd", "nelbo"] = "gidd"
    """Training weight: w (the published loss), or w/p (the bound itself)."""
    max_loss_weight: float | None = None
    """Cap on the training weight; none: no cap. The published ones, 1000 for w and 1e6 for w/p, cannot bind: w is at
    most 2, and w/p 16210 with the linear schedule to log-SNR 9."""
    independent_level_fraction: float = 0.0
    """Share of the training samples in which every token has a noise level of its own (diffusion forcing); published is
    0.5 in the paper, 0.2 in the code that made its results."""
    linear_level_fraction: float = 0.0
    """Share of the training samples whose noise rises linearly from the first token to the last; published is 0."""
    prompt_fraction: float = 0.0
    """Share of the training samples whose beginning is a clean prompt, which sees only itself and is not in the loss;
    published is 0.2."""
    max_empty_token_fraction: float = 0.0
    """Training samples are mixed with a random share of padding tokens, from 0 to this; published is 0.2, though the
    code that made its results left it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.scale) > 1:
            raise ValueError(
                f"objective.scale is {self.scale}, but hybrid noise is a Markov process only for |scale| ≤ 1: "
                "the published value is 1"
            )
        require(
            (self.schedule == "table") == bool(self.alpha_table),
            "objective.schedule",
            f"{self.schedule} with {len(self.alpha_table)} values in objective.alpha_table",
            "be table where there are values, and only there",
        )
        self.build(_ANY_VOCABULARY)  # whose parts know their ranges

    def process(self, vocabulary: Vocabulary) -> DiffusionProcess:
        """The noise process over a vocabulary."""
        mixing: MixingDistribution
        if self.noise == "masked":
            mixing = MaskedMixing(vocabulary.size, vocabulary.mask_id)
        elif self.noise == "uniform":
            mixing = UniformMixing(vocabulary.size, vocabulary.mask_id)
        else:
            mixing = HybridMixing(vocabulary.size, vocabulary.mask_id, self.shift, self.scale)
        return DiffusionProcess(self._noise_schedule(), mixing)

    def _noise_schedule(self) -> NoiseSchedule:
        if self.schedule == "linear":
            return NoiseSchedule(self.min_log_snr, self.max_log_snr)
        if self.schedule == "cosine":
            return CosineSchedule(self.min_log_snr, self.max_log_snr)
        return TabulatedSchedule(self.min_log_snr, self.max_log_snr, self.alpha_table)

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The objective over a vocabulary."""
        objective = GiddObjective(
            self.process(vocabulary),
            loss_weighting=self.loss_weighting,
            max_loss_weight=self.max_loss_weight,
            independent_level_fraction=self.independent_level_fraction,
            linear_level_fraction=self.linear_level_fraction,
            augmentation=Augmentation(
                max_empty_token_fraction=self.max_empty_token_fraction,
                empty_id=vocabulary.pad_id,
                random_length_fraction=self.random_length_fraction,
                prompt_fraction=self.prompt_fraction,
            ),
            noise=fused_noise_rows,
        )
        return self.adapted(objective, vocabulary)

    @property
    def cutting(self) -> dict[str, float]:
        """Shares of what may push the end of a sample out; see `ObjectiveConfig.cutting`."""
        return super().cutting | {"max_empty_token_fraction": self.max_empty_token_fraction}

    def mask_features(self, *, documents: bool, prompts: bool) -> frozenset[MaskFeature]:
        """What the attention masks of a run have; see `ObjectiveConfig.mask_features`."""
        features = super().mask_features(documents=documents, prompts=prompts)
        return features | {"clean prefix"} if prompts or self.prompt_fraction > 0 else features
