"""Masked noise at 8.7 B non-embedding parameters, for 64 to 512 H100: docs/ten_billion.md.

    torchrun … -m megadiff train examples/recipes/gidd_10b_masked.py --run-dir runs/gidd-10b-masked

Sizes, batch, steps and decay are those of the largest run of arXiv 2512.10858. Its learning rate is not published and
belongs to another parametrisation; the one here is a usual one for autoregressive models of this size, and untried.
Initial matrices have the standard deviation of that study, 0.4/√hidden_size.
"""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import GiddConfig
from megadiff.parallel.groups import ParallelConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(
            num_layers=34, hidden_size=4608, num_attention_heads=36, init_std=0.4 / 4608**0.5, fused_head_loss=True
        ),
        objective=GiddConfig(noise="masked"),
        data=DataConfig(path="data/text-131072", sequence_length=2048),
        # The head costs as much as two layers, so the last stage has two fewer than the first. Matrices are divided, so
        # that three samples fit at once: their gradients are added up as often as there are micro-batches.
        parallel=ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            num_layers_in_first_pipeline_stage=18,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        optimizer=OptimizerConfig(lr=2e-4, lr_warmup_steps=2000, lr_decay_fraction=0.2, adam_beta2=0.98),
        training=TrainingConfig(train_steps=29_000, global_batch_size=3072, micro_batch_size=3, precision="bf16"),
        validation=ValidationConfig(interval=1000, num_sequences=3072),
        checkpoint=CheckpointConfig(interval=500, keep_last=3, keep_every=5000, async_save=True),
    )
