"""Settings of masked diffusion in time form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import MdlmObjective, Objective
from megadiff.objectives.base import Vocabulary
from megadiff.objectives.in_place import InPlaceObjectiveConfig
from megadiff.objectives.masked import MaskedConfig


@dataclass(frozen=True, kw_only=True)
class MdlmConfig(MaskedConfig, InPlaceObjectiveConfig):
    """Masked diffusion in time form (arXiv 2406.07524)."""

    name: Literal["mdlm"] = "mdlm"

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The objective over a vocabulary."""
        masking = self.build_masking(vocabulary)
        objective = MdlmObjective(masking=masking, random_length_fraction=self.random_length_fraction)
        return self.adapted(objective, vocabulary)
