"""Every layout trains the same model: same losses, same gradient norms, same bound, step by step.

Tolerance: fp32 sums in another order. Differences near 1e-7 in losses and 1e-6 in gradient norms are expected; 1e-5
is the promise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from tiny import tiny_config

TOLERANCE = 1e-5


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


def layout(tensor: int = 1, pipeline: int = 1, distributed_optimizer: bool = False, **training: Any) -> dict[str, Any]:
    return {
        "parallel": {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "use_distributed_optimizer": distributed_optimizer,
        },
        "training": training,
    }


@pytest.fixture(scope="module")
def reference(corpus_dir: Path) -> dict[str, list[float]]:
    """One process, tp 1 · pp 1 · dp 1."""
    [curve] = run_ranks(1, run_layouts, corpus_dir, [layout()])[0]
    assert curve["loss"][-1] < curve["loss"][0], "the reference run does not learn: the comparison would be empty"
    return curve


CASES = {
    1: {"micro-batch 8": layout(micro_batch_size=8), "micro-batch 1": layout(micro_batch_size=1)},
    2: {
        "tp2": layout(tensor=2),
        "pp2": layout(pipeline=2),
        "dp2": layout(),
        "dp2, distributed optimizer": layout(distributed_optimizer=True),
        "dp2, micro-batch 4": layout(micro_batch_size=4),
    },
    4: {"tp2 pp2": layout(tensor=2, pipeline=2), "tp2 dp2": layout(tensor=2, distributed_optimizer=True)},
}


def deviation(values: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    assert all(map(math.isfinite, values + expected)) and 0.0 not in expected
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("world_size", CASES)
def test_layouts_agree_with_one_process(world_size: int, corpus_dir: Path, reference: dict[str, list[float]]) -> None:
    cases = CASES[world_size]
    by_rank = run_ranks(world_size, run_layouts, corpus_dir, list(cases.values()))
    for i, name in enumerate(cases):
        worst = {
            quantity: max(deviation(curves[i][quantity], reference[quantity]) for curves in by_rank)
            for quantity in reference
        }
        print(f"{name}: " + ", ".join(f"{quantity} {value:.1e}" for quantity, value in worst.items()))  # shown by -s
        assert max(worst.values()) <= TOLERANCE, f"{name}: {worst}"
