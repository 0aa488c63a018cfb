"""Hybrid noise at 85 M non-embedding parameters with optimizer and parametrisation of arXiv 2512.10858.

The counterpart of gidd_85m.py: LaProp and CompleteP, whose base learning rate of 0.3 was found at 25 M and 50 M
parameters and holds at any size; prompts and levels per token, in the shares of the code that made the results; no
clipping, as there. Larger batches want larger rates: the study's law is lr = 0.078·sequences^0.339 for 100 000 steps.
What still differs from the published model and code: docs/optimizer.md, docs/objectives.md.
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
        model=DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12, parametrization="complete_p"),
        objective=GiddConfig(noise="hybrid", shift=0.0, independent_level_fraction=0.2, prompt_fraction=0.2),
        data=DataConfig(path="data/text", sequence_length=2048),
        optimizer=OptimizerConfig(algorithm="laprop", lr=0.3, lr_warmup_steps=2000, adam_beta2=0.99, clip_grad=0.0),
        training=TrainingConfig(train_steps=80_000, global_batch_size=128, micro_batch_size=8, precision="bf16"),
        validation=ValidationConfig(interval=1000, num_sequences=512),
        checkpoint=CheckpointConfig(interval=1000, keep_last=3),
    )
