"""Hybrid noise at 85 M non-embedding parameters, the size at which the log-SNR study begins to separate noise types.

Batch and sequence length are those of arXiv 2512.10858 (2048 tokens, 2^18 tokens a step); the learning rate is a
conservative one for standard parametrisation. `--objective.noise masked` or `uniform`, or another `--objective.shift`,
makes it one of the study's other four runs; prompts and levels per token are off (docs/objectives.md).
"""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import GiddConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12),
        objective=GiddConfig(noise="hybrid", shift=0.0),
        data=DataConfig(path="data/text", sequence_length=2048),
        optimizer=OptimizerConfig(lr=6e-4, lr_warmup_steps=2000, adam_beta2=0.99),
        training=TrainingConfig(train_steps=80_000, global_batch_size=128, micro_batch_size=8, precision="bf16"),
        validation=ValidationConfig(interval=1000, num_sequences=512),
        checkpoint=CheckpointConfig(interval=1000, keep_last=3),
    )
