"""Every command with every objective: it does its work, or says in one sentence why it cannot."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

from megadiff.objectives import OBJECTIVES

RECIPE = str(Path(__file__).parents[1] / "examples" / "recipes" / "quickstart.py")
REFUSED = {
    ("convert", "autoregressive"),
    ("convert", "block_diffusion"),
    ("convert", "duo"),
    ("convert", "eso_lm"),
    ("preview", "autoregressive"),
    ("preview", "eso_lm"),
}


def run_commands(corpus: Path, folder: Path) -> dict[tuple[str, str], tuple[int, str]]:
    """Exit code and last line of errors of every command with every objective."""
    from megadiff.cli import main

    small = {
        "data.path": corpus,
        "data.sequence-length": 32,
        "training.train-steps": 1,
        "training.global-batch-size": 2,
    }
    small |= {"training.global-batch-size": 2, "training.micro-batch-size": 2}
    small |= {"validation.num-sequences": 4, "model.num-layers": 1}
    settings = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    found = {}
    for name in OBJECTIVES:
        run, chosen = str(folder / name), [*settings, "--objective", name]
        commands: dict[str, list[str]] = {
            "train": [RECIPE, "--run-dir", run, *chosen],
            "evaluate": [run],
            "generate": [run, "--length", "16", "--num-denoising-steps", "4", "--prompt", "def "],
            "preview": [RECIPE, *chosen],
            "convert": [run, run + "-hf"],
            "plan": [RECIPE, "--world-size", "1", *chosen],
        }
        for command, arguments in commands.items():
            errors: Any = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = main([command, *arguments])
            found[command, name] = (code, errors.getvalue().strip().splitlines()[-1] if code else "")
    return found


@pytest.mark.slow
def test_every_command_serves_every_objective_or_says_why_not(corpus_dir: Path, tmp_path: Path) -> None:
    [found] = run_ranks(1, run_commands, corpus_dir, tmp_path, timeout=300.0)
    assert len(found) == 6 * len(OBJECTIVES)
    for (command, name), (code, line) in found.items():
        if (command, name) in REFUSED:
            assert code == 2 and line.startswith("error: ") and name in line, (command, name, line)
        else:
            assert code == 0, (command, name, line)
