"""A run small enough for tests, by layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import GiddConfig, ObjectiveConfig
from megadiff.parallel.groups import ParallelConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig
from megadiff.training.sinks import WatchConfig


def tiny_config(
    corpus: Path,
    *,
    objective: ObjectiveConfig | dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> TrainConfig:
    """A two-layer denoiser on 32-token samples; `sections` replace single fields: training={"train_steps": 3}.

    The objective is hybrid gidd, with other fields or as a whole another one.
    """
    if not isinstance(objective, ObjectiveConfig):
        objective = dataclasses.replace(GiddConfig(noise="hybrid", shift=0.0), **(objective or {}))
    config = TrainConfig(
        model=DenoiserConfig(num_layers=2, hidden_size=32, num_attention_heads=4, init_std=0.1),
        objective=objective,
        data=DataConfig(path=str(corpus), sequence_length=32),
        parallel=ParallelConfig(timeout_minutes=2, **(parallel or {})),
        optimizer=OptimizerConfig(lr=1e-2, decoupled_lr=2e-2, lr_warmup_steps=2, weight_decay=0.1),
        training=TrainingConfig(train_steps=6, global_batch_size=8, micro_batch_size=2, precision="fp32", seed=7),
        validation=ValidationConfig(interval=0, num_sequences=10),
        checkpoint=CheckpointConfig(interval=2, keep_last=2),
        watch=WatchConfig(num_texts=0),
    )
    for section, fields in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    return config
