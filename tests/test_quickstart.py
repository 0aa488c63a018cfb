"""The quickstart as a newcomer runs it; slow, because it is the real thing.

It works in the checkout's ignored folders data/ and runs/, in runs named by their settings.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def quickstart(*settings: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh"), *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def fresh_run(*settings: str) -> Path:
    run_dir = ROOT / "runs" / "-".join(["quickstart", *(setting.removeprefix("--") for setting in settings)])
    shutil.rmtree(run_dir, ignore_errors=True)
    return run_dir


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_ends_below_the_unigram_entropy_and_is_reused() -> None:
    settings = ("--training.seed", "20")
    run_dir = fresh_run(*settings)
    first = quickstart(*settings)
    assert first.returncode == 0, first.stdout

    last = [line for line in lines_of(run_dir) if line.get("split") == "validation"][-1]
    assert last["num_sequences"] >= 512
    assert last["nelbo"] + 5 * last["nelbo_stderr"] < last["unigram_entropy"]
    assert "tensor 2 x pipeline 1 x data 1" in first.stdout
    assert "\ndef " in first.stdout.partition("a sample")[2]
    assert (run_dir / "hf" / "model.safetensors").is_file()
    assert f"The run is in {run_dir.relative_to(ROOT)}" in first.stdout

    started = time.monotonic()
    second = quickstart(*settings)
    assert second.returncode == 0, second.stdout
    assert "already completed" in second.stdout
    assert time.monotonic() - started < 120


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        (("--parallel.pipeline-model-parallel-size", "2"), "tensor 1 x pipeline 2 x data 1"),
        (("--parallel.tensor-model-parallel-size", "1"), "tensor 1 x pipeline 1 x data 2"),
    ],
)
def test_other_layouts_by_an_option(settings: tuple[str, str], layout: str) -> None:
    settings = (*settings, "--training.train-steps", "5", "--validation.num-sequences", "16")
    run_dir = fresh_run(*settings)
    finished = quickstart(*settings)
    assert finished.returncode == 0, finished.stdout
    assert layout in finished.stdout
    assert (run_dir / "hf" / "config.json").is_file()


def test_wrong_option_is_one_sentence() -> None:
    refused = quickstart("--training.train-step", "5")
    assert refused.returncode != 0
    assert "error: unknown option --training.train-step: did you mean --training.train-steps?" in refused.stdout
