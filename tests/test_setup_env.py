"""tools/setup_env.sh with a real virtual environment and a stand-in for pip that writes down what it is asked.

The stand-in "installs" torch as a module that has nothing but a version, and megadiff as metadata. pip's own resolver
is asked what it makes of them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

PIP = """
import json, os, pathlib, re, sys

arguments = sys.argv[1:]
site = pathlib.Path(__file__).parents[1]
constraints = [
    pathlib.Path(value).read_text().split()
    for option, value in zip(arguments, arguments[1:])
    if option == "--constraint"
]
with open(os.environ["PIP_LOG"], "a") as log:
    call = {"arguments": arguments, "constraints": constraints, "variable": os.environ.get("PIP_CONSTRAINT")}
    print(json.dumps(call), file=log)
if wanted := re.search(r"torch==(.+)", arguments[-1]):
    (site / "torch.py").write_text(f"__version__ = {wanted[1]!r}")
    (site / "torch.dist-info").mkdir(exist_ok=True)
    (site / "torch.dist-info" / "METADATA").write_text(f"Name: torch\\nVersion: {wanted[1]}\\n")
if arguments[-1] == ".":
    (site / "megadiff-0.dist-info").mkdir(exist_ok=True)
    (site / "megadiff-0.dist-info" / "METADATA").write_text(os.environ["METADATA"])
sys.exit(os.environ.get("PIP_FAILS_AT") in arguments)
"""


OWN_TORCH = next(line for line in importlib.metadata.requires("megadiff") or () if line.startswith("torch"))
METADATA = f"""Metadata-Version: 2.1
Name: megadiff
Version: 0
Requires-Dist: {OWN_TORCH}
Provides-Extra: hf
Requires-Dist: megatron-core; extra == "hf"
"""
"""Of an installed megadiff: what it really wants of torch, and another package that wants one."""

TORCHES = {
    "of the default index": ("2.13.0", "2.13.0+cu130"),
    "of PyTorch's CPU index": ("2.13.0+cpu", "2.13.0+cpu"),
    "of NVIDIA's container": ("2.10.0a0+b558c986e8.nv25.11", "2.10.0a0+b558c986e8.nv25.11"),
    "built from source": ("2.14.0a0+gitdeadbee", "2.14.0a0+gitdeadbee"),
    "of a nightly": ("2.10.0.dev20251001+cu130", "2.10.0.dev20251001+cu130"),
    "to come": ("3.0.1", "3.0.1"),
}
"""What pip's metadata and torch itself have as the version, in every form that there is."""


@dataclass
class Checkout:
    """A checkout in a folder with a space, and an active environment in another."""

    folder: Path
    environment: Path

    @property
    def site_packages(self) -> Path:
        return next(self.environment.glob("lib/python*/site-packages"))

    def add_torch(self, source: str, metadata: str | None = None) -> None:
        """A torch of which pip knows the version `metadata`, or nothing."""
        (self.site_packages / "torch.py").write_text(source)
        if metadata is not None:
            folder = self.site_packages / f"torch-{metadata}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {metadata}\n")

    def run(
        self, script: str = "setup_env hf; echo ready", *, active: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with the functions of tools/setup_env.sh, in an environment of nothing but `variables`."""
        if active:
            variables["VIRTUAL_ENV"] = str(self.environment)
        search = [str(self.environment / "bin")] if active else []
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"source tools/setup_env.sh; {script}"],
            cwd=self.folder,
            env={
                "PATH": os.pathsep.join([*search, "/usr/bin", "/bin"]),
                "PIP_LOG": str(self.folder / "pip.log"),
                "METADATA": METADATA,
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    def pip_calls(self) -> list[dict[str, Any]]:
        log = self.folder / "pip.log"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call for call in calls if call["arguments"] != ["--version"]]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path / "a checkout", tmp_path / "an environment")
    (checkout.folder / "tools").mkdir(parents=True)
    (checkout.folder / "csrc").mkdir()
    for name in ("tools/setup_env.sh", "pyproject.toml", "setup.py", "csrc/registration.cpp"):
        (checkout.folder / name).write_text((ROOT / name).read_text())
    venv.create(checkout.environment, symlinks=True)
    (checkout.site_packages / "pip").mkdir()
    (checkout.site_packages / "pip" / "__main__.py").write_text(PIP)
    return checkout


@pytest.mark.parametrize("metadata, version", TORCHES.values(), ids=list(TORCHES))
def test_keeps_torch(checkout: Checkout, metadata: str, version: str) -> None:
    checkout.add_torch(f"__version__ = {version!r}", metadata)
    done = checkout.run(PIP_CONSTRAINT="/etc/pip/constraint.txt")
    assert done.returncode == 0, done.stderr
    assert f"keeping torch {version}" in done.stdout
    assert "gigabytes" not in done.stdout

    build, megadiff, others = checkout.pip_calls()
    assert "wheel" in build["arguments"]
    assert {"--no-build-isolation", "--no-deps"} < set(megadiff["arguments"])
    assert others["arguments"][-1] == "megadiff[hf]" and "--no-build-isolation" not in others["arguments"]
    assert others["constraints"] == [[f"torch=={metadata}"]]
    assert others["variable"] == "/etc/pip/constraint.txt"


@pytest.mark.parametrize("metadata, version", TORCHES.values(), ids=list(TORCHES))
def test_pip_agrees_to_keep_torch(checkout: Checkout, tmp_path: Path, metadata: str, version: str) -> None:
    """The pin, megadiff's own requirement and Megatron-Core's, before pip's resolver."""
    pytest.importorskip("pip", reason="this environment has no pip")
    checkout.add_torch(f"__version__ = {version!r}", metadata)
    assert checkout.run().returncode == 0
    with zipfile.ZipFile(tmp_path / "megatron_core-0.16.1-py3-none-any.whl", "w") as wheel:
        about = "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.16.1\n"
        wheel.writestr("megatron_core-0.16.1.dist-info/METADATA", f"{about}Requires-Dist: torch>=2.6.0\n")
        wheel.writestr("megatron_core-0.16.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("megatron_core-0.16.1.dist-info/RECORD", "")
    command = [sys.executable, "-m", "pip", "--isolated", "--python", str(checkout.environment / "bin" / "python")]
    command += ["install", "--dry-run", "--no-index", "--find-links", str(tmp_path), "megadiff[hf]"]
    command += ["--constraint", str(checkout.environment / ".megadiff-torch")]
    # Without the constraints that this machine may have.
    own = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Would install megatron-core-0.16.1"


def test_refuses_a_torch_that_pip_does_not_know(checkout: Checkout) -> None:
    checkout.add_torch("__version__ = '2.13.0'")
    refused = checkout.run()
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: the torch in {checkout.environment} is not known to pip, which would install"
    )
    assert checkout.pip_calls() == []


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0"])
def test_refuses_an_old_torch(checkout: Checkout, version: str) -> None:
    checkout.add_torch(f"__version__ = {version!r}")
    refused = checkout.run()
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: the torch in {checkout.environment} is {version}, but megadiff needs 2.10"
    )
    assert checkout.pip_calls() == []


