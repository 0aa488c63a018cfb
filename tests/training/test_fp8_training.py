"""Training with FP8 products, emulated: near bf16, not equal to it, and a run goes on in either."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from tiny import tiny_config

from megadiff.integrity import read_manifest

STEPS = 12
NEAR = 0.02
"""Relative difference of losses from those of bf16; 0.5 % were seen."""
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
