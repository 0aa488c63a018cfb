"""Every layout trains the same model: same losses, same gradient norms, same bound, step by step.

Tolerance: fp32 sums in another order. Differences near 1e-7 in losses and 1e-6 in gradient norms are expected; 1e-5
is the promise. Within a layout the fused head keeps losses and bounds to 1e-6 of the plain path.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import layouts
import pytest
from distributed import run_ranks
from layouts import Layout
from tiny import tiny_config

from megadiff.objectives import BlockDiffusionConfig, DuoConfig, MdlmConfig, ObjectiveConfig

TOLERANCE, FUSED_TOLERANCE = 1e-5, 1e-6
STEPS = 8
VARIANTS: dict[str, dict[str, dict[str, Any] | ObjectiveConfig]] = {
    "": {},
    "fused": {"model": {"fused_head_loss": True}},
    "masked": {"objective": {"noise": "masked"}},
    "masked, fused": {"objective": {"noise": "masked"}, "model": {"fused_head_loss": True}},
    "micro-batch 1": {"training": {"micro_batch_size": 1}},
    "ramped": {"training": {"rampup_batch_size": (4, 4, 12), "micro_batch_size": 2}},
    "duo": {
        # The curriculum ends within a micro-batch of the fifth step.
        "objective": DuoConfig(curriculum_end_sample=35, curriculum_log10_temperature=(-0.5, -2.0)),
        "model": {"log_snr_conditioning": True},
    },
    "mdlm": {"objective": MdlmConfig(masking="exact_count")},
    "mdlm, fused": {"objective": MdlmConfig(masking="exact_count"), "model": {"fused_head_loss": True}},
    "block diffusion": {"objective": BlockDiffusionConfig(block_size=8)},
    "block diffusion, fused": {"objective": BlockDiffusionConfig(block_size=8), "model": {"fused_head_loss": True}},
}
"""What else a run may be; only fused heads and micro-batches change nothing."""
OWN_REFERENCES = ("masked", "ramped", "duo", "mdlm", "block diffusion")
"""Variants that are compared with themselves in one process, with the fused head or without."""

Case = tuple[Layout, str]
Curve = dict[str, list[float]]


def train_layouts(corpus: Path, cases: list[Case]) -> list[Curve]:
    """Train each case, all of the same process groups, for eight steps; what this rank saw."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    curves: list[Curve] = []
    groups = None
    for layout, variant in cases:
        sections: dict[str, Any] = {name: dict(settings) for name, settings in layout.sections.items()}
        for name, settings in VARIANTS[variant].items():
            sections[name] = settings if isinstance(settings, ObjectiveConfig) else sections.get(name, {}) | settings
        sections.setdefault("model", {})["num_layers"] = layouts.NUM_LAYERS
        config = tiny_config(corpus, **sections)
        lengths = {"train_steps": STEPS, "global_batch_size": layouts.GLOBAL_BATCH_SIZE}
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, **lengths))
        config.check(layout.world_size)
        groups = groups or parallel_groups.initialize(config.parallel)
        trainer = Trainer(config, Path("unused"), dataclasses.replace(groups, config=config.parallel))
        batches = trainer.training_batches()
        lines = [trainer.train_step(batches) for _ in range(STEPS)]
        estimate = trainer.validate()
        curves.append(
            {name: [line[name] for line in lines] for name in ("loss", "nelbo", "grad_norm", "consumed_samples")}
            | {"validation": [estimate.nelbo, estimate.stderr, estimate.bits_per_byte]}
        )
    parallel_groups.shutdown()
    return curves


def train_cases(world_size: int, corpus: Path, cases: list[Case], timeout: float) -> dict[Case, list[Curve]]:
    """What every rank saw of each case; those with the same process groups are trained by the same processes."""
    found = {}
    cases = sorted(cases, key=lambda case: str(case[0].sizes))
    for _, alike in itertools.groupby(cases, key=lambda case: case[0].sizes):
        some = list(alike)
        by_rank = run_ranks(world_size, train_layouts, corpus, some, timeout=timeout)
        found.update({case: [curves[i] for curves in by_rank] for i, case in enumerate(some)})
    return found


