"""Learning rates as functions of the step, settings that are refused, and clipping that clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.training.optimizer import OptimizerConfig


def test_wsd_warms_up_stays_and_decays_as_one_minus_root() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_steps=10, lr_decay_fraction=0.2)
    rates = [config.learning_rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[85] == pytest.approx(0.1 + 0.9 * (1 - (5 / 20) ** 0.5))
    assert rates == sorted(rates[:80]) + sorted(rates[80:], reverse=True)
    assert config.learning_rate(100, 100) == pytest.approx(0.1)


def test_cosine_and_constant() -> None:
    cosine = OptimizerConfig(lr=1.0, lr_decay_style="cosine", lr_warmup_steps=10)
    assert cosine.learning_rate(10, 110) == pytest.approx(1.0)
    assert cosine.learning_rate(60, 110) == pytest.approx(0.5)
    assert cosine.learning_rate(110, 110) == pytest.approx(0.0)
    assert OptimizerConfig(lr=1.0, lr_decay_style="constant", lr_warmup_steps=0).learning_rate(99, 100) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr is 0.0"),
        ({"lr": float("nan")}, "optimizer.lr is nan"),
        ({"decoupled_lr": 0.0}, "optimizer.decoupled_lr is 0.0"),
        ({"min_lr": 1.0}, "optimizer.min_lr is 1.0"),
        ({"lr_warmup_steps": -1}, "optimizer.lr_warmup_steps is -1"),
        ({"lr_decay_fraction": 1.5}, "optimizer.lr_decay_fraction is 1.5"),
        ({"clip_grad": -1.0}, "optimizer.clip_grad is -1.0"),
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def one_step(corpus: Path, options: list[dict[str, dict]]) -> list[dict[str, torch.Tensor]]:
    """What the optimizer sees and does in the first step of each configuration."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    found = []
    for sections in options:
        config = tiny_config(corpus, **sections)
        trainer = Trainer(config, Path("unused"), parallel_groups.initialize(config.parallel))
        line = trainer.train_step(trainer.training_batches())
        gradients = [p.grad for p in trainer.optimizer.get_parameters() if p.grad is not None]
        found.append(
            {
                "reported": torch.tensor(line["grad_norm"]),
                "left": torch.stack([g.square().sum() for g in gradients]).sum().sqrt(),
                "gain": trainer.denoisers[0].decoder.final_layernorm.weight.detach().float().clone(),
                "head": trainer.denoisers[0].output_layer.weight.detach().float().clone(),
                "main_dtypes": torch.tensor([p.dtype == torch.float32 for p in trainer.optimizer.get_parameters()]),
                "model_dtypes": torch.tensor([p.dtype == torch.bfloat16 for p in trainer.denoisers[0].parameters()]),
            }
        )
    parallel_groups.shutdown()
    return found


def test_clipping_clips_and_bf16_keeps_fp32_master_weights(corpus_dir: Path) -> None:
    free, clipped, half = run_ranks(
        1,
        one_step,
        corpus_dir,
        [
            {"optimizer": {"clip_grad": 0.0}},
            {"optimizer": {"clip_grad": 1e-3}},
            {"training": {"precision": "bf16"}},
        ],
    )[0]
    assert free["reported"] > 1e-2 and torch.allclose(free["left"], free["reported"])
    assert torch.allclose(clipped["reported"], free["reported"])
    assert torch.allclose(clipped["left"], torch.tensor(1e-3), rtol=1e-3)
    assert half["main_dtypes"].all() and half["model_dtypes"].all() and not free["model_dtypes"].any()
    assert half["head"].abs().max() > 0
