"""CompleteP: the settings of every group, and activations of one order at any width and depth."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.objectives import AutoregressiveConfig

LR, WEIGHT_DECAY, EPS = 0.3, 0.5, 1e-8
WIDTH, DEPTH, STEPS = 64, 2, 8
"""Of the smallest models."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, by size and parametrisation."""

    width: int = WIDTH
    depth: int = DEPTH
    parametrization: str = "complete_p"
    changed: dict[str, float] = field(default_factory=dict)
    """Scales that it does not take from its parametrisation."""

    def config(self, corpus: Path, **optimizer: Any) -> Any:
        """A run with LaProp; where the learning rate has no scale, it is that of the smallest width's layers."""
        sizes = {"num_layers": self.depth, "hidden_size": self.width, "num_attention_heads": 4, "init_std": 0.02}
        lr = LR if self.parametrization == "complete_p" else LR / WIDTH
        rates = {"lr": lr, "decoupled_lr": None, "lr_warmup_steps": 0, "lr_decay_style": "constant", "clip_grad": 0.0}
        return tiny_config(
            corpus,
            model={**sizes, "parametrization": self.parametrization},
            optimizer={"algorithm": "laprop", **rates, "weight_decay": 0.0, "adam_eps": EPS, **optimizer},
            training={"train_steps": STEPS, "micro_batch_size": 8},
        )


def sizes_of_activations(corpus: Path, cases: list[Case]) -> list[dict[str, float]]:
    """Root mean squares on one batch of ids: of the residual stream at its end, and of logits."""
    from megadiff.diffusion import AttentionLayout
    from megadiff.models.config import DenoiserConfig
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    ids_BS = torch.randint(5, 400, (4, 32), generator=torch.Generator().manual_seed(0))
    streams: list[torch.Tensor] = []

    def measure(denoiser: Any, after: int) -> dict[str, float]:
        with torch.no_grad():
            logits = denoiser(ids_BS, torch.arange(32).expand_as(ids_BS), AttentionLayout())[..., :400]
        quantities = {"stream": streams[-1], "logits": logits}
        return {f"{name}, {after} steps": x.square().mean().sqrt().item() for name, x in quantities.items()}

    found = []
    for case in cases:
        config = case.config(corpus)
        scales = dataclasses.replace(config.model.scales, **case.changed)
        with mock.patch.object(DenoiserConfig, "scales", scales):
            trainer = Trainer(config, Path("unused"), groups)
            [denoiser] = trainer.denoisers
            denoiser.decoder.final_layernorm.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
            batches, sizes = trainer.training_batches(), measure(denoiser, 0)
            for step in range(1, STEPS + 1):
                trainer.train_step(batches)
                sizes |= measure(denoiser, step)
        found.append(sizes)
    parallel_groups.shutdown()
    return found


WIDTHS = ({}, {"width": 128}, {"width": 256})
DEPTHS = ({}, {"depth": 4}, {"depth": 8})
NARROW_AND_WIDE, SHALLOW_AND_DEEP = WIDTHS[::2], DEPTHS[::2]
SWEEPS: dict[str, tuple[tuple[dict[str, int], ...], dict[str, Any]]] = {
    "complete_p, all sizes": ((*WIDTHS, *DEPTHS[1:]), {}),
    "standard, widths": (WIDTHS, {"parametrization": "standard"}),
    "standard, depths": (DEPTHS, {"parametrization": "standard"}),
    "without residual_multiplier": (SHALLOW_AND_DEEP, {"changed": {"residual_multiplier": 2.0}}),
    "without logit_multiplier": (NARROW_AND_WIDE, {"changed": {"logit_multiplier": 8.0}}),
    "without inner_std": (NARROW_AND_WIDE, {"changed": {"inner_std": 2.5, "residual_std": 2.5}}),
    "without inner_lr": (NARROW_AND_WIDE, {"changed": {"inner_lr": 1 / WIDTH}}),
}
"""Models of growing width or depth. Each scale that is taken away stays at the smallest model's value."""
MOST_WITH, LEAST_WITHOUT = 2.0, 2.5
"""Largest over smallest size of an activation."""


