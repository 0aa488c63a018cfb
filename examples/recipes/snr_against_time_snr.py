"""Masked diffusion by log-SNR: one half of a pair, the other is snr_against_time_time.py.

The two are one objective under two names. λ in [-9, 9] here, t in [1e-3, 1] there; the weight w/p(λ) of the divergence
here, 1/t of the cross-entropy there. Both draw their levels and tokens from the same random words, so that only the
ends of the range differ: fewer than one noised token in 1000 is another one, and the curves of training lie on each
other. Bounds are estimated by levels here and by exact counts there: they agree within their standard errors.

    megadiff train examples/recipes/snr_against_time_snr.py --run-dir runs/by-snr
    megadiff train examples/recipes/snr_against_time_time.py --run-dir runs/by-time
"""

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import GiddConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=DenoiserConfig(num_layers=4, hidden_size=128, num_attention_heads=4, init_std=0.13),
        objective=GiddConfig(noise="masked", loss_weighting="nelbo"),
        data=DataConfig(path="data/quickstart", sequence_length=128),
        optimizer=OptimizerConfig(lr=2e-3, decoupled_lr=0.1, lr_warmup_steps=50, lr_decay_fraction=0.3),
        training=TrainingConfig(
            train_steps=300, global_batch_size=32, micro_batch_size=16, precision="fp32", log_interval=20
        ),
        validation=ValidationConfig(interval=100, num_sequences=1024),
    )
