"""Settings that masked diffusion has, on whole samples as in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import (
    DiffusionProcess,
    LevelMasking,
    LogLinearSchedule,
    MaskedMixing,
    Masking,
)
from megadiff.objectives.base import ObjectiveConfig, Vocabulary
from megadiff.objectives.noising import fused_noise_rows


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(ObjectiveConfig):
    """Base of the settings of objectives that hide tokens and ask for them."""

    loss_weighting: Literal["nelbo", "simple"] = "nelbo"
    """Training weight of a hidden token: that of the bound (1/t), or 1, which reaches the same bound with about 12 %
    less compute (arXiv 2602.15014). Validation estimates the bound either way."""
    masking: Literal["levels", "exact_count"] = "levels"
    """How tokens are hidden in training: each on its own at a random level, or exactly k of the n that count, k uniform
    in 1 to n, at the bound's weight n/k, with less variance. Validation always counts, for the exact bound."""
    epsilon: float = 1e-3
    """Levels: the smallest time t, and the probability that a token is kept at t = 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        LogLinearSchedule(epsilon=self.epsilon)

    def process(self, vocabulary: Vocabulary) -> DiffusionProcess:
        """The noise process, which a sampler reverses whatever hid the tokens in training."""
        return DiffusionProcess(
            LogLinearSchedule(epsilon=self.epsilon), MaskedMixing(vocabulary.size, vocabulary.mask_id)
        )

    def build_masking(self, vocabulary: Vocabulary) -> Masking:
        """What chooses hidden tokens."""
        levels = LevelMasking(
            mixing=MaskedMixing(vocabulary.size, vocabulary.mask_id),
            schedule=LogLinearSchedule(epsilon=self.epsilon),
            loss_weighting=self.loss_weighting,
            noise=fused_noise_rows,
        )
        return levels if self.masking == "levels" else levels.exact
