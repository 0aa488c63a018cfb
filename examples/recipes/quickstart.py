"""The quickstart: a small hybrid-noise denoiser that learns Python on two CPU cores in minutes.

0.8 M parameters in the layers and 1 M in embedding and head. Text is fed as 256-token windows of the standard
library's sources, 2^13 tokens a step.
"""

from megadiff.config import GiddConfig, TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.denoiser import DenoiserConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.loop import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=4, hidden_size=128, num_attention_heads=4),
        objective=GiddConfig(noise="hybrid", shift=0.0),
        data=DataConfig(path="data/quickstart", sequence_length=256),
        optimizer=OptimizerConfig(lr=4e-3, lr_warmup_steps=50, lr_decay_fraction=0.3),
        training=TrainingConfig(train_steps=600, global_batch_size=32, micro_batch_size=32, precision="fp32"),
        validation=ValidationConfig(interval=300, num_sequences=512),
        checkpoint=CheckpointConfig(interval=100, keep_last=2),
    )
