"""Settings of GIDD: what they build, what masks they need, how they are written, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config

from megadiff.config import TrainConfig
from megadiff.diffusion import (
    Augmentation,
    CosineSchedule,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    TabulatedSchedule,
    UniformMixing,
)
from megadiff.objectives import GiddConfig, Vocabulary

VOCABULARY = Vocabulary(size=100, bos_id=0, eos_id=1, pad_id=2, mask_id=3)


@pytest.mark.parametrize(
    "settings, mixing, schedule",
    [
        (dict(noise="masked"), MaskedMixing(100, 3), NoiseSchedule()),
        (dict(noise="uniform", schedule="cosine"), UniformMixing(100, 3), CosineSchedule()),
        (
            dict(shift=-2.0, scale=0.5, min_log_snr=-5.0, max_log_snr=6.0, schedule="cosine"),
            HybridMixing(100, 3, -2.0, 0.5),
            CosineSchedule(-5.0, 6.0),
        ),
        (
            dict(schedule="table", alpha_table=(1.0, 0.3, 0.0)),
            HybridMixing(100, 3, 0.0),
            TabulatedSchedule(-9.0, 9.0, (1.0, 0.3, 0.0)),
        ),
    ],
)
def test_settings_build_their_process(settings: dict[str, Any], mixing: Any, schedule: NoiseSchedule) -> None:
    process = GiddConfig(**settings).build(VOCABULARY).process
    assert process.mixing == mixing and process.schedule == schedule
    assert type(process.schedule) is type(schedule)


def test_settings_reach_the_objective() -> None:
    config = GiddConfig(
        loss_weighting="nelbo",
        max_loss_weight=5.0,
        independent_level_fraction=0.2,
        linear_level_fraction=0.1,
        prompt_fraction=0.3,
        max_empty_token_fraction=0.4,
        random_length_fraction=0.01,
    )
    objective = config.build(VOCABULARY)
    assert objective.augmentation == Augmentation(
        max_empty_token_fraction=0.4, empty_id=2, random_length_fraction=0.01, prompt_fraction=0.3
    )
    for name in ("loss_weighting", "max_loss_weight", "independent_level_fraction", "linear_level_fraction"):
        assert getattr(objective, name) == getattr(config, name)


@pytest.mark.parametrize("shift, limit", [(-1000.0, "masked"), (1000.0, "uniform")])
def test_published_shifts_of_the_limits_are_the_limits(shift: float, limit: Any) -> None:
    log_snr = torch.linspace(-9, 9, 19, dtype=torch.float64)[:, None]
    of_shift, of_limit = (
        config.process(VOCABULARY).mixing.probs_at(log_snr, torch.arange(100))
        for config in (GiddConfig(shift=shift), GiddConfig(noise=limit))
    )
    torch.testing.assert_close(of_shift, of_limit, rtol=0, atol=1e-300)


@pytest.mark.parametrize(
    "settings, documents, prompts, features",
    [
        ({}, False, False, set()),
        ({}, True, True, {"documents", "clean prefix"}),
        (dict(prompt_fraction=0.2), False, False, {"clean prefix"}),
        (dict(random_length_fraction=0.01), False, False, {"documents"}),
        (dict(independent_level_fraction=0.5, max_empty_token_fraction=0.2), False, False, set()),
    ],
)
def test_masks_have_what_the_settings_need(
    settings: dict[str, Any], documents: bool, prompts: bool, features: set[str]
) -> None:
    assert GiddConfig(**settings).mask_features(documents=documents, prompts=prompts) == features


def test_tables_are_read_from_flags_and_written_to_yaml(tmp_path: Path) -> None:
    flags = ["--objective.schedule", "table", "--objective.alpha-table", "1,0.8,0.1,0"]
    config = tiny_config(tmp_path).overridden(flags)
    assert isinstance(config.objective, GiddConfig) and config.objective.alpha_table == (1.0, 0.8, 0.1, 0.0)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(path) == config


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(scale=1.5), r"objective.scale is 1.5, but hybrid noise is a Markov process only for \|scale\| ≤ 1"),
        (
            dict(schedule="table"),
            "objective.schedule is table with 0 values in objective.alpha_table, but must be table",
        ),
        (dict(alpha_table=(1.0, 0.0)), "objective.schedule is linear with 2 values"),
        (dict(schedule="table", alpha_table=(1.0, 0.5)), "alphas must fall from"),
        (dict(min_log_snr=9.0, max_log_snr=-9.0), "min_log_snr must be below max_log_snr"),
        (dict(shift=math.inf), "shift and scale must be finite"),
        (dict(prompt_fraction=2.0), r"prompt_fraction must lie in \[0, 1\], got 2.0"),
        (dict(independent_level_fraction=0.7, linear_level_fraction=0.7), "sum is at most 1, got 0.7 and 0.7"),
        (dict(max_loss_weight=-1.0), "max_loss_weight must be positive, got -1.0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GiddConfig(**settings)
