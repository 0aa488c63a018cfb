"""Settings of the autoregressive baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import AutoregressiveObjective
from megadiff.objectives.base import MaskFeature, ObjectiveConfig, Vocabulary


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(ObjectiveConfig):
    """Next-token prediction with the same model, data order and head: the baseline."""

    name: Literal["autoregressive"] = "autoregressive"

    def build(self, vocabulary: Vocabulary) -> AutoregressiveObjective:
        """The objective over a vocabulary."""
        return AutoregressiveObjective(
            mask_id=vocabulary.mask_id,
            bos_id=vocabulary.bos_id,
            random_length_fraction=self.random_length_fraction,
        )

    @property
    def gives_log_snr(self) -> bool:
        """False: nothing is noised."""
        return False

    def mask_features(self, *, documents: bool, prompts: bool) -> frozenset[MaskFeature]:
        """Causal, and what every objective may have; see `ObjectiveConfig.mask_features`."""
        return super().mask_features(documents=documents, prompts=prompts) | {"causal"}
