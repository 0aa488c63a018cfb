"""Settings of masked diffusion in time form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import DiffusionProcess, LogLinearSchedule, MaskedMixing, MdlmObjective
from megadiff.objectives.base import Vocabulary
from megadiff.objectives.masked import MaskedConfig


@dataclass(frozen=True, kw_only=True)
class MdlmConfig(MaskedConfig):
    """Masked diffusion in time form (arXiv 2406.07524)."""

    name: Literal["mdlm"] = "mdlm"

    def process(self, vocabulary: Vocabulary) -> DiffusionProcess:
        """The noise process, which a sampler reverses whatever hid the tokens in training."""
        return DiffusionProcess(
            LogLinearSchedule(epsilon=self.epsilon), MaskedMixing(vocabulary.size, vocabulary.mask_id)
        )

    def build(self, vocabulary: Vocabulary) -> MdlmObjective:
        """The objective over a vocabulary."""
        return MdlmObjective(masking=self.build_masking(vocabulary), random_length_fraction=self.random_length_fraction)
