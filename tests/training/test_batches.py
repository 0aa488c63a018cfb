"""Batches and layouts that fit together: sizes of a ramp, refusals of what does not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from tiny import tiny_config

from megadiff import accelerations, fields
from megadiff.models.config import DenoiserConfig
from megadiff.models.denoiser import transformer_config
from megadiff.parallel.groups import ParallelConfig
from megadiff.training.config import TrainingConfig


def test_a_ramp_uses_each_size_for_an_equal_share_of_the_samples() -> None:
    config = TrainingConfig(global_batch_size=32, micro_batch_size=4, rampup_batch_size=(8, 8, 96))
    sizes, consumed = [], 0
    while config.global_batch_size_at(consumed) < 32 or len(sizes) < 10:
        sizes.append(config.global_batch_size_at(consumed))
        consumed += sizes[-1]
    assert sizes[:8] == [8, 8, 8, 8, 16, 16, 24, 24] and set(sizes[8:]) == {32}
    assert sum(sizes[:8]) >= 96 > sum(sizes[:7])
    config.check_batches(data_parallel_size=2)
    assert fields.parse_value("--x", "8,8,96", tuple[int, int, int] | None) == (8, 8, 96)
    assert TrainingConfig(global_batch_size=8, rampup_batch_size=(8, 8, 96)).global_batch_size_at(0) == 8


@pytest.mark.parametrize("ramp", [(0, 8, 96), (8, 0, 96), (8, 7, 96), (40, 8, 96), (8, 8, -1)])
def test_refuses_a_ramp_that_does_not_lead_to_the_batch(ramp: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"training.rampup_batch_size is .* lead from start to"):
        TrainingConfig(global_batch_size=32, rampup_batch_size=ramp)


@pytest.mark.parametrize(
    ("training", "multiple", "message"),
    [
        ({"global_batch_size": 12}, 1, "training.global_batch_size 12 is not a multiple of .* = 8: change one"),
        ({"rampup_batch_size": (4, 4, 9)}, 1, "the start of training.rampup_batch_size 4 is not a multiple of"),
        ({"rampup_batch_size": (8, 4, 9)}, 1, "its increment 4 is not a multiple of"),
        ({"global_batch_size": 24}, 2, "global_batch_size 24 is not a multiple of .* x pipeline stages 2 = 16"),
    ],
)
def test_refuses_batches_that_do_not_divide(training: dict[str, Any], multiple: int, message: str) -> None:
    config = TrainingConfig(**{"global_batch_size": 32, "micro_batch_size": 4, **training})
    with pytest.raises(ValueError, match=message):
        config.check_batches(2, multiple)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [3, 3, 3, 3]),
        ({"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}, [3, 4, 4, 1]),
        ({"num_layers_in_last_pipeline_stage": 6}, [2, 2, 2, 6]),
        ({"virtual_pipeline_model_parallel_size": 3}, [3, 3, 3, 3]),
    ],
)
def test_layers_per_stage_are_those_that_megatron_builds(settings: dict[str, Any], expected: list[int]) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=4, **settings)
    model = DenoiserConfig(num_layers=12)
    assert model.layers_per_stage(parallel) == expected
    config = transformer_config(model, parallel, dtype=torch.float32)
    built = [
        sum(get_num_layers_to_build(config, vp_stage=virtual, pp_rank=rank) for virtual in range(stages))
        if (stages := parallel.num_virtual_stages) > 1
        else get_num_layers_to_build(config, pp_rank=rank)
        for rank in range(4)
    ]
    assert built == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers_in_first_pipeline_stage": 2}, r"12 does not divide over .* 10 layer\(s\) are left for 3 equal"),
        ({"num_layers_in_first_pipeline_stage": 12}, r"0 layer\(s\) are left for 3 equal"),
        ({"virtual_pipeline_model_parallel_size": 2}, r"the 3 layer\(s\) of pipeline stage 0 do not divide over"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 8,
                "num_layers_in_last_pipeline_stage": 4,
            },
            "stage 8 and ..._last_pipeline_stage 4 leave no other stage, which Megatron's virtual stages cannot count",
        ),
    ],
)
def test_refuses_layers_that_do_not_divide(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(num_layers=12).layers_per_stage(
            ParallelConfig(**{"pipeline_model_parallel_size": 4, **settings})
        )


def test_refuses_what_only_the_whole_configuration_knows(corpus_dir: Any) -> None:
    def check(world_size: int, **sections: dict[str, Any]) -> None:
        tiny_config(corpus_dir, **sections).check(world_size)

    odd = {"sequence_length": 34}
    with pytest.raises(
        ValueError,
        match=r"sequence_length 34 under .*gidd.* not a multiple of 4, .*two pieces per rank",
    ):
        check(2, data=odd, parallel={"context_parallel_size": 2})
    with pytest.raises(ValueError, match=r"34 .*is not a multiple of 8, .*sequence_parallel True"):
        check(4, data=odd, parallel={
            "context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True
        })  # fmt: skip
    interleaved = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    with pytest.raises(ValueError, match=r"global_batch_size 2 is not a multiple of .* pipeline stages 2 = 4"):
        check(2, model={"num_layers": 4}, training={"global_batch_size": 2}, parallel=interleaved)


@pytest.mark.parametrize("usable", [False, True])
def test_transformer_engine_attends_where_it_can_and_keeps_documents_as_long_as_they_are(
    monkeypatch: pytest.MonkeyPatch, usable: bool
) -> None:
    monkeypatch.setattr(accelerations, "has_transformer_engine_attention", lambda: usable)
    auto, asked = DenoiserConfig(), DenoiserConfig(attention_backend="transformer_engine")
    whole, divided = ParallelConfig(), ParallelConfig(context_parallel_size=2)
    theirs = "transformer_engine" if usable else "local"
    assert auto.resolved_attention(whole, mask_features={"documents"}, half_precision=True) == theirs
    assert auto.resolved_attention(divided, mask_features=(), half_precision=True) == theirs
    assert auto.resolved_attention(divided, mask_features={"documents"}, half_precision=True) == "local"
    assert (
        DenoiserConfig(attention_backend="local").resolved_attention(whole, mask_features=(), half_precision=True)
        == "local"
    )
    with pytest.raises(ValueError, match=r"would pad every document .*context_parallel_size 2: choose local"):
        asked.resolved_attention(divided, mask_features={"documents"}, half_precision=True)
    assert auto.resolved_attention(whole, mask_features=(), half_precision=False) == "local"
    if usable:
        with pytest.raises(ValueError, match=r"kernels compute in 16 bits, but training.precision is fp32"):
            asked.resolved_attention(whole, mask_features=(), half_precision=False)
        assert asked.resolved_attention(whole, mask_features={"documents"}, half_precision=True) == "transformer_engine"
    else:
        with pytest.raises(ValueError, match=r"transformer_engine, but there is no CUDA device or no"):
            asked.resolved_attention(whole, mask_features=(), half_precision=True)


def test_settings_of_training_do_not_hinder_evaluation(corpus_dir: Any) -> None:
    config = tiny_config(
        corpus_dir, optimizer={"optimizer_cpu_offload": True}, model={"attention_backend": "transformer_engine"}
    )
    config.check_layout(1)
    with pytest.raises(ValueError, match=r"use_distributed_optimizer"):
        config.check(1)
