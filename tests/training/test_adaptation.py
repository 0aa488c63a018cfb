"""A diffusion model that begins with autoregressive weights: nothing is lost at the start, and much is gained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from tiny import tiny_config

from megadiff.objectives import AutoregressiveConfig, MdlmConfig, ObjectiveConfig

STEPS, ADAPTING_STEPS = 150, 40


def nelbo_after(
    groups: Any, corpus: Path, run_dir: Path, steps: int, objective: ObjectiveConfig, source: Path | None
) -> float:
    """Train and save a run; its bound on held-out text."""
    from megadiff.training.loop import train
    from megadiff.training.metrics import read_metrics

    config = tiny_config(
        corpus,
        objective=objective,
        optimizer={"lr": 1e-2, "decoupled_lr": 5e-2},
        validation={"num_sequences": 256},
        checkpoint={"interval": 0},
    )
    training: dict[str, Any] = {"train_steps": steps, "init_from": None if source is None else str(source)}
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    config.check(1)
    assert train(config, run_dir, groups)
    return read_metrics(run_dir)[-1]["nelbo"]


def adapt(corpus: Path, folder: Path) -> dict[str, float]:
    """Bounds of a diffusion model after few steps, by where it began."""
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    source = folder / "autoregressive"
    found = {"autoregressive": nelbo_after(groups, corpus, source, STEPS, AutoregressiveConfig(), None)}
    adapted = MdlmConfig(masking="exact_count", shift_inputs=True, attention_annealing_samples=8 * ADAPTING_STEPS // 2)
    plain = MdlmConfig(masking="exact_count")
    for name, objective, start in (
        ("from nothing", plain, None),
        ("adapted", adapted, source),
        ("without shift and annealing", plain, source),
    ):
        found[name] = nelbo_after(groups, corpus, folder / name.replace(" ", "_"), ADAPTING_STEPS, objective, start)
    parallel_groups.shutdown()
    return found


@pytest.mark.slow
def test_autoregressive_weights_are_worth_more_than_none(corpus_dir: Path, tmp_path: Path) -> None:
    """The same 40 steps of masked diffusion. Over six seeds the differences were 0.32 ± 0.02 and 0.24 ± 0.02, each."""
    [found] = run_ranks(1, adapt, corpus_dir, tmp_path, timeout=300.0)
    print(found)  # for `pytest -s`
    assert found["adapted"] < found["from nothing"] - 0.15
    assert found["adapted"] < found["without shift and annealing"] - 0.06
