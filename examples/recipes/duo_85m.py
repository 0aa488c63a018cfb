"""Duo at 85 M non-embedding parameters: uniform noise, trained on the bound, the noise level told to the denoiser.

Same model, data order, batch and learning rate as gidd_85m.py, so that the two differ in the objective and its
conditioning alone. The Gaussian curriculum covers the first half of the run, as published (arXiv 2506.10892);
`--objective.curriculum-end-sample 0` leaves it out, as the scaling study does (arXiv 2602.15014).
"""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import DuoConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig

TRAIN_STEPS, GLOBAL_BATCH_SIZE = 80_000, 128


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12, log_snr_conditioning=True),
        objective=DuoConfig(curriculum_end_sample=TRAIN_STEPS * GLOBAL_BATCH_SIZE // 2),
        data=DataConfig(path="data/text", sequence_length=2048),
        optimizer=OptimizerConfig(lr=6e-4, lr_warmup_steps=2000, adam_beta2=0.99),
        training=TrainingConfig(
            train_steps=TRAIN_STEPS, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=8, precision="bf16"
        ),
        validation=ValidationConfig(interval=1000, num_sequences=512),
        checkpoint=CheckpointConfig(interval=1000, keep_last=3),
    )
