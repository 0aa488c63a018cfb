"""Every layout trains the same model: same losses, same gradient norms, same bound, step by step.

Tolerance: fp32 sums in another order. Differences near 1e-7 in losses and 1e-6 in gradient norms are expected; 1e-5
is the promise. Within a layout the fused head keeps losses and bounds to 1e-6 of the plain path.

In FP8 such a difference moves some number, here and there, to the next of its 253: by 6 %. Losses then differ by 5e-4
within eight steps; that parts are rounded as the whole is held to 1e-6 layer by layer, in tests/models/test_fp8_layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import layouts
import pytest
from distributed import run_ranks
from layouts import Layout
from tiny import tiny_config
from variants import EVERY_OBJECTIVE, VARIANTS, same_run

from megadiff.data.preprocess import PrepareConfig, prepare
from megadiff.objectives import ObjectiveConfig

TOLERANCE, FUSED_TOLERANCE = 1e-5, 1e-6
FP8_TOLERANCE = {"loss": 1e-3, "nelbo": 1e-3, "grad_norm": 1e-2, "consumed_samples": 0.0, "validation": 1e-3}
STEPS = 8
Case = tuple[Layout, str]
Curve = dict[str, list[float]]


def train_layouts(corpus: Path, cases: list[Case]) -> list[Curve]:
    """Train each case, all of the same process groups, for eight steps; what this rank saw."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.config import TrainingConfig
    from megadiff.training.trainer import Trainer

    # Under FP8 too: bf16 rounds sums of another order to other numbers, in every layer.
    TrainingConfig.parameter_precision = property(lambda self: "fp32")  # type: ignore[assignment, method-assign]
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
def lines_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which every line of a package's source is a document: samples of 32 tokens hold several."""
    directory = tmp_path_factory.mktemp("lines")
    library = Path(sysconfig.get_paths()["stdlib"]) / "logging"
    lines = [line for path in sorted(library.glob("*.py")) for line in path.read_text().splitlines() if line.strip()]
    (directory / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings: dict[str, Any] = {"vocab_size": 400, "validation_fraction": 0.2}
    prepare(PrepareConfig(input=(str(directory / "lines.jsonl"),), output_dir=directory / "corpus", **settings))
    return directory / "corpus"


@pytest.fixture(scope="module")
def references(lines_dir: Path) -> References:
    return References(lines_dir)


class References:
    """What one process without any option sees, trained when it is first asked for."""

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus
        self.curves: dict[tuple[bool, str], Curve] = {}

    def of(self, cases: Iterable[Case]) -> dict[Case, Curve]:
        """The curves that cases should have, by packing and variant."""
        named = {(layout, variant): (layout.packing, same_run(variant)) for layout, variant in cases}
        missing = dict.fromkeys(name for name in named.values() if name not in self.curves)
        alone: list[Case] = [(Layout(packing=packing), variant) for packing, variant in missing]
        if alone:
            for (layout, variant), [curve] in train_cases(1, self.corpus, alone, timeout=300.0).items():
                change = curve["validation"][0] - math.log(399)  # the bound of a head of zeros over 400 ids
                assert abs(change) > 0.01, f"{variant} does not learn: nothing would be compared"
                other = self.curves.get((not layout.packing, variant))
                assert other is None or other["loss"] != curve["loss"], "packing changes nothing in these samples"
                self.curves[layout.packing, variant] = curve
        return {case: self.curves[name] for case, name in named.items()}


def deviations(curves: list[Curve], reference: Curve) -> dict[str, float]:
    """Largest relative difference of each quantity on any rank."""
    for values in (*reference.values(), *(values for curve in curves for values in curve.values())):
        assert all(map(math.isfinite, values)) and 0.0 not in values
    return {
        quantity: max(abs(a - b) / abs(b) for curve in curves for a, b in zip(curve[quantity], values, strict=True))
        for quantity, values in reference.items()
    }


def check(trained: dict[Case, list[Curve]], references: References) -> None:
    """Compare every case with its reference, and say which differ."""
    wrong, expected = {}, references.of(trained)
    for (layout, variant), curves in trained.items():
        worst = deviations(curves, expected[layout, variant])
        shown = ", ".join(f"{quantity} {value:.1e}" for quantity, value in worst.items())
        print(f"{layout} {variant}: {shown}")  # for `pytest -s`
        tolerance = FP8_TOLERANCE if "fp8" in variant else dict.fromkeys(worst, TOLERANCE)
        if any(value > tolerance[quantity] for quantity, value in worst.items()):
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
    (Layout(tensor=2, sequence_parallel=True), "gated"),
    (Layout(tensor=2, sequence_parallel=True), "mdlm, exact count, fused"),
    (Layout(tensor=2, sequence_parallel=True), "duo, curriculum"),
    (Layout(context=2, packing=True), "block diffusion, fused"),
    (Layout(context=2), "eso-lm"),
    (Layout(pipeline=2, virtual=2), "gidd, all options"),
    (Layout(data=2), "autoregressive, fused"),
    (Layout(tensor=2, sequence_parallel=True, recompute="selective"), "complete_p, laprop, fused"),
    (Layout(pipeline=2, virtual=2, recompute="full"), "complete_p, laprop"),
    (Layout(context=2), "complete_p, laprop"),
    (Layout(data=2, distributed_optimizer=True), "complete_p, laprop, fused"),
    (Layout(recompute="full"), "fp8-emulated"),
    (Layout(tensor=2), "fp8-emulated"),
    (Layout(tensor=2, sequence_parallel=True, recompute="selective"), "gated, fp8-emulated"),
    (Layout(context=2), "fp8-emulated, fused"),
    (Layout(pipeline=2, virtual=2), "gated, fp8-emulated"),
    (Layout(data=2, distributed_optimizer=True), "fp8-emulated"),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layouts_agree_with_one_process(world_size: int, lines_dir: Path, references: References) -> None:
    cases = [case for case in CORE_CASES if case[0].world_size == world_size]
    trained = train_cases(world_size, lines_dir, cases, timeout=180.0)
    check(trained, references)
    for (layout, variant), curves in trained.items():
        if "fused" in variant and (plain := (layout, variant.replace("fused", "").removesuffix(", "))) in trained:
            worst = deviations(curves, trained[plain][0])
            assert max(worst[quantity] for quantity in ("loss", "nelbo", "validation")) <= FUSED_TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "whole"),
    [(1, True), (2, True), (4, False), pytest.param(4, True, marks=pytest.mark.exhaustive)],
)
def test_every_combination_of_four_processes_agrees_with_one(
    world_size: int, whole: bool, lines_dir: Path, references: References
) -> None:
    """On four processes a third of them, which takes minutes, or all."""
    grid = [layout for layout in layouts.EVERY if whole or layouts.is_in_third(layout)]
    every = [(layout, "") for layout in grid + layouts.BEYOND_THE_GRID if layout.world_size == world_size]
    check(train_cases(world_size, lines_dir, every, timeout=1800.0), references)


def test_a_third_of_the_grid_meets_every_option_of_every_division() -> None:
    options = [(name, value) for option in layouts.OPTIONS for name, value in option.items()]
    for division in layouts.DIVISIONS:
        third = [layout for layout in layouts.EVERY if layout.division == division and layouts.is_in_third(layout)]
        assert len(third) == len(layouts.OPTIONS) // 3
        assert {(name, getattr(layout, name)) for layout in third for name, _ in options} == set(options)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_every_objective_agrees_on_every_way_to_divide(packing: bool, lines_dir: Path, references: References) -> None:
    divided = [
        Layout(tensor=2, sequence_parallel=True, recompute="selective", packing=packing),
        Layout(pipeline=2, virtual=2, recompute="full", packing=packing),
        Layout(context=2, packing=packing),
        Layout(data=2, distributed_optimizer=True, packing=packing),
    ]
    cases = [(layout, variant) for layout in divided for variant in EVERY_OBJECTIVE]
    check(train_cases(2, lines_dir, cases, timeout=600.0), references)
