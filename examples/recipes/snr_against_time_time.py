"""Masked diffusion by time: one half of a pair, the other, snr_against_time_snr.py, says what to expect."""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import MdlmConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=4, hidden_size=128, num_attention_heads=4, init_std=0.13),
        objective=MdlmConfig(),
        data=DataConfig(path="data/quickstart", sequence_length=128),
        optimizer=OptimizerConfig(lr=2e-3, decoupled_lr=0.1, lr_warmup_steps=50, lr_decay_fraction=0.3),
        training=TrainingConfig(
            train_steps=300, global_batch_size=32, micro_batch_size=16, precision="fp32", log_interval=20
        ),
        validation=ValidationConfig(interval=100, num_sequences=1024),
    )
