"""Killed, stopped or broken runs go on exactly where they were, through the command line as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

DEADLINE = 180.0


@pytest.fixture
def recipe(tmp_path: Path, corpus_dir: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from pathlib import Path\n"
        "from tiny import tiny_config\n\n\n"
        f"def config():\n    return tiny_config(Path({str(corpus_dir)!r}), training={{'train_steps': 40}})\n"
    )
    return path


def command(recipe: Path, run_dir: Path, num_processes: int, options: Sequence[str]) -> list[str]:
    train = ["-m", "megadiff", "train", str(recipe), "--run-dir", str(run_dir), *options]
    if num_processes == 1:
        return [sys.executable, *train]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [sys.executable, "-m", *launcher, *train]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def train(recipe: Path, run_dir: Path, *options: str, num_processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, run_dir, num_processes, options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def start_and_signal(
    recipe: Path, run_dir: Path, number: signal.Signals, *options: str, after_step: int, num_processes: int = 1
) -> tuple[int, str]:
    """Start a run, send a signal once a step is in the metrics, and wait for the end; its exit code and stderr.

    SIGKILL goes to the launcher and all ranks, as when the plug is pulled; other signals go to the last rank alone.
    """
    process = subprocess.Popen(
        command(recipe, run_dir, num_processes, options),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE
    while len(training_lines(run_dir)) < after_step:
        assert process.poll() is None, f"the run ended early: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < deadline, "the run did not reach the step in time"
        time.sleep(0.02)
    ranks = children(process.pid) if num_processes > 1 else [process.pid]
    for pid in {process.pid, *ranks} if number == signal.SIGKILL else ranks[-1:]:
        os.kill(pid, number)
    _, stderr = process.communicate(timeout=DEADLINE)
    return process.returncode, stderr


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training lines without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "step_time")} for line in lines]


def check_killed_run_equals_uninterrupted(recipe: Path, tmp_path: Path, *options: str, num_processes: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = train(recipe, whole, *options, num_processes=num_processes)
    assert finished.returncode == 0, finished.stderr

    start_and_signal(recipe, killed, signal.SIGKILL, *options, after_step=5, num_processes=num_processes)
    assert len(training_lines(killed)) < 40
    resumed = train(recipe, killed, *options, num_processes=num_processes)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr

    assert comparable(training_lines(killed)) == comparable(training_lines(whole))
    assert [line["step"] for line in training_lines(killed)] == list(range(1, 41))
    kept = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert kept == ["step_00000038", "step_00000040"]

    compared = subprocess.run(
        [sys.executable, "-m", "megadiff", "compare", str(whole), str(killed)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert compared.returncode == 0 and "all 40 common steps agree to the last bit" in compared.stdout


def test_killed_run_ends_as_an_uninterrupted_one(recipe: Path, tmp_path: Path) -> None:
    check_killed_run_equals_uninterrupted(recipe, tmp_path, num_processes=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--parallel.tensor-model-parallel-size", "2"), marks=pytest.mark.exhaustive),
        ("--parallel.use-distributed-optimizer", "true", "--training.precision", "bf16"),
        pytest.param(
            ("--optimizer.algorithm", "laprop", "--model.parametrization", "complete_p", "--optimizer.lr", "0.1"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_killed_job_of_two_processes_ends_as_an_uninterrupted_one(
    recipe: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    check_killed_run_equals_uninterrupted(recipe, tmp_path, *options, num_processes=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_on_one_rank_stops_all_with_a_checkpoint(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    options = ("--training.train-steps", "100000", "--checkpoint.interval", "0")
    code, stderr = start_and_signal(recipe, run_dir, number, *options, after_step=3, num_processes=2)
    assert code == 0, stderr
    steps = len(training_lines(run_dir))
    assert f"stopped by {number.name} after step {steps}" in stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{steps:08d}"]


def test_nan_stops_with_step_ordinals_and_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """A learning rate beyond fp32 breaks the parameters; the run names where and keeps the last good checkpoint."""
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "--training.train-steps", "2").returncode == 0
    broken = train(
        recipe,
        run_dir,
        "--optimizer.lr",
        "1e30",
        "--optimizer.lr-decay-style",
        "constant",
        "--checkpoint.interval",
        "0",
    )
    assert broken.returncode == 3
    assert "error: loss" in broken.stderr and "sample ordinals" in broken.stderr
    assert "step_00000002" in broken.stderr.splitlines()[-1]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]


def test_another_batch_size_goes_on_with_the_next_sample(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "--training.train-steps", "2").returncode == 0
    options = ("--training.train-steps", "4", "--training.global-batch-size", "4")
    assert train(recipe, run_dir, *options).returncode == 0
    lines = training_lines(run_dir)
    assert [line["ordinals"] for line in lines] == [[0, 8], [8, 16], [16, 20], [20, 24]]
    assert [line["consumed_tokens"] for line in lines] == [256, 512, 640, 768]


def test_checkpoint_of_another_model_is_refused_and_kept(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "--training.train-steps", "1").returncode == 0
    config = (run_dir / "config.yaml").read_text()
    refused = train(recipe, run_dir, "--model.hidden-size", "64")
    assert refused.returncode == 2
    message = refused.stderr.splitlines()[-1]
    assert message.startswith("error: checkpoint") and "model.hidden_size 32 (this run: 64)" in message
    assert (run_dir / "checkpoints" / "step_00000001" / "manifest.json").is_file()
    assert (run_dir / "config.yaml").read_text() == config
