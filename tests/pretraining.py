"""What the tests of examples/pretrain_dlm.sh share: a small run of it, and what it has written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "examples" / "pretrain_dlm.sh"
ON_CPUS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CLOCKS = ("tokens_per_second", "step_time")


def write_recipe(path: Path, corpus: Path) -> Path:
    """A recipe of the tests' tiny model, which needs nothing but megadiff."""
    path.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from tiny import tiny_config\n\n\ndef config():\n"
        f"    return tiny_config(Path({str(corpus)!r}), checkpoint={{'interval': 100}})\n"
    )
    return path


def torchrun(recipe: Path, *settings: str) -> str:
    """Two processes, as a user would type it; returns their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(LAUNCHER)]
    return started([*command, str(recipe), *settings], cwd=recipe.parent)


def started(command: list[str], *, cwd: Path, code: int = 0) -> str:
    """Output of a command that ends with an exit code within five minutes."""
    finished = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | ON_CPUS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert finished.returncode == code, finished.stdout
    return finished.stdout


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Complete training lines of a run so far."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for row in text.split("\n")[:-1] if "loss" in (line := json.loads(row))]


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """Training lines without what clocks say."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines(run_dir)]
