"""The autoregressive baseline at 85 M non-embedding parameters: the same model, data order and head.

Everything but the objective is that of `gidd_85m.py`, so that the two differ in nothing else.
"""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import AutoregressiveConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12),
        objective=AutoregressiveConfig(),
        data=DataConfig(path="data/text", sequence_length=2048),
        optimizer=OptimizerConfig(lr=6e-4, lr_warmup_steps=2000, adam_beta2=0.99),
        training=TrainingConfig(train_steps=80_000, global_batch_size=128, micro_batch_size=8, precision="bf16"),
        validation=ValidationConfig(interval=1000, num_sequences=512),
        checkpoint=CheckpointConfig(interval=1000, keep_last=3),
    )
