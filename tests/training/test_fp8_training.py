"""Training with FP8 products, emulated: near bf16, not equal to it, and a run goes on in either."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from models import te_stand_in
from tiny import tiny_config

from megadiff.integrity import read_manifest
from megadiff.models.fp8 import Fp8Config

STEPS = 12
NEAR = 0.02
"""Largest relative difference of losses from those of bf16; 0.2 % were seen."""
Phases = list[tuple[int, str, dict[str, Any]]]
"""Up to which step a run is in which precision, with which settings of FP8."""


def train_phases(corpus: Path, run_dir: Path, phases: Phases) -> None:
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import train

    for last_step, precision, fp8 in phases:
        config = tiny_config(
            corpus,
            model={"num_layers": 3},
            training={"precision": precision, "train_steps": last_step},
            optimizer={"lr_decay_style": "constant"},
            fp8=fp8,
        )
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, interval=0))
        config.check(1)
        with parallel_groups.joined(config.parallel) as groups:
            train(config, run_dir, groups)


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def runs(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("runs")
    third = STEPS // 3
    phases: dict[str, Phases] = {
        "bf16": [(STEPS, "bf16", {})],
        "fp8": [(STEPS, "fp8-emulated", {})],
        "fp8 in the middle layer": [(STEPS, "fp8-emulated", {"first_last_layers_bf16": True})],
        "no fp8 in three layers": [
            (STEPS, "fp8-emulated", {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2})
        ],
        "by turns": [(third, "bf16", {}), (2 * third, "fp8-emulated", {}), (STEPS, "bf16", {})],
    }
    for name, of_run in phases.items():
        run_ranks(1, train_phases, corpus_dir, directory / name, of_run)
    return {name: directory / name for name in phases}


def test_losses_are_near_those_of_bf16_and_differ_by_what_is_rounded(runs: dict[str, Path]) -> None:
    curves = {name: losses(run) for name, run in runs.items()}
    for name, curve in curves.items():
        assert len(curve) == STEPS and largest_difference(curve, curves["bf16"]) < NEAR, name
    assert curves["no fp8 in three layers"] == curves["bf16"]
    for one, other in itertools.combinations(["bf16", "fp8", "fp8 in the middle layer"], 2):
        assert curves[one] != curves[other]


def test_a_run_goes_on_in_fp8_and_back_under_the_same_names(runs: dict[str, Path]) -> None:
    by_turns, bf16, third = losses(runs["by turns"]), losses(runs["bf16"]), STEPS // 3
    assert by_turns[:third] == bf16[:third] and by_turns[third:] != bf16[third:]
    manifests = {
        name: read_manifest(run / "checkpoints" / f"step_{STEPS:08d}")
        for name, run in runs.items()
        if name in ("bf16", "fp8")
    }
    assert [manifest["precision"] for manifest in manifests.values()] == ["bf16", "bf16"]
    assert manifests["fp8"]["linear_precision"] == "fp8-emulated" and manifests["fp8"]["transformer_impl"] == "local"


def gathered_in_fp8(fp8: Fp8Config) -> tuple[bool, str | None]:
    """What data parallelism and the optimizer of Megatron are told."""
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import Denoiser
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.chunks import wrap_chunks
    from megadiff.training.optimizer import OptimizerConfig, build_optimizer

    te_stand_in.install()
    groups = parallel_groups.initialize(parallel_groups.ParallelConfig(use_distributed_optimizer=True))
    model, dtype = DenoiserConfig(num_layers=1, hidden_size=32, num_attention_heads=4), torch.bfloat16
    sizes = {"vocab_size": 400, "sequence_length": 32, "seed": 0}
    denoiser = Denoiser(model, groups, **sizes, dtype=dtype, transformer_impl="transformer_engine", fp8=fp8)
    chunks = wrap_chunks([denoiser], groups.config, before_reduction=lambda: None)
    optimizer = build_optimizer(OptimizerConfig(), chunks, groups, scales=model.scales, dtype=dtype)
    told = (chunks[0].ddp_config.fp8_param_gather, optimizer.config.fp8_recipe)
    parallel_groups.shutdown()
    return told


@pytest.mark.parametrize(
    "fp8, told",
    [
        (Fp8Config(recipe="blockwise", param_gather=True), (True, "blockwise")),
        (Fp8Config(recipe="blockwise"), (False, None)),
    ],
)
def test_megatron_is_told_of_parameters_in_fp8_alone(fp8: Fp8Config, told: tuple[bool, str | None]) -> None:
    assert run_ranks(1, gathered_in_fp8, fp8) == [told]
