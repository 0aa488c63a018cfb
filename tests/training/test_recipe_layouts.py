"""The layouts of the ten-billion recipes, on a model of six small layers: they train what one process trains.

Uneven stages of several virtual stages each, with everything overlapped, are in no other test of layouts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from distributed import run_ranks
from ten_billion import DIVIDED_LAYERS, RECIPES
from tiny import tiny_config

from megadiff.config import load_recipe
from megadiff.parallel.groups import ParallelConfig

TOLERANCE = 1e-5
"""Sums in another order: 1e-7 in losses and 1e-6 in gradient norms are expected."""


def train(corpus: Path, parallel: ParallelConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of four steps."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    config = tiny_config(corpus, model={"num_layers": 6, "fused_head_loss": True}, training={"train_steps": 4})
    config = dataclasses.replace(config, parallel=parallel)
    with parallel_groups.joined(parallel) as groups:
        config.check(groups.world_size)
        trainer = Trainer(config, Path("unused"), groups)
        batches = trainer.training_batches()
        lines = [trainer.train_step(batches) for _ in range(4)]
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(
    "world_size, settings",
    [
        (2, DIVIDED_LAYERS),
        pytest.param(4, DIVIDED_LAYERS, marks=pytest.mark.slow),
        pytest.param(4, "", marks=pytest.mark.slow),
    ],
)
def test_layouts_of_the_recipe_train_what_one_process_trains(corpus_dir: Path, world_size: int, settings: str) -> None:
    parallel = load_recipe(RECIPES[0]).overridden(settings.split()).parallel
    assert parallel.num_virtual_stages == 2 and parallel.overlap_param_gather
    # Of 18 + 16 layers in two virtual stages each, 4 + 2 remain.
    small = dataclasses.replace(parallel, num_layers_in_first_pipeline_stage=4)
    [expected] = run_ranks(1, train, corpus_dir, ParallelConfig())
    for found in run_ranks(world_size, train, corpus_dir, small):
        for step, pair in zip(found, expected, strict=True):
            assert step == pytest.approx(pair, rel=TOLERANCE)
    assert expected[-1][0] < expected[0][0]
