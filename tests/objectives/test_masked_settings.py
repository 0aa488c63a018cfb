"""Settings of masked and block diffusion: what they build, what a run refuses before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from megadiff.config import TrainConfig
from megadiff.diffusion import ExactCountMasking, LevelMasking
from megadiff.objectives import BlockDiffusionConfig, MdlmConfig, Vocabulary

VOCABULARY = Vocabulary(size=400, mask_id=3, bos_id=1, eos_id=2, pad_id=0)


def test_settings_reach_the_objective(tmp_path: Path) -> None:
    options = {
        "block-size": "8",
        "masking": "exact_count",
        "loss-weighting": "simple",
        "random-length-fraction": "0.01",
    }
    config = tiny_config(tmp_path).overridden(
        ["--objective", "block_diffusion", *(f"--objective.{name}={value}" for name, value in options.items())]
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config
    objective = config.objective.build(VOCABULARY)
    assert (objective.block_size, objective.random_length_fraction) == (8, 0.01)
    assert isinstance(objective.masking, ExactCountMasking) and objective.masking.loss_weighting == "simple"
    assert config.objective.gives_log_snr and config.objective.model_length(32) == 64
    assert config.objective.mask_features(documents=False, prompts=False) == {"block diffusion", "documents"}


def test_levels_are_the_default() -> None:
    for config in (MdlmConfig(), BlockDiffusionConfig()):
        masking = config.build(VOCABULARY).masking
        assert isinstance(masking, LevelMasking) and masking.loss_weighting == "nelbo"
    assert MdlmConfig().model_length(32) == 32 and MdlmConfig().mask_features(documents=False, prompts=True) == set()
    process = MdlmConfig(epsilon=0.01).process(VOCABULARY)
    assert process.alpha(process.schedule.log_snr(torch.ones(1))).item() == pytest.approx(0.01)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective\.masking is 'counts', but must be one of levels, exact_count"):
        MdlmConfig(masking="counts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"epsilon must lie in"):
        BlockDiffusionConfig(epsilon=0.0)
    config = tiny_config(tmp_path, objective=BlockDiffusionConfig(block_size=5))
    with pytest.raises(ValueError, match=r"block_size must be a positive divisor of the 32 tokens of a sample, got 5"):
        config.check(1)
