"""Uniform noise at 8.7 B non-embedding parameters: gidd_10b_masked.py with another noise, and nothing else.

    torchrun … -m megadiff train examples/recipes/gidd_10b_uniform.py --run-dir runs/gidd-10b-uniform

The run of this size in arXiv 2512.10858, which ends at a bound of 2.214 nats per token of its own corpus.
"""

import dataclasses
from pathlib import Path

from megadiff.config import TrainConfig, load_recipe
from megadiff.objectives import GiddConfig


def config() -> TrainConfig:
    masked = load_recipe(Path(__file__).with_name("gidd_10b_masked.py"))
    return dataclasses.replace(masked, objective=GiddConfig(noise="uniform"))