@pytest.fixture(scope="module")
def references(corpus_dir: Path) -> dict[tuple[bool, str], Curve]:
    """One process without any option, by packing and noise."""
    cases = [(Layout(packing=packing), variant) for packing in (False, True) for variant in ("", *OWN_REFERENCES)]
    trained = train_cases(1, corpus_dir, cases, timeout=180.0)
    for [curve] in trained.values():
        assert curve["loss"][-1] < curve["loss"][0], "the reference does not learn: nothing would be compared"
    return {(layout.packing, variant): curve for (layout, variant), [curve] in trained.items()}


def reference_of(case: Case, references: dict[tuple[bool, str], Curve]) -> Curve:
    layout, variant = case
    return references[layout.packing, next((name for name in OWN_REFERENCES if name in variant), "")]


def deviations(curves: list[Curve], reference: Curve) -> dict[str, float]:
    """Largest relative difference of each quantity on any rank."""
    for values in (*reference.values(), *(values for curve in curves for values in curve.values())):
        assert all(map(math.isfinite, values)) and 0.0 not in values
    return {
        quantity: max(abs(a - b) / abs(b) for curve in curves for a, b in zip(curve[quantity], values, strict=True))
        for quantity, values in reference.items()
    }


def check(trained: dict[Case, list[Curve]], references: dict[tuple[bool, str], Curve]) -> None:
    """Compare every case with its reference, and say which differ."""
    wrong = {}
    for (layout, variant), curves in trained.items():
        worst = deviations(curves, reference_of((layout, variant), references))
        shown = ", ".join(f"{quantity} {value:.1e}" for quantity, value in worst.items())
        print(f"{layout} {variant}: {shown}")  # for `pytest -s`
        if max(worst.values()) > TOLERANCE:
            wrong[f"{layout} {variant}"] = worst
    assert not wrong, wrong


CORE_CASES = [
    *((layout, "") for layout in layouts.CORE),
    (Layout(), "fused"),
    (Layout(), "masked, fused"),
    (Layout(), "micro-batch 1"),
    (Layout(tensor=2, sequence_parallel=True), "fused"),
    (Layout(tensor=2, sequence_parallel=True), "masked, fused"),
    (Layout(tensor=2, sequence_parallel=True), "masked"),
    (Layout(context=2), "masked, fused"),
    (Layout(pipeline=2, virtual=2), "fused"),
    (Layout(data=2), "ramped"),
    (Layout(tensor=2, sequence_parallel=True, distributed_optimizer=True), "duo"),
    (Layout(context=2, packing=True), "duo"),
    (Layout(pipeline=2, recompute="full"), "duo"),
    (Layout(data=2, distributed_optimizer=True, extra=layouts.OVERLAP), "duo"),
    (Layout(tensor=2, sequence_parallel=True), "mdlm, fused"),
    (Layout(context=2, packing=True), "block diffusion, fused"),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layouts_agree_with_one_process(
    world_size: int, corpus_dir: Path, references: dict[tuple[bool, str], Curve]
) -> None:
    cases = [case for case in CORE_CASES if case[0].world_size == world_size]
    trained = train_cases(world_size, corpus_dir, cases, timeout=180.0)
    check(trained, references)
    for (layout, variant), curves in trained.items():
        if "fused" in variant and (plain := (layout, variant.replace("fused", "").removesuffix(", "))) in trained:
            worst = deviations(curves, trained[plain][0])
            assert max(worst[quantity] for quantity in ("loss", "nelbo", "validation")) <= FUSED_TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_combination_of_four_processes_agrees_with_one(
    world_size: int, corpus_dir: Path, references: dict[tuple[bool, str], Curve]
) -> None:
    every = [(layout, "") for layout in layouts.EVERY + layouts.BEYOND_THE_GRID if layout.world_size == world_size]
    check(train_cases(world_size, corpus_dir, every, timeout=1800.0), references)
