"""Training objectives: small classes that turn clean tokens into a `NoisedBatch` with its `Rows`."""

from megadiff.diffusion.objectives.annealed import AnnealedObjective
from megadiff.diffusion.objectives.autoregressive import AutoregressiveObjective
from megadiff.diffusion.objectives.base import Objective
from megadiff.diffusion.objectives.block_diffusion import BlockDiffusionObjective
from megadiff.diffusion.objectives.duo import DuoObjective
from megadiff.diffusion.objectives.eso_lm import EsoLmObjective
from megadiff.diffusion.objectives.gidd import GiddObjective
from megadiff.diffusion.objectives.mdlm import MdlmObjective
from megadiff.diffusion.objectives.shifted import ShiftedObjective

__all__ = [
    "AnnealedObjective",
    "AutoregressiveObjective",
    "BlockDiffusionObjective",
    "DuoObjective",
    "EsoLmObjective",
    "GiddObjective",
    "MdlmObjective",
    "Objective",
    "ShiftedObjective",
]
