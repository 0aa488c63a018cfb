"""Inductor's workers: a share of the node for each of its processes, before Inductor is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megadiff.machine import compilation
from megadiff.machine.compilation import INDUCTOR_WORKERS, bound_compile_workers


@pytest.mark.parametrize(
    "cores, environment, workers",
    [
        (2, {}, "2"),
        (112, {"LOCAL_WORLD_SIZE": "8"}, "14"),
        (112, {"LOCAL_WORLD_SIZE": "1"}, "32"),
        (6, {"LOCAL_WORLD_SIZE": "8"}, "1"),
        (112, {"LOCAL_WORLD_SIZE": "8", INDUCTOR_WORKERS: "20"}, "20"),
    ],
)
def test_workers_are_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, environment: dict[str, str], workers: str
) -> None:
    monkeypatch.setattr(compilation, "_num_cores", lambda: cores)
    monkeypatch.setattr(os, "environ", environment)
    bound_compile_workers()
    assert environment[INDUCTOR_WORKERS] == workers


@pytest.mark.parametrize("asked, workers", [(None, 1), ("7", 7)])
def test_the_command_line_binds_inductor_and_leaves_what_users_have_set(asked: str | None, workers: int) -> None:
    """Asked of Inductor itself, after a command that trains has imported what it needs."""
    script = """
import megadiff.cli
assert megadiff.cli.main(["train", "no_such_recipe.py", "--run-dir", "nowhere"]) == 2
import megadiff.training.loop
import torch._inductor.config
print(torch._inductor.config.compile_threads)
"""
    environment = {name: value for name, value in os.environ.items() if name != INDUCTOR_WORKERS}
    environment["LOCAL_WORLD_SIZE"] = str(2 * (os.cpu_count() or 1))
    if asked is not None:
        environment[INDUCTOR_WORKERS] = asked
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines()[-1:] == [str(workers)], told.stderr
