"""examples/pretrain_dlm.sh without a cluster: the same run by torchrun and by Bash; what it refuses."""

from __future__ import annotations

import ast
import shutil
import socket
import subprocess
import warnings
from pathlib import Path

import pytest
from pretraining import LAUNCHER, comparable, started, torchrun, write_recipe


@pytest.fixture
def recipe(tmp_path: Path, corpus_dir: Path) -> Path:
    return write_recipe(tmp_path / "recipe.py", corpus_dir)


@pytest.mark.slow
def test_torchrun_and_bash_train_the_same(recipe: Path) -> None:
    """With asynchronous saving, whose spawned process imports the file again."""
    settings = ("--checkpoint.async-save", "true", "--checkpoint.interval", "2", "--training.train-steps", "4")
    torchrun(recipe, "--run-dir", "by-torchrun", *settings)
    started(["bash", str(LAUNCHER), str(recipe), "--run-dir=by-bash", *settings], cwd=recipe.parent)
    losses = comparable(recipe.parent / "by-torchrun")
    assert len(losses) == 4 and losses == comparable(recipe.parent / "by-bash")


def test_dry_run_prints_the_command_and_starts_nothing(recipe: Path) -> None:
    output = started(["bash", str(LAUNCHER), str(recipe), "--dry-run", "--optimizer.lr", "1e-3"], cwd=recipe.parent)
    command = (
        "python -m torch.distributed.run --standalone --nproc-per-node 2 "
        f"-m megadiff train {recipe} --run-dir runs/pretrain_dlm --optimizer.lr 1e-3"
    )
    assert f"{socket.gethostname()}: {command}" in output.splitlines()
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.py"], "error: no recipe none.py: expected a Python file"),
        (["--run-dir"], "error: --run-dir has no value"),
        (["--ladder", "ladder.txt"], "error: --ladder is for tasks of an array"),
    ],
)
def test_refuses_in_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    output = started(["bash", str(LAUNCHER), *arguments], cwd=tmp_path, code=2)
    assert output.splitlines()[-1].startswith(sentence)


def test_is_bash_and_python_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ast.parse(LAUNCHER.read_text())
    subprocess.run(["bash", "-n", LAUNCHER], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, "-x", LAUNCHER], check=True, cwd=LAUNCHER.parents[1])
