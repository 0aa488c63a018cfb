"""The quickstart: a small hybrid-noise denoiser that learns Python on two CPU cores in minutes.

0.8 M parameters in the layers and 0.5 M in embedding and head, 128-token windows, 2^12 tokens a step. At this size and
length embedding and head want a learning rate far above that of the layers (docs/log.md).
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
        model=DenoiserConfig(num_layers=4, hidden_size=128, num_attention_heads=4, init_std=0.13),
        objective=GiddConfig(noise="hybrid", shift=0.0),
        data=DataConfig(path="data/quickstart", sequence_length=128),
        optimizer=OptimizerConfig(lr=2e-3, decoupled_lr=0.1, lr_warmup_steps=50, lr_decay_fraction=0.3),
        training=TrainingConfig(
            train_steps=500, global_batch_size=32, micro_batch_size=16, precision="fp32", log_interval=20
        ),
        validation=ValidationConfig(interval=250, num_sequences=1024),
        checkpoint=CheckpointConfig(interval=100, keep_last=2),
    )
