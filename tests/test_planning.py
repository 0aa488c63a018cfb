"""What a plan says, against schedules that are known, against settings that must help, and against measured steps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from measured_memory import CASES, predicted_and_measured
from tiny import tiny_config

from megadiff.cli import main
from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.models.config import DenoiserConfig
from megadiff.models.fp8 import Fp8Config
from megadiff.parallel.groups import ParallelConfig
from megadiff.plan_report import describe, what_would_help
from megadiff.planning import GIB, plan, plan_memory, schedule
from megadiff.training.config import TrainingConfig

VOCAB = 131_072
TEN_BILLION = TrainConfig(
    model=DenoiserConfig(num_layers=48, hidden_size=4096, num_attention_heads=32, num_query_groups=8),
    data=DataConfig(path="nowhere", sequence_length=4096),
    parallel=ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=4,
        use_distributed_optimizer=True,
    ),
    training=TrainingConfig(global_batch_size=4096, micro_batch_size=4),
)
TOLERANCE = 0.03
"""What the formulas leave out (gloo's copies, temporaries inside a kernel) took at most 2 % in all cases that were
measured; 3 % leave room for other versions of torch, and a forgotten tensor of a layer would take more."""


@pytest.mark.parametrize("batch_size, expected", [(256, 524_288), (1024, 2_097_152)])
def test_tokens_of_a_step_are_those_of_the_global_batch(batch_size: int, expected: int) -> None:
    config = dataclasses.replace(
        TEN_BILLION,
        data=DataConfig(path="nowhere", sequence_length=2048),
        training=TrainingConfig(global_batch_size=batch_size, micro_batch_size=4),
    )
    assert plan(config, 32, VOCAB).tokens_per_step == expected


def most_in_flight(stage: int, num_stages: int, virtual_stages: int, num_micro_batches: int) -> int:
    passes = list(schedule(stage, num_stages, virtual_stages, num_micro_batches))
    in_flight, most = 0, 0
    for direction, _ in passes:
        in_flight += 1 if direction == "forward" else -1
        most = max(most, in_flight)
    assert Counter(passes) == {
        (direction, chunk): num_micro_batches
        for direction in ("forward", "backward")
        for chunk in range(virtual_stages)
    }
    return most


def test_schedules_hold_what_their_warm_up_sends_ahead_and_one_more() -> None:
    for stage in range(4):
        assert most_in_flight(stage, 4, 1, 16) == 4 - stage
        assert most_in_flight(stage, 4, 3, 16) == 2 * (4 - stage - 1) + 2 * 4 + 1
    assert most_in_flight(0, 4, 1, 2) == 2  # no more than there are
    assert most_in_flight(0, 1, 1, 5) == 1


def test_interleaved_passes_go_through_the_chunks_in_groups() -> None:
    passes = list(schedule(1, 2, 2, 4))
    assert [chunk for direction, chunk in passes if direction == "forward"] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [chunk for direction, chunk in passes if direction == "backward"] == [1, 1, 0, 0, 1, 1, 0, 0]
    # The last rank is two micro-batches ahead when its first backward comes.
    assert [direction for direction, _ in passes[:4]] == ["forward", "forward", "forward", "backward"]


def test_ten_billion_parameters_on_512_ranks_are_planned_at_once() -> None:
    started = time.perf_counter()
    found = plan(TEN_BILLION, 512, VOCAB)
    assert time.perf_counter() - started < 1.0
    assert [stage.num_layers for stage in found.stages] == [12] * 4
    # Each rank holds half of its stage: embedding and final norm with head are on the ends.
    shards = sum(stage.parameters for stage in found.stages)
    gains = 48 * (2 * 4096 + 2 * 128) + 4096
    assert 2 * shards - gains == found.parameters
    assert found.stages[0].peak > found.stages[3].peak  # holds more micro-batches


def test_settings_that_save_memory_save_it_and_are_named_where_it_is_short() -> None:
    now = plan(TEN_BILLION, 512, VOCAB)
    helpful = what_would_help(TEN_BILLION, 512, VOCAB)
    settings = [setting for setting, _ in helpful]
    assert settings[0] == "--parallel.recompute-granularity full"
    assert "--parallel.sequence-parallel true" in settings and "--training.micro-batch-size 2" in settings
    assert "--parallel.use-distributed-optimizer true" not in settings  # it is on
    assert all(peak < now.worst.peak for _, peak in helpful)
    text = describe(now, 80.0, helpful)
    assert "does not fit 80 GiB on the ranks of stage(s) 0, 1, 2, 3" in text
    assert f"{helpful[0][1] / GIB:.2f} GiB   {settings[0]}" in text
    assert "fits 512 GiB" in describe(now, 512.0, [])


def test_the_peak_is_the_highest_phase_and_not_their_sum() -> None:
    small_batch = dataclasses.replace(
        TEN_BILLION,
        data=DataConfig(path="nowhere", sequence_length=2),
        parallel=ParallelConfig(use_distributed_optimizer=False),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=1),
    )
    [stage] = plan_memory(small_batch, 8, VOCAB)
    assert stage.phase == "optimizer step"
    assert stage.peak == stage.constant + 4 * VOCAB * 4096  # a scaled copy of the largest gradient, fp32
    [with_laprop] = plan_memory(small_batch.overridden(["--optimizer.algorithm", "laprop"]), 8, VOCAB)
    assert with_laprop.peak == stage.constant + 4 * stage.parameters  # a root of each second moment
    sharded = dataclasses.replace(small_batch, parallel=ParallelConfig(use_distributed_optimizer=True))
    [stage_of_eight] = plan_memory(sharded, 8, VOCAB)
    assert stage_of_eight.optimizer == pytest.approx(stage.optimizer / 8, rel=1e-6)
    instances = dataclasses.replace(sharded.parallel, num_distributed_optimizer_instances=2)
    [stage_of_two_fours] = plan_memory(dataclasses.replace(sharded, parallel=instances), 8, VOCAB)
    assert stage_of_two_fours.optimizer == pytest.approx(stage.optimizer / 4, rel=1e-6)


def test_an_average_costs_a_weight_and_offload_moves_state_to_the_host() -> None:
    """Per parameter of a rank that shares the optimizer's state with 63 others: 12 bytes, and 4 for the average."""
    settings = ["--optimizer.ema-decay", "0.999"]
    plain, averaged = (plan(config, 512, VOCAB) for config in (TEN_BILLION, TEN_BILLION.overridden(settings)))
    offloaded = plan(
        TEN_BILLION.overridden(
            [*settings, "--optimizer.optimizer-cpu-offload", "true", "--optimizer.optimizer-offload-fraction", "0.75"]
        ),
        512,
        VOCAB,
    )
    assert averaged.checkpoint_bytes - plain.checkpoint_bytes == 4 * plain.parameters
    for before, average, host in zip(plain.stages, averaged.stages, offloaded.stages, strict=True):
        assert before.optimizer % 12 == 0 and average.optimizer == before.optimizer * 16 // 12
        assert host.optimizer == average.optimizer // 4 and host.host == before.optimizer * 15 // 12
    assert plain.worst.host == 0 and "host memory" not in describe(plain, 80.0, [])
    assert f"{offloaded.worst.host / GIB:.2f} GiB of host memory" in describe(offloaded, 80.0, [])


def test_plan_command(tmp_path: Path, corpus_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from pathlib import Path\nfrom tiny import tiny_config\n\n\ndef config():\n"
        f"    return tiny_config(Path({str(corpus_dir)!r}))\n"
    )
    command = ["plan", str(recipe), "--world-size", "4"]
    assert main([*command, "--parallel.pipeline-model-parallel-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "fits 80 GiB" in printed and "backward: " in printed
    assert main([*command, "--json", "--training.micro-batch-size", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    [expected] = plan_memory(tiny_config(corpus_dir, training={"micro_batch_size": 1}), 4, 400)
    assert told["stages"][0]["peak"] == expected.peak and told["tokens_per_step"] == 8 * 32

    for options, message in (
        (["--world-size", "0"], "--world-size is 0, but must be at least 1"),
        (["--vocab-size", "1"], "--vocab-size is 1, but must be at least 2"),
        (["--data.path", "nowhere"], "there is no corpus nowhere that says how large the vocabulary is: give --vocab"),
        (["--parallel.tensor-model-parallel-size", "3"], "4 process(es) cannot hold copies"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_a_machine_without_devices_plans_for_one_with_transformer_engine() -> None:
    model = dataclasses.replace(TEN_BILLION.model, attention_backend="transformer_engine")
    assert plan_memory(dataclasses.replace(TEN_BILLION, model=model), 512, VOCAB) == plan_memory(
        TEN_BILLION, 512, VOCAB
    )


def test_a_machine_without_fp8_plans_for_one_that_has_it() -> None:
    """With copies of the matrices in FP8, and other tensors counted as bf16; what does not divide is told already."""
    training = dataclasses.replace(TEN_BILLION.training, precision="fp8")
    in_fp8 = dataclasses.replace(
        TEN_BILLION,
        training=training,
        model=dataclasses.replace(TEN_BILLION.model, transformer_impl="transformer_engine"),
    )
    bf16, fp8 = (plan(config, 512, VOCAB) for config in (TEN_BILLION, in_fp8))
    # 12 layers of a stage, each (1.5 + 1 + 4 + 4)·H² with a quarter of the key-value heads, over two ranks, two bytes.
    copies = [12 * 21 * 4096**2 // 2 // 2 * 2] * 4
    assert [stage.fp8_copies for stage in fp8.stages] == copies
    assert [a.peak - b.peak for a, b in zip(fp8.stages, bf16.stages, strict=True)] == copies
    assert [dataclasses.replace(stage, fp8_copies=0) for stage in fp8.stages] == bf16.stages
    assert "fp8_copies" in describe(fp8, 80, []) and "fp8_copies" not in describe(bf16, 80, [])
    gathered = dataclasses.replace(in_fp8, fp8=Fp8Config(param_gather=True))
    assert plan(gathered, 512, VOCAB) == bf16
    odd = dataclasses.replace(
        in_fp8,
        data=DataConfig(path="nowhere", sequence_length=2044),
        training=dataclasses.replace(training, micro_batch_size=1),
    )
    with pytest.raises(ValueError, match=r"a rank has 2044 tokens of a micro-batch .*multiple of 16"):
        plan(odd, 512, VOCAB)


MEASURED_IN_TESTS = (
    "one process, fp32",
    "full recompute",
    "fused head, masked noise",
    "tp2 sp",
    "pp2",
    "dp2, distributed optimizer",
)


@pytest.mark.slow
def test_measured_peaks_are_those_that_were_predicted(corpus_dir: Path) -> None:
    cases = [case for case in CASES if case.name in MEASURED_IN_TESTS]
    assert len(cases) == len(MEASURED_IN_TESTS)
    for case, stage, measured in predicted_and_measured(corpus_dir, cases, 128):
        where = f"{case.name}, stage {stage.stage}: {measured.alive_at_peak[:8]}"
        print(f"{case.name}, stage {stage.stage}: {stage.peak} {measured.peak} {stage.peak / measured.peak - 1:+.3f}")
        assert stage.peak == pytest.approx(measured.peak, rel=TOLERANCE), where
        assert stage.constant == pytest.approx(measured.at_start, rel=TOLERANCE), where
