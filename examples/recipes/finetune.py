"""Fine-tuning of the 85 M hybrid-noise model on prompts and responses (docs/finetuning.md).

    megadiff prepare --kind examples --input chats.jsonl --output-dir data/chats --tokenizer data/text/tokenizer.model
    megadiff train examples/recipes/finetune.py --run-dir runs/chat --training.init-from runs/gidd_85m

Model, objective and precision are those of the checkpoint, the learning rate is a twentieth of its own; 40 000 examples
are read three times.
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
        objective=GiddConfig(noise="hybrid", shift=0.0),
        data=DataConfig(path="data/chats", kind="examples", sequence_length=512),
        optimizer=OptimizerConfig(lr=3e-5, lr_warmup_steps=50, adam_beta2=0.99),
        training=TrainingConfig(train_steps=1900, global_batch_size=64, micro_batch_size=16, precision="bf16"),
        validation=ValidationConfig(interval=200, num_sequences=512),
        checkpoint=CheckpointConfig(interval=200, keep_last=2),
    )
