"""Training objectives: small classes that turn clean tokens into a `NoisedBatch` with its `Rows`."""

from megadiff.diffusion.objectives.base import Objective
from megadiff.diffusion.objectives.gidd import GiddObjective

__all__ = ["GiddObjective", "Objective"]