def test_does_not_replace_a_broken_torch(checkout: Checkout) -> None:
    checkout.add_torch("raise ImportError('libcudart.so.13: cannot open')")
    refused = checkout.run()
    assert refused.returncode == 2
    assert "libcudart.so.13" in refused.stderr and "cannot be imported" in refused.stderr.splitlines()[-1]
    assert checkout.pip_calls() == []


@pytest.mark.parametrize(
    ("wanted", "requirement"),
    [(None, "torch==2.13.0"), ("2.12.0", "torch==2.12.0"), ("torch==2.11.0", "torch==2.11.0")],
)
def test_installs_torch_loudly_and_first(checkout: Checkout, wanted: str | None, requirement: str) -> None:
    done = checkout.run(**({} if wanted is None else {"MEGADIFF_TORCH": wanted}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("gigabytes") < done.stdout.index("installing megadiff")
    assert checkout.pip_calls()[0]["arguments"] == ["install", requirement]


@pytest.mark.parametrize(
    ("step", "message"), [("torch==2.13.0", "could not install torch==2.13.0"), (".", "could not install megadiff")]
)
def test_a_failure_of_pip_is_not_taken_for_done(checkout: Checkout, step: str, message: str) -> None:
    failed = checkout.run(PIP_FAILS_AT=step)
    assert failed.returncode == 2
    assert message in failed.stderr.splitlines()[-1]
    if step != ".":
        (checkout.site_packages / "torch.py").unlink()
    assert checkout.run().returncode == 0
    assert "ready" in checkout.run().stdout


@pytest.mark.parametrize("changed", ["pyproject.toml", "csrc/registration.cpp"])
def test_a_second_call_has_nothing_to_do_until_something_changes(checkout: Checkout, changed: str) -> None:
    checkout.run()
    calls = checkout.pip_calls()
    assert checkout.run().stdout == "ready\n"
    assert checkout.pip_calls() == calls
    with (checkout.folder / changed).open("a") as file:
        file.write("# changed")
    checkout.run()
    assert len(checkout.pip_calls()) == 2 * len(calls) - 1  # torch is there now


def test_refuses_an_unusable_python(checkout: Checkout) -> None:
    for python in ("/bin/false", "/no/such python"):
        refused = checkout.run(active=False, PYTHON=python)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: PYTHON={python} is not a Python 3.10 to 3.13")
        assert not (checkout.folder / ".venv").exists()


def test_refuses_an_active_environment_without_a_supported_python(checkout: Checkout) -> None:
    python = checkout.environment / "bin" / "python"
    python.unlink()
    python.symlink_to("/bin/false")
    refused = checkout.run()
    assert refused.returncode == 2
    assert f"the environment {checkout.environment} has no Python 3.10 to 3.13" in refused.stderr


def test_makes_an_environment_with_a_python_of_any_name(checkout: Checkout) -> None:
    done = checkout.run("make_venv", active=False, PYTHON=str(checkout.environment / "bin" / "python"))
    assert done.returncode == 0, done.stderr
    assert "making .venv with Python 3" in done.stdout
    assert (checkout.folder / ".venv" / "bin" / "python").exists()


def test_says_what_to_install_where_no_environment_can_be_made(checkout: Checkout) -> None:
    (checkout.folder / ".venv").write_text("in the way")
    refused = checkout.run("make_venv", active=False, PYTHON=sys.executable)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: cannot make a virtual environment: apt-get install")


@pytest.mark.parametrize("user", ["0", "1000"])
def test_root_fetches_pip_and_others_are_told_how(checkout: Checkout, tmp_path: Path, user: str) -> None:
    """No pip, no ensurepip, and an apt-get that installs nothing."""
    for module in ("pip", "ensurepip"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(1)")
    machine = f'id() {{ echo {user}; }}; apt-get() {{ echo "apt-get $*" >>apt.log; }}'
    refused = checkout.run(f"{machine}; ensure_pip", PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: cannot install pip: apt-get install python3-venv")
    log = checkout.folder / "apt.log"
    if user == "0":
        assert log.read_text().splitlines() == ["apt-get -qq update", "apt-get -qq install -y python3-venv"]
    else:
        assert not log.exists()
