"""Uniform noise at 2.2 B non-embedding parameters: gidd_3b_masked.py with another noise, a layer more, fewer steps.

    torchrun … -m megadiff train examples/recipes/gidd_3b_uniform.py --run-dir runs/gidd-3b-uniform

So the two cost about the same. The run of arXiv 2512.10858 ends at a bound of 2.462 nats per token of its own corpus.
"""

import dataclasses
from pathlib import Path

from megadiff.config import TrainConfig, load_recipe
from megadiff.objectives import GiddConfig


def config() -> TrainConfig:
    masked = load_recipe(Path(__file__).with_name("gidd_3b_masked.py"))
    return dataclasses.replace(
        masked,
        objective=GiddConfig(noise="uniform"),
        model=dataclasses.replace(masked.model, num_layers=19),
        training=dataclasses.replace(masked.training, train_steps=22_500),
    )
