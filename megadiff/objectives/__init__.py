"""Settings of the training objectives: one file each, which says what can be chosen and builds the objective.

The objectives themselves are mathematics (`megadiff.diffusion.objectives`); what a run can set, and what it means for
tokenizer, model and attention, is here.
"""

from megadiff.objectives.autoregressive import AutoregressiveConfig
from megadiff.objectives.base import ObjectiveConfig, Vocabulary
from megadiff.objectives.block_diffusion import BlockDiffusionConfig
from megadiff.objectives.duo import DuoConfig
from megadiff.objectives.eso_lm import EsoLmConfig
from megadiff.objectives.gidd import GiddConfig
from megadiff.objectives.in_place import InPlaceObjectiveConfig
from megadiff.objectives.mdlm import MdlmConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "autoregressive": AutoregressiveConfig,
    "block_diffusion": BlockDiffusionConfig,
    "duo": DuoConfig,
    "eso_lm": EsoLmConfig,
    "gidd": GiddConfig,
    "mdlm": MdlmConfig,
}
"""By the name that `--objective` takes."""

__all__ = [
    "OBJECTIVES",
    "AutoregressiveConfig",
    "BlockDiffusionConfig",
    "DuoConfig",
    "EsoLmConfig",
    "GiddConfig",
    "InPlaceObjectiveConfig",
    "MdlmConfig",
    "ObjectiveConfig",
    "Vocabulary",
]
