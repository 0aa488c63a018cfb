"""Settings of Duo, uniform-state diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import (
    DiffusionProcess,
    DuoObjective,
    GaussianCurriculum,
    LogLinearSchedule,
    Objective,
    UniformMixing,
    gamma_range,
)
from megadiff.fields import require
from megadiff.objectives.base import Vocabulary
from megadiff.objectives.in_place import InPlaceObjectiveConfig
from megadiff.objectives.noising import fused_noise_rows


@dataclass(frozen=True, kw_only=True)
class DuoConfig(InPlaceObjectiveConfig):
    """Duo: uniform noise over all ids, the mask among them, trained on the bound (arXiv 2506.10892, 2602.15014).

    Published with a denoiser that knows the noise level: model.log_snr_conditioning true.
    """

    name: Literal["duo"] = "duo"
    epsilon: float = 1e-3
    """Smallest time, and keep probability at time 1, of the log-linear schedule."""
    max_loss_weight: float | None = None
    """Largest weight of a token in the training loss, not in the bound; none clips nothing, as published."""
    curriculum_end_sample: int = 0
    """Samples at the beginning of the stream with soft inputs, mixtures of embeddings by Gaussian latents; 0 is no
    curriculum, as in arXiv 2602.15014 (arXiv 2506.10892: half of the run)."""
    curriculum_start_sample: int = 0
    """Samples before the temperature begins to move."""
    curriculum_log10_temperature: tuple[float, float] = (-3.0, -3.0)
    """log10 of the temperature at the beginning and at the end of the curriculum, linear between them; lower is
    harder."""
    curriculum_gamma: tuple[float, float] | None = None
    """Range of the Gaussian noise level; published is -3.55,-1.85 for 30522 ids. None finds, for the vocabulary at
    hand, the range in which a token is kept with probabilities from 0.95 to 0.06."""
    curriculum_top_k: int = 8
    """Ids beside the clean one in a soft input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        LogLinearSchedule(self.epsilon)
        require(
            self.max_loss_weight is None or self.max_loss_weight > 0,
            "objective.max_loss_weight",
            self.max_loss_weight,
            "be positive, or none",
        )
        require(
            self.curriculum_end_sample >= 0,
            "objective.curriculum_end_sample",
            self.curriculum_end_sample,
            "be at least 0 (0: no curriculum)",
        )
        if self.curriculum_end_sample:
            # What depends on the vocabulary, which is not known yet, is checked when the objective is built.
            vocab_size = max(2, self.curriculum_top_k + 1)
            self._curriculum(vocab_size=vocab_size, gamma=gamma_range(vocab_size))

    def process(self, vocabulary: Vocabulary) -> DiffusionProcess:
        """The noise process over a vocabulary."""
        mixing = UniformMixing(vocabulary.size, vocabulary.mask_id, include_mask=True)
        return DiffusionProcess(LogLinearSchedule(self.epsilon), mixing)

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The objective over a vocabulary."""
        curriculum = None
        if self.curriculum_end_sample:
            gamma = self.curriculum_gamma or gamma_range(vocabulary.size)
            curriculum = self._curriculum(vocab_size=vocabulary.size, gamma=gamma)
        objective = DuoObjective(
            self.process(vocabulary),
            max_loss_weight=self.max_loss_weight,
            curriculum=curriculum,
            random_length_fraction=self.random_length_fraction,
            noise=fused_noise_rows,
        )
        return self.adapted(objective, vocabulary)

    def _curriculum(self, *, vocab_size: int, gamma: tuple[float, float]) -> GaussianCurriculum:
        return GaussianCurriculum(
            vocab_size=vocab_size,
            gamma=gamma,
            end_sample=self.curriculum_end_sample,
            start_sample=self.curriculum_start_sample,
            log10_temperature=self.curriculum_log10_temperature,
            top_k=self.curriculum_top_k,
        )
