"""Settings of masked diffusion in time form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import MdlmObjective
from megadiff.objectives.base import Vocabulary
from megadiff.objectives.masked import MaskedConfig


@dataclass(frozen=True, kw_only=True)
class MdlmConfig(MaskedConfig):
    """Masked diffusion in time form (arXiv 2406.07524)."""

    name: Literal["mdlm"] = "mdlm"

    def build(self, vocabulary: Vocabulary) -> MdlmObjective:
        """The objective over a vocabulary."""
        return MdlmObjective(masking=self.build_masking(vocabulary), random_length_fraction=self.random_length_fraction)
