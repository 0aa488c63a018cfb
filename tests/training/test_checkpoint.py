"""Checkpoints open on any layout, survive crashes, and say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from tiny import tiny_config

from megadiff.training.checkpoint import CheckpointConfig, candidates, find_checkpoint, list_checkpoints, outdated

TOLERANCE = 1e-5
SAVED_AFTER, STEPS = 3, 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


def losses(trainer: Any, num_steps: int) -> list[float]:
    batches = trainer.training_batches()
    return [trainer.train_step(batches)["loss"] for _ in range(num_steps)]


def save_and_continue_elsewhere(
    corpus: Path, run_dir: Path, distributed_optimizer: bool, algorithm: str
) -> dict[str, Any]:
    """Train six steps on tp 2, saving after three; repeat the last three from that checkpoint on every layout.

    Returns the losses of the last three steps by layout ("unbroken" never stopped), and what a damaged checkpoint said.
    """
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    def build(layout: dict[str, Any]) -> Trainer:
        parallel = {**layout, "use_distributed_optimizer": distributed_optimizer}
        optimizer = {"algorithm": algorithm}
        config = tiny_config(corpus, parallel=parallel, optimizer=optimizer, training={"train_steps": STEPS})
        return Trainer(config, run_dir, parallel_groups.initialize(config.parallel))

    trainer = build(LAYOUTS["tp2"])
    losses(trainer, SAVED_AFTER)
    (run_dir / "checkpoints" / "step_00000001.partial" / "state").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "step_00000002.deleting").mkdir(parents=True, exist_ok=True)
    trainer.save()
    found: dict[str, Any] = {"unbroken": losses(trainer, STEPS - SAVED_AFTER)}

    for name, layout in LAYOUTS.items():
        trainer = build(layout)
        trainer.resume()
        assert trainer.completed_steps == SAVED_AFTER and trainer.consumed_samples == SAVED_AFTER * 8
        found[name] = losses(trainer, STEPS - SAVED_AFTER)

    trainer = build(LAYOUTS["tp2"])
    if trainer.groups.rank == 0:
        for path in (run_dir / "checkpoints" / "step_00000003" / "state").glob("*.distcp"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    trainer.groups.control.barrier().wait()
    try:
        trainer.resume()
        found["damaged"] = "loaded"
    except ValueError as error:
        found["damaged"] = str(error)
    return found


@pytest.mark.parametrize(
    ("distributed_optimizer", "algorithm"),
    [(False, "adamw"), *(pytest.param(True, name, marks=pytest.mark.slow) for name in ("adamw", "laprop"))],
)
def test_another_layout_goes_on_with_the_same_losses(
    corpus_dir: Path, tmp_path: Path, distributed_optimizer: bool, algorithm: str
) -> None:
    ranks = run_ranks(2, save_and_continue_elsewhere, corpus_dir, tmp_path, distributed_optimizer, algorithm)
    for found in ranks:
        for layout in LAYOUTS:
            assert found[layout] == pytest.approx(found["unbroken"], rel=TOLERANCE), layout
        assert found["tp2"] == found["unbroken"]
        assert "no checkpoint to start from is undamaged" in found["damaged"]
        assert "step_00000003 is damaged: state/__" in found["damaged"] and " bytes instead of " in found["damaged"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_only_complete_checkpoints_are_listed(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000002", "step_00000004.partial", "step_00000001.deleting", "notes"):
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    assert find_checkpoint(tmp_path).name == "step_00000010"
    (tmp_path / "checkpoints" / "step_00000002" / "manifest.json").write_text(json.dumps({"step": 2}))
    assert find_checkpoint(tmp_path / "checkpoints" / "step_00000002").name == "step_00000002"
    assert list_checkpoints(tmp_path / "checkpoints") == []
    with pytest.raises(ValueError, match="is neither a checkpoint"):
        find_checkpoint(tmp_path / "checkpoints" / "notes")


def runs_with(directory: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint = directory / "checkpoints" / f"step_{step:08d}"
        (checkpoint / "state").mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    return directory


def test_run_starts_where_it_is_told(tmp_path: Path) -> None:
    run, new = runs_with(tmp_path / "run", 2, 4), tmp_path / "new"

    def names(run_dir: Path, load: str) -> list[str]:
        return [path.parents[1].name + path.name[-1] for path in candidates(run_dir, load)]

    assert names(run, "latest") == ["run4", "run2"] and names(new, "latest") == []
    assert names(new, "none") == []
    for load in ("4", "step_00000004", str(run / "checkpoints" / "step_00000004")):
        assert names(run, load) == ["run4"]
    assert names(new, str(run / "checkpoints" / "step_00000002")) == ["run2"]
    assert names(new, str(run)) == ["run4", "run2"]
    branch = runs_with(tmp_path / "branch", 3)
    assert names(branch, str(run / "checkpoints" / "step_00000002")) == ["branch3"]

    with pytest.raises(ValueError, match=r"checkpoint.load is none, but .* already has step_00000004"):
        candidates(run, "none")
    with pytest.raises(ValueError, match=r"has checkpoints after step_00000002 .* branch off with another --run-dir"):
        candidates(run, "2")
    with pytest.raises(ValueError, match=r"has no checkpoint step_00000003: it has step_00000004, step_00000002"):
        candidates(run, "step_00000003")
    with pytest.raises(ValueError, match=r"checkpoint.load is newest, which is neither .* expected latest, none"):
        candidates(new, "newest")


def test_retention_keeps_the_last_and_the_milestones(tmp_path: Path) -> None:
    run = runs_with(tmp_path, *range(100, 1100, 100))

    def goes(step: int, **settings: int) -> list[int]:
        return [int(path.name[5:]) for path in outdated(run, step, CheckpointConfig(**settings))]

    assert goes(1000, keep_last=0) == []
    assert goes(1000, keep_last=8) == [100, 200]
    assert goes(1000, keep_last=8, keep_every=200) == [100]
    assert goes(1000, keep_last=1, keep_every=500) == [100, 200, 300, 400, 600, 700, 800, 900]
    # 900 and 1000 are damaged, and the run went back to 700: the only good ones stay.
    assert goes(800, keep_last=1) == [100, 200, 300, 400, 500, 600, 700]
    assert goes(800, keep_last=2) == [100, 200, 300, 400, 500, 600]


def test_refuses_negative_settings() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.interval is -1, but must be at least 0"):
        CheckpointConfig(interval=-1)
    with pytest.raises(ValueError, match=r"checkpoint.interval_minutes is inf, but must be at least 0 and finite"):
        CheckpointConfig(interval_minutes=float("inf"))
    with pytest.raises(ValueError, match=r"checkpoint.load is , but must be \"latest\""):
        CheckpointConfig(load="")


def resume_from(run_dir: Path) -> str:
    """Rank 1 is told of a checkpoint that only rank 0 can see."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training import checkpoint

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    if groups.rank == 1:
        real_is_dir = Path.is_dir
        Path.is_dir = lambda self: "step_" not in self.name and real_is_dir(self)  # type: ignore[method-assign]
    try:
        newest = checkpoint.choose_checkpoint(run_dir, checkpoint.CheckpointConfig(), groups.control)
        return newest[0].name if newest else "none"
    except ValueError as error:
        return str(error)


def test_rank_zero_decides_from_where_all_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000005" / "manifest.json").write_text("{}")
    first, second = run_ranks(2, resume_from, tmp_path)
    assert first == second
    assert (
        "rank 1 does not see" in second and "step_00000005" in second and "file system that all nodes share" in second
    )
