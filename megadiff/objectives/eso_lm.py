"""Settings of Eso-LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import EsoLmObjective
from megadiff.fields import require
from megadiff.objectives.base import MaskFeature, ObjectiveConfig, Vocabulary
from megadiff.objectives.noising import fused_noise_rows


@dataclass(frozen=True, kw_only=True)
class EsoLmConfig(ObjectiveConfig):
    """Masked diffusion under causal attention in random order, with exact caching (arXiv 2506.01928)."""

    name: Literal["eso_lm"] = "eso_lm"
    alpha_0: float = 1.0
    """Share of the tokens that diffusion writes; the rest follow one by one from left to right. 1, as published at
    scale, is diffusion alone; 0 is autoregressive. Below 1 the model's sequence is twice the sample's."""
    epsilon: float = 1e-3
    """Smallest time, and keep probability at time 1 relative to alpha_0."""
    loss_weighting: Literal["nelbo", "simple"] = "nelbo"
    """Training weight of the diffusion term: that of the bound, or 1 (the published low-variance loss)."""
    sequential_share: float | None = None
    """Share of the sequences that train the sequential term, for alpha_0 between 0 and 1; 1 - alpha_0 by default.
    Changes the variance of the loss, not its mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.alpha_0 <= 1.0, "objective.alpha_0", self.alpha_0, "lie in [0, 1]")
        require(0.0 < self.epsilon < 0.5, "objective.epsilon", self.epsilon, "lie in (0, 0.5); published is 1e-3")
        share = self.sequential_share
        if share is not None:
            require(0.0 < share < 1.0, "objective.sequential_share", share, "lie in (0, 1), or be none")
            require(0.0 < self.alpha_0 < 1.0, "objective.sequential_share", share, "be none where one term is alone")

    def build(self, vocabulary: Vocabulary) -> EsoLmObjective:
        """The objective over a vocabulary."""
        return EsoLmObjective(
            vocab_size=vocabulary.size,
            mask_id=vocabulary.mask_id,
            alpha_0=self.alpha_0,
            sequential_share=1.0 - self.alpha_0 if self.sequential_share is None else self.sequential_share,
            epsilon=self.epsilon,
            loss_weighting=self.loss_weighting,
            random_length_fraction=self.random_length_fraction,
            noise=fused_noise_rows,
        )

    @property
    def gives_log_snr(self) -> bool:
        """False: a clean token is cached for all levels, so no prediction may depend on one."""
        return False

    def model_length(self, num_tokens: int) -> int:
        """L, or 2L where there is a sequential term."""
        return num_tokens if self.alpha_0 == 1 else 2 * num_tokens

    def mask_features(self, *, documents: bool, prompts: bool) -> frozenset[MaskFeature]:
        """Causal or doubled; documents are permuted; see `ObjectiveConfig.mask_features`."""
        kind: MaskFeature = "causal" if self.alpha_0 == 1 else "block diffusion"
        has_documents = super().mask_features(documents=documents, prompts=prompts)
        return frozenset({kind, "permuted documents"} if has_documents else {kind})
