"""Block diffusion at 85 M non-embedding parameters: the counterpart of gidd_85m.py, in blocks of 16 tokens.

Same data, model, batch and optimizer; only the objective differs. The model reads every sample twice, so a micro-batch
has half as many samples. `--objective.block-size` leads from 1, autoregressive, to 2048, masked diffusion.
"""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import BlockDiffusionConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12, fused_head_loss=True),
        objective=BlockDiffusionConfig(block_size=16, masking="exact_count"),
        data=DataConfig(path="data/text", sequence_length=2048),
        optimizer=OptimizerConfig(lr=6e-4, lr_warmup_steps=2000, adam_beta2=0.99),
        training=TrainingConfig(train_steps=80_000, global_batch_size=128, micro_batch_size=4, precision="bf16"),
        validation=ValidationConfig(interval=1000, num_sequences=512),
        checkpoint=CheckpointConfig(interval=1000, keep_last=3),
    )
