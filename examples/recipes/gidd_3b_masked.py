"""Masked noise at 2.0 B non-embedding parameters: the step before gidd_10b_masked.py, on a GPU per copy of the model.

    torchrun … -m megadiff train examples/recipes/gidd_3b_masked.py --run-dir runs/gidd-3b-masked

Sizes, batch and steps are those of arXiv 2512.10858, where this run ends at a bound of 2.422 nats per token of its own
corpus. Its learning rate is not published; the one here is untried.
"""

import dataclasses
from pathlib import Path

from megadiff.config import TrainConfig, load_recipe
from megadiff.parallel.groups import ParallelConfig


def config() -> TrainConfig:
    large = load_recipe(Path(__file__).with_name("gidd_10b_masked.py"))
    return dataclasses.replace(
        large,
        model=dataclasses.replace(
            large.model, num_layers=18, hidden_size=3072, num_attention_heads=24, init_std=0.4 / 3072**0.5
        ),
        parallel=ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
        optimizer=dataclasses.replace(large.optimizer, lr=3e-4),
        training=dataclasses.replace(large.training, train_steps=23_500, global_batch_size=1536, micro_batch_size=4),
    )
