"""Layouts that cannot be are refused in one sentence, before any process waits for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megadiff.parallel import groups
from megadiff.parallel.groups import ParallelConfig

PIPELINE = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0"),
        ({"context_parallel_size": 0}, "context_parallel_size is 0"),
        ({"recompute_num_layers": 0}, "recompute_num_layers is 0"),
        ({"timeout_minutes": float("inf")}, "timeout_minutes is inf"),
        ({"sequence_parallel": True}, "sequence_parallel is True, but must be false without tensor parallelism"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size is 2.* without a pipeline"),
        ({**PIPELINE, "virtual_pipeline_model_parallel_size": 1}, "is 1, but must be at least 2, or none"),
        ({"num_layers_in_first_pipeline_stage": 1}, "num_layers_in_first_pipeline_stage is 1.* without a pipeline"),
        ({**PIPELINE, "num_layers_in_last_pipeline_stage": 0}, "num_layers_in_last_pipeline_stage is 0"),
        ({"overlap_param_gather": True}, "overlap_param_gather is True.*: set both"),
        ({"num_distributed_optimizer_instances": 2}, "instances is 2, but must be 1 without"),
    ],
)
def test_refuses_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


def test_data_parallelism_is_what_the_world_leaves_over() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2)
    assert config.data_parallel_size(24) == 3
    with pytest.raises(ValueError, match=r"12 process.* tensor 2 x context 2 x pipeline 2 .* a multiple of 8"):
        config.data_parallel_size(12)
    instances = ParallelConfig(use_distributed_optimizer=True, num_distributed_optimizer_instances=2)
    with pytest.raises(ValueError, match=r"instances is 2, but must divide data x context = 3 ranks"):
        instances.data_parallel_size(3)


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"srun started 8 processes that do not know of each other .*: let srun start"):
        groups.launched_world_size()
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert groups.launched_world_size() == 64
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(groups.cpu, "install", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is not set, but 8 devices are visible: start with torchrun"):
        groups.initialize(ParallelConfig())
