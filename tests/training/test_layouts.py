"""Every layout trains the same model: same losses, same gradient norms, same bound, step by step.

Tolerance: fp32 sums in another order. Differences near 1e-7 in losses and 1e-6 in gradient norms are expected; 1e-5
is the promise. Within a layout the fused head keeps losses and bounds to 1e-6 of the plain path.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from tiny import tiny_config

TOLERANCE, FUSED_TOLERANCE = 1e-5, 1e-6


def run_layouts(corpus: Path, cases: list[dict[str, dict[str, Any]]]) -> list[dict[str, list[float]]]:
    """Train each case for six steps in this process group; what every rank saw."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import Trainer

    curves = []
    for case in cases:
        config = tiny_config(corpus, **case)
        groups = parallel_groups.initialize(config.parallel)
        trainer = Trainer(config, Path("unused"), groups)
        batches = trainer.training_batches()
        lines = [trainer.train_step(batches) for _ in range(config.training.train_steps)]
        estimate = trainer.validate()
        curves.append(
            {name: [line[name] for line in lines] for name in ("loss", "nelbo", "grad_norm")}
            | {"validation": [estimate.nelbo, estimate.stderr, estimate.bits_per_byte]}
        )
    parallel_groups.shutdown()
    return curves


def layout(
    tensor: int = 1,
    pipeline: int = 1,
    distributed_optimizer: bool = False,
    noise: str = "hybrid",
    fused: bool = False,
    **training: Any,
) -> dict[str, Any]:
    return {
        "objective": {"noise": noise},
        "model": {"fused_head_loss": fused},
        "parallel": {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "use_distributed_optimizer": distributed_optimizer,
        },
        "training": training,
    }


CASES = {
    1: {
        "tp1": layout(),
        "tp1, fused": layout(fused=True),
        "tp1, masked": layout(noise="masked"),
        "tp1, masked, fused": layout(noise="masked", fused=True),
        "micro-batch 8": layout(micro_batch_size=8),
        "micro-batch 1": layout(micro_batch_size=1),
    },
    2: {
        "tp2": layout(tensor=2),
        "tp2, fused": layout(tensor=2, fused=True),
        "tp2, masked": layout(tensor=2, noise="masked"),
        "tp2, masked, fused": layout(tensor=2, noise="masked", fused=True),
        "pp2": layout(pipeline=2),
        "pp2, fused": layout(pipeline=2, fused=True),
        "dp2": layout(),
        "dp2, distributed optimizer": layout(distributed_optimizer=True),
        "dp2, micro-batch 4": layout(micro_batch_size=4),
    },
    4: {
        "tp2 pp2": layout(tensor=2, pipeline=2),
        "tp2 dp2": layout(tensor=2, distributed_optimizer=True),
        "tp2 dp2, fused": layout(tensor=2, distributed_optimizer=True, fused=True),
    },
}

Curve = dict[str, list[float]]


def train_cases(world_size: int, corpus: Path) -> dict[str, list[Curve]]:
    """What every rank saw of each case."""
    cases = CASES[world_size]
    by_rank = run_ranks(world_size, run_layouts, corpus, list(cases.values()))
    return {name: [curves[i] for curves in by_rank] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def alone(corpus_dir: Path) -> dict[str, list[Curve]]:
    """One process, with the references: tp 1 · pp 1 · dp 1."""
    return train_cases(1, corpus_dir)


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, corpus_dir: Path, alone: dict[str, list[Curve]]) -> dict[str, list[Curve]]:
    """All cases of one number of processes."""
    return alone if request.param == 1 else train_cases(request.param, corpus_dir)


def deviations(curves: list[Curve], reference: Curve) -> dict[str, float]:
    """Largest relative difference of each quantity on any rank."""
    for values in (*reference.values(), *(values for curve in curves for values in curve.values())):
        assert all(map(math.isfinite, values)) and 0.0 not in values
    return {
        quantity: max(abs(a - b) / abs(b) for curve in curves for a, b in zip(curve[quantity], values, strict=True))
        for quantity, values in reference.items()
    }


def show(name: str, worst: dict[str, float]) -> None:
    """For `pytest -s`."""
    print(f"{name}: " + ", ".join(f"{quantity} {value:.1e}" for quantity, value in worst.items()))


def test_layouts_agree_with_one_process(trained: dict[str, list[Curve]], alone: dict[str, list[Curve]]) -> None:
    for name, curves in trained.items():
        [reference] = alone["tp1, masked" if "masked" in name else "tp1"]
        assert reference["loss"][-1] < reference["loss"][0], "the reference does not learn: nothing would be compared"
        worst = deviations(curves, reference)
        show(name, worst)
        assert max(worst.values()) <= TOLERANCE, f"{name}: {worst}"


def test_fused_head_changes_neither_losses_nor_bounds(trained: dict[str, list[Curve]]) -> None:
    fused_cases = [name for name in trained if name.endswith(", fused")]
    assert fused_cases
    for name in fused_cases:
        worst = deviations(trained[name], trained[name.removesuffix(", fused")][0])
        show(name, worst)
        assert max(worst[quantity] for quantity in ("loss", "nelbo", "validation")) <= FUSED_TOLERANCE, (
            f"{name}: {worst}"
        )
