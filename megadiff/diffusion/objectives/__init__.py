"""Training objectives: small classes that turn clean tokens into a `NoisedBatch` with its `Rows`."""

from megadiff.diffusion.objectives.base import Objective
from megadiff.diffusion.objectives.block_diffusion import BlockDiffusionObjective
from megadiff.diffusion.objectives.duo import DuoObjective
from megadiff.diffusion.objectives.gidd import GiddObjective
from megadiff.diffusion.objectives.mdlm import MdlmObjective

__all__ = ["BlockDiffusionObjective", "DuoObjective", "GiddObjective", "MdlmObjective", "Objective"]