def test_activations_are_of_one_order_at_any_size(corpus_dir: Path) -> None:
    """Before, after one and after eight steps. The logits of many steps say little: the loss bounds them by itself."""
    cases = {name: [Case(**{**of_size, **rest}) for of_size in sizes] for name, (sizes, rest) in SWEEPS.items()}
    [found] = run_ranks(1, sizes_of_activations, corpus_dir, [case for sweep in cases.values() for case in sweep])
    measured, spread = iter(found), {}
    for name, sweep in cases.items():
        of_sweep = [next(measured) for _ in sweep]
        assert all(sizes["logits, 0 steps"] == 0.0 for sizes in of_sweep)
        for quantity in ("stream, 0 steps", "logits, 1 steps", f"stream, {STEPS} steps"):
            values = [sizes[quantity] for sizes in of_sweep]
            spread[name, quantity] = max(values) / min(values)
            print(f"{name}, {quantity}: {' '.join(f'{value:.3f}' for value in values)}")  # for `pytest -s`
    with_all = {quantity: value for (name, quantity), value in spread.items() if name == "complete_p, all sizes"}
    assert max(with_all.values()) < MOST_WITH, with_all
    for name in SWEEPS:
        if name != "complete_p, all sizes":
            worst = max(value for (sweep, _), value in spread.items() if sweep == name)
            assert worst > LEAST_WITHOUT, f"{name}: nothing tells it from the whole"


INNER = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "linear_1", "linear_2")
TABLE: list[tuple[Case, float | None, float]] = [
    (Case(), None, 0.02 * LR),
    (Case(width=96, depth=3), None, 0.02 * LR),
    (Case(), 0.05, 0.05),
]
"""Models, `optimizer.decoupled_lr`, and the learning rate of embedding and head."""


def settings_of_groups(corpus: Path, cases: list[tuple[Case, float | None]]) -> list[dict[str, Any]]:
    """The settings of a step by parameter, and the first loss of an autoregressive model."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    groups, found = parallel_groups.initialize(parallel_groups.ParallelConfig()), []
    for case, decoupled_lr in cases:
        config = case.config(corpus, weight_decay=WEIGHT_DECAY, decoupled_lr=decoupled_lr)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, log_snr_conditioning=True))
        trainer = Trainer(config, Path("unused"), groups)
        names = {parameter: name for name, parameter in trainer.denoisers[0].named_parameters()}
        settings = {
            names[parameter]: [group[key] for key in ("lr", "weight_decay", "eps")]
            for group in trainer.optimizer.param_groups
            for parameter in group["params"]
        }
        autoregressive = dataclasses.replace(case.config(corpus), objective=AutoregressiveConfig())
        trainer = Trainer(autoregressive, Path("unused"), groups)
        found.append({"settings": settings, "loss": trainer.train_step(trainer.training_batches())["loss"]})
    parallel_groups.shutdown()
    return found


def test_groups_have_the_settings_of_the_table(corpus_dir: Path) -> None:
    """And the first prediction is uniform over all ids but the mask."""
    [found] = run_ranks(1, settings_of_groups, corpus_dir, [(case, decoupled_lr) for case, decoupled_lr, _ in TABLE])
    for (case, _, outer_lr), of_case in zip(TABLE, found, strict=True):
        eps = EPS / (case.width * case.depth)
        for name, settings in of_case["settings"].items():
            if "word_embeddings" in name or "output_layer" in name:
                expected = [outer_lr, 0.0, eps]
            elif "norm" in name or name.endswith(".bias"):
                expected = [0.02 * LR, 0.0, eps]
            else:
                assert any(f".{part}." in name for part in INNER), name
                expected = [LR / case.width, WEIGHT_DECAY * case.width, eps]
            assert settings == pytest.approx(expected, rel=1e-12), name
        assert len(of_case["settings"]) == 8 * case.depth + 7
        assert of_case["loss"] == pytest.approx(math.log(399), rel=1e-6)
