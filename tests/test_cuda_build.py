"""The first command with a CUDA build of torch on a machine without a GPU: real packages, where they are at hand.

On most machines pip's index has no other build. It takes gigabytes, so the test runs where pip finds torch on the
machine's own disk, and is skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = "2.14.1"
BASE = sys._base_executable  # type: ignore[attr-defined]


def local_sources() -> dict[str, list[str]]:
    """Folders and indexes on this machine's disk that pip is configured to look into, by option."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60)
    found: dict[str, list[str]] = {}
    for line in asked.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in ("index-url", "extra-index-url", "find-links"):
            option = "find-links" if option == "find-links" else "extra-index-url"
            places = value.strip("'").split()
            found.setdefault(option, []).extend(place for place in places if place.startswith(("file:", "/")))
    return found


def why_not_at_hand(folder: Path) -> str:
    """Why pip would not take torch's CUDA build from this machine's disk; empty where it would. Downloads nothing."""
    options = [f"--{option}={place}" for option, places in local_sources().items() for place in places]
    if not options:
        return f"a CUDA build of torch {TORCH} is a download of gigabytes: pip knows no place for it on this machine"
    nowhere = [
        "--isolated",
        "download",
        "--quiet",
        "--no-deps",
        f"--index-url={folder.as_uri()}",
        "--dest",
        str(folder),
    ]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    asked = subprocess.run(
        [sys.executable, "-m", "pip", *nowhere, *options, f"torch=={TORCH}"],
        env={**own, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=300,
    )
    wheels = [path.name for path in folder.glob("torch-*.whl")]
    if asked.returncode or not wheels:
        return f"a CUDA build of torch {TORCH} is a download of gigabytes: pip finds none on this machine's disk"
    return f"torch {TORCH} on this machine's disk is a CPU build" if "cpu" in wheels[0] else ""


@pytest.mark.slow
def test_the_setup_keeps_a_cuda_build(tmp_path: Path) -> None:
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    if reason := why_not_at_hand(wheel):
        pytest.skip(reason)
    shutil.rmtree(wheel)
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
