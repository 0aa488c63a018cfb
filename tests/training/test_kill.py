"""A run that is killed ten times, at moments that it cannot foresee, ends as one that was never touched."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.hf.distcp import DistributedCheckpoint

STEPS, KILLS = 60, 10
SETTINGS = {
    "one process": (1, ["--checkpoint.async-save", "true"]),
    "two processes": (
        2,
        ["--parallel.use-distributed-optimizer", "true", "--checkpoint.async-save", "true"],
    ),
}


def start(recipe: Path, run_dir: Path, num_processes: int, options: list[str]) -> subprocess.Popen[str]:
    arguments = ["-m", "megadiff", "train", str(recipe), "--run-dir", str(run_dir), *options]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        arguments = [*launcher, *arguments]
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, youngest last; none of those that are gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in descendants(int(child)))]


def kill(process: subprocess.Popen[str]) -> None:
    """As when the plug is pulled: nobody gets a word."""
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Complete training lines so far."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for row in text.split("\n")[:-1] if "loss" in (line := json.loads(row))]


def is_saving(run_dir: Path) -> bool:
    return any(path.suffix == ".partial" for path in run_dir.glob("checkpoints/*"))


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds, optimizer included."""
    state = DistributedCheckpoint(run_dir / "checkpoints" / f"step_{STEPS:08d}" / "state", ignore=lambda name: False)
    return dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [pytest.param("one process", marks=pytest.mark.exhaustive), "two processes"])
def test_run_killed_ten_times_ends_as_one_that_was_not(tmp_path: Path, corpus_dir: Path, setting: str) -> None:
    """Every third moment lies in a save, the others are waits of random length after some step."""
    num_processes, options = SETTINGS[setting]
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\n"
        "from tiny import tiny_config\n\n\n"
        f"def config():\n    return tiny_config(Path({str(corpus_dir)!r}), training={{'train_steps': {STEPS}}},"
        " checkpoint={'interval': 3})\n"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(recipe, whole, num_processes, options)
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr

    moments, resumed, in_saves = random.Random(20261121), 0, 0
    for number in range(KILLS):
        process = start(recipe, killed, num_processes, options)
        before = len(lines(killed))
        target = before + moments.randrange(1, 6)
        wait = moments.uniform(0.0, 0.05)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            progress = len(lines(killed))
            if number % 3 == 0 and progress > before and is_saving(killed):
                in_saves += 1
                break
            if number % 3 and progress >= target:
                time.sleep(wait)
                break
            time.sleep(0.001)
        assert process.poll() is None, "the run ended before it was killed: make it longer"
        kill(process)
        resumed += before > 0

    process = start(recipe, killed, num_processes, options)
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 0 and "resumed from" in stderr, stderr
    assert resumed >= KILLS - 2 and in_saves >= 3

    bounds = [line["ordinals"] for line in lines(killed)]
    assert bounds[0][0] == 0 and all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    clocks = ("tokens_per_second", "step_time")
    for ours, theirs in zip(lines(killed), lines(whole), strict=True):
        assert {k: v for k, v in ours.items() if k not in clocks} == {
            k: v for k, v in theirs.items() if k not in clocks
        }
    expected, found = tensors(whole), tensors(killed)
    assert expected.keys() == found.keys() and any(name.startswith("optimizer.") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
