"""The first command with a CUDA build of torch on a machine without a GPU: real packages, where they are at hand.

On most machines pip's index has no other build. It takes gigabytes, so the test runs where pip finds torch on the
machine's own disk, and is skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = "2.14.1"
BASE = sys._base_executable  # type: ignore[attr-defined]


def why_not_at_hand() -> str:
    """Why pip would not take torch's CUDA build from this machine's disk; empty where it would."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    asked = subprocess.run([*command, "--report", "-", f"torch=={TORCH}"], capture_output=True, text=True, timeout=300)
    if asked.returncode:
        return f"pip offers no torch {TORCH}: {asked.stderr.strip().splitlines()[-1]}"
    [torch] = json.loads(asked.stdout)["install"]
    is_local = torch["download_info"]["url"].startswith("file:")
    return "" if is_local else f"a CUDA build of torch {TORCH} is a download of gigabytes here"


@pytest.mark.slow
def test_the_setup_keeps_a_cuda_build(tmp_path: Path) -> None:
    if reason := why_not_at_hand():
        pytest.skip(reason)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("csrc", "megadiff", "tools", "examples"):
        shutil.copytree(ROOT / name, checkout / name)
    # Where there is nvcc but no GPU, torch's builder of extensions warns as soon as Megatron-Core imports it.
    environment = {"MEGADIFF_TORCH": TORCH, "MEGADIFF_BUILD": "none", "PYTHON": BASE, "CUDA_HOME": "/usr"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    script = """
        source tools/setup_env.sh
        setup_env hf
        python -m megadiff doctor
        python -m megadiff train examples/recipes/quickstart.py --help-config >/dev/null
    """
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=checkout,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
    finally:
        shutil.rmtree(checkout / ".venv", ignore_errors=True)  # gigabytes
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"keeping torch {TORCH}+cu" in done.stdout
    findings = dict(
        line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("torch ", "devices "))
    )
    assert findings["torch"].startswith(f"{TORCH}+cu")
    assert "finds no device: Megatron-Core runs over gloo" in findings["devices"]
    assert "No CUDA runtime" not in done.stderr
