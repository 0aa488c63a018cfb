"""From an autoregressive model to a masked diffusion model, at 85 M parameters: docs/adaptation.md tells the story.

megadiff train examples/recipes/adapt.py --run-dir runs/adapted --training.init-from runs/autoregressive

Model and corpus are those of the autoregressive run. The weights are good already, so the learning rate is a fraction
of the one that they were trained with, and a tenth of the run goes by until attention is bidirectional.
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
        objective=GiddConfig(noise="masked", shift_inputs=True, attention_annealing_samples=256_000),
        data=DataConfig(path="data/text", sequence_length=2048),
        optimizer=OptimizerConfig(lr=1e-4, lr_warmup_steps=500, adam_beta2=0.99),
        training=TrainingConfig(
            train_steps=20_000,
            global_batch_size=128,
            micro_batch_size=8,
            precision="bf16",
            init_from="runs/autoregressive",
        ),
        validation=ValidationConfig(interval=1000, num_sequences=512),
        checkpoint=CheckpointConfig(interval=1000, keep_last=3),
    )
