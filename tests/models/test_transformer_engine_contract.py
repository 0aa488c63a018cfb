"""Transformer Engine's contract without a GPU: what is used of it is there, at both ends of the supported range.

The Python sources come from the releases' wheels, about 1 MB each, which hold no kernels. `models.te_contract` uses
what is used of them; that it can fail is shown on sources that were changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megadiff.accelerations import TRANSFORMER_ENGINE_VERSIONS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = (f"{major}.{minor}" for major, minor in TRANSFORMER_ENGINE_VERSIONS)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Of each end: the last release's unpacked wheel, and its version."""
    pytest.importorskip("pip", reason="this environment has no pip, which fetches the wheels")
    return {minor: fetched(minor, tmp_path_factory.mktemp("wheel")) for minor in (OLDEST, NEWEST)}


def fetched(minor: str, folder: Path) -> tuple[Path, str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--timeout", "20", "--dest", str(folder), f"transformer_engine=={minor}.*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "from versions:" in done.stderr and "from versions: none" not in done.stderr:
        pytest.fail(f"there is no release of transformer_engine {minor}: {done.stderr}")
    if done.returncode:
        pytest.skip(f"the wheel of transformer_engine {minor} cannot be fetched here: {done.stderr.splitlines()[-1]}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked", wheel.name.split("-")[1]


def held(root: Path, version: str) -> subprocess.CompletedProcess[str]:
    """Everything that is used, used in a process that has no other Transformer Engine."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "models.te_contract", str(root), version]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("minor", [OLDEST, NEWEST])
def test_what_is_used_is_there(releases: dict[str, tuple[Path, str]], minor: str) -> None:
    done = held(*releases[minor])
    assert done.returncode == 0 and done.stdout.splitlines()[-1:] == ["held"], done.stderr[-3000:]


CHANGES = [
    ("pytorch/module/layernorm_linear.py", "zero_centered_gamma: bool", "zero_centered: bool", "zero_centered_gamma"),
    ("pytorch/constants.py", '"padding_causal",', '"padding+causal",', "masks of the package are"),
    ("common/recipe/__init__.py", "amax_history_len: int", "history_len: int", "recipes ignore"),
    ("pytorch/fp8.py", "    check_mxfp8_support,", "", "check_mxfp8_support"),
]
"""A file, what stands there, what comes in its place, and what is told then: an argument, a mask, a field, a check."""


@pytest.mark.parametrize("file, before, after, told", CHANGES)
def test_what_is_not_there_is_found(
    releases: dict[str, tuple[Path, str]], tmp_path: Path, file: str, before: str, after: str, told: str
) -> None:
    root, version = releases[NEWEST]
    shutil.copytree(root, tmp_path / "changed")
    path = tmp_path / "changed" / "transformer_engine" / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    done = held(tmp_path / "changed", version)
    assert done.returncode != 0 and told in done.stderr, done.stdout + done.stderr[-3000:]
