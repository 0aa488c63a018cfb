"""Jobs that hang, starve or run out of time end with a name, a code and a checkpoint, through the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_resume import DEADLINE, children, command, environment, training_lines

from megadiff.exit_codes import EXIT_HUNG, EXIT_RERUN_ELSEWHERE

LONG = ("--training.train-steps", "100000", "--checkpoint.interval", "0")


def write_recipe(directory: Path, corpus_dir: Path, fault: str = "") -> Path:
    """A recipe of 40 steps that brings its fault along: `fault` is a statement."""
    path = directory / "recipe.py"
    path.write_text(
        "from pathlib import Path\n\nimport faults\nfrom tiny import tiny_config\n\n\n"
        f"def config():\n    {fault}\n"
        f"    return tiny_config(Path({str(corpus_dir)!r}), training={{'train_steps': 40}})\n"
    )
    return path


def environment_with_faults() -> dict[str, str]:
    tests = Path(__file__).parents[1]
    return environment() | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "training")]),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2",
    }


def start(recipe: Path, run_dir: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(recipe, run_dir, 2, options),
        env=environment_with_faults(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(recipe: Path, run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, run_dir, 1, options),
        env=environment_with_faults(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while len(training_lines(run_dir)) < step:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path, corpus_dir: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path, corpus_dir, "faults.hang_at(8 * 3 + 2, rank=1)")
    process = start(recipe, run_dir, "--training.hang-timeout", "8s")
    wait_for_step(process, run_dir, 3)
    ranks, began = children(process.pid), time.monotonic()
    _, stderr = process.communicate(timeout=DEADLINE)
    assert time.monotonic() - began < 8 + 30, "a timeout, four ticks of 0.8 s to judge, and the launcher"
    assert process.returncode != 0 and not any(map(is_running, ranks))
    verdict = next(line for line in stderr.splitlines() if "the job hangs" in line)
    assert "behind the others: rank 1 (host" in verdict and "step 3, computing a micro-batch" in verdict
    report = stderr[stderr.index("rank 1 (host") :]
    assert "its main thread:" in report and "in guilty_function\n    time.sleep(1e6)" in report
    assert stderr.count("no progress for") == 2, "rank 0 reports where it waits"
    assert f"exitcode  : {EXIT_HUNG} " in stderr, "torchrun's own summary"


@pytest.mark.slow
def test_a_rank_that_is_stopped_as_a_whole_is_named_by_the_other(tmp_path: Path, corpus_dir: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(write_recipe(tmp_path, corpus_dir), run_dir, "--training.hang-timeout", "8s", *LONG)
    wait_for_step(process, run_dir, 3)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0 and not any(map(is_running, ranks))
    verdict = next(line for line in stderr.splitlines() if "the job hangs" in line)
    assert f"silent, so stopped or gone as a whole: rank 1 (host {os.uname().nodename}, pid {ranks[1]})" in verdict
    assert f"exitcode  : {EXIT_HUNG} " in stderr


@pytest.mark.slow
def test_a_file_system_that_hangs_is_an_error_of_its_rank(tmp_path: Path, corpus_dir: Path) -> None:
    recipe = write_recipe(tmp_path, corpus_dir, "faults.stop_reading_after(40, rank=1)")
    process = start(recipe, tmp_path / "run", "--data.read-timeout", "3s", *LONG)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert f"error on rank 1: no micro-batch came from {corpus_dir / 'train.bin'} on rank 1, host" in stderr
    assert "within 3 s: the file system hangs" in stderr


def test_time_that_is_up_is_a_checkpoint_and_a_success(tmp_path: Path, corpus_dir: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path, corpus_dir), tmp_path / "run"
    stopped = train(recipe, run_dir, "--training.exit-after", "1s", *LONG)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by training.exit_after after step 1; start again to go on" in stopped.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.slow
def test_a_nan_that_comes_back_asks_for_another_node(tmp_path: Path, corpus_dir: Path) -> None:
    """A learning rate beyond fp32: the first step breaks the parameters, the second finds out, twice."""
    recipe, run_dir = write_recipe(tmp_path, corpus_dir), tmp_path / "run"
    options = ("--optimizer.lr", "1e30", "--optimizer.lr-decay-style", "constant", "--optimizer.lr-warmup-steps", "0")
    broken = train(recipe, run_dir, *options, "--training.rerun-mode", "validate_results")
    assert broken.returncode == EXIT_RERUN_ELSEWHERE, broken.stderr
    assert "error: step 2: loss nan" in broken.stderr and "the same when computed again on rank 0" in broken.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]
