"""The Dockerfile: it passes its linter, and the steps of its CPU image work, one by one, on this machine."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@dataclass
class Stage:
    """One image of the Dockerfile: its instructions in order, continued lines joined."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """All images by name."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    found: dict[str, Stage] = {}
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(base)
        elif instruction and found:
            stage.steps.append((instruction, rest))
    return found


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_images_run_as_somebody_who_is_not_root_and_can_tell_their_health() -> None:
    assert list(stages()) == ["cpu", "gpu"], "the last one is the default"
    for stage, device in zip(stages().values(), ("cpu", "cuda"), strict=True):
        users = [rest for instruction, rest in stage.steps if instruction == "USER"]
        assert users == ["1000"]
        health = [rest for instruction, rest in stage.steps if instruction == "HEALTHCHECK"]
        assert json.loads(health[0].partition("CMD ")[2]) == ["megadiff", "doctor", "--health", device]


def test_the_gpu_image_is_not_built_with_kernels_that_do_not_load() -> None:
    steps = stages()["gpu"].steps
    assert steps.index(("RUN", "megadiff doctor --require-library cuda")) > steps.index(("COPY", "--chown=1000 . ."))


def test_commands_do_not_rely_on_another_shell_than_sh() -> None:
    """Podman and buildah make OCI images, which ignore SHELL: every RUN meets /bin/sh there, Debian's dash."""
    for stage in stages().values():
        assert "SHELL" not in [instruction for instruction, _ in stage.steps]
        scripts = [rest for instruction, rest in stage.steps if instruction == "RUN" and "setup_env.sh" in rest]
        assert scripts and all("bash -euo pipefail -c '. tools/setup_env.sh;" in script for script in scripts)


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path of the checkout out, or a folder that it lies in."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    parts = Path(path).parts
    for pattern in (line for line in lines if line and not line.startswith("#")):
        anywhere, pattern = pattern.startswith("**/"), pattern.removeprefix("**/")
        if any(fnmatch.fnmatch(part, pattern) for part in (parts if anywhere else parts[:1])):
            return True
    return False


def test_images_hold_all_sources_and_nothing_that_was_built() -> None:
    assert not ignored("megadiff/data/corpus.py") and not ignored("csrc/nelbo/nelbo_math.h")
    assert ignored("data/quickstart/manifest.json") and ignored("megadiff/_lib/libmegadiff_cpu.so")


@pytest.fixture
def open_constraints(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("open_constraints")


def test_constraints_of_the_base_image_come_first(tmp_path: Path, open_constraints: Any) -> None:
    theirs, ours = tmp_path / "theirs.txt", tmp_path / "ours.txt"
    theirs.write_text("# NVIDIA's\nnumpy<2.3  # for Apex\nPyYAML>=6,<7\ntyping.extensions ; python_version>'3'\n")
    ours.write_text("numpy==2.4.6\npyyaml==6.0.3\ntyping_extensions==4.15.0\nregex==2026.11.15\n")
    assert open_constraints.left_open(theirs, ours) == ["regex==2026.11.15"]
    theirs.write_text("")
    assert len(open_constraints.left_open(theirs, ours)) == 4
    assert open_constraints.left_open(theirs, ROOT / "tools" / "constraints.txt")


@pytest.mark.parametrize(
    "pinned, yields",
    [
        ("pydantic==2.11.7", {"pydantic-core"}),
        ("pydantic_core==2.33.2", {"pydantic"}),
        ("protobuf==4.24.4", {"grpcio", "tensorboard", "wandb"}),
        ("grpcio==1.62.1", {"protobuf", "tensorboard"}),
        ("tokenizers==0.21.0", {"transformers", "huggingface-hub"}),
        ("huggingface-hub==0.34.4", {"transformers", "tokenizers"}),
        ("transformers==4.55.0", {"huggingface-hub", "tokenizers"}),
        ("numpy==1.26.4", {"matplotlib", "contourpy"}),
        ("click==8.1.8", {"huggingface-hub", "transformers"}),
    ],
)
def test_constraints_yield_where_a_partner_is_the_base_image_s(
    tmp_path: Path, open_constraints: Any, pinned: str, yields: set[str]
) -> None:
    theirs, ours = tmp_path / "theirs.txt", ROOT / "tools" / "constraints.txt"
    theirs.write_text(pinned + "\n")
    left = {canonicalize_name(line.partition("==")[0]) for line in open_constraints.left_open(theirs, ours)}
    assert not left & yields and "sentencepiece" in left
    assert yields <= open_constraints.constraints(ours).keys(), "a package that is not ours any more"


def test_what_excludes_releases_of_another_package_is_its_partner(open_constraints: Any) -> None:
    """Asked of the metadata of those that are installed here in our version: exact versions and upper bounds."""
    ours = open_constraints.constraints(ROOT / "tools" / "constraints.txt")
    installed = {canonicalize_name(found.name): found for found in importlib.metadata.distributions()}
    for name, line in ours.items():
        if name not in installed or installed[name].version != line.partition("==")[2]:
            continue
        for wanted in map(Requirement, installed[name].requires or []):
            other = canonicalize_name(wanted.name)
            excludes = any(bound.operator in ("==", "<", "<=", "~=", "!=") for bound in wanted.specifier)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if other in ours and excludes and applies:
                assert any({name, other} <= group for group in open_constraints.PARTNERS), (name, other)


def copy(sources: list[str], target: Path) -> None:
    """What COPY does, with the files that git knows or would."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for source in sources:
        for name in files:
            if ignored(name) or not (ROOT / name).exists():
                continue
            if source == "." or name.startswith(source + "/"):
                place = target / (name if source == "." else Path(name).relative_to(source))
            elif name == source:
                place = target / Path(name).name
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_steps_of_the_cpu_image_install_megadiff_and_its_kernels(tmp_path: Path) -> None:
    """Those after USER: what root does before is to give a bare system a compiler, which this one has."""
    steps = stages()["cpu"].steps
    users = [index for index, (instruction, _) in enumerate(steps) if instruction == "USER"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment["TORCH_INDEX"] = ""
    folder, python = tmp_path, Path(sys.executable).resolve()
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(python)

    def local(text: str) -> str:
        for path in ("/opt/megadiff", "/workspace"):
            text = text.replace(path, str(tmp_path) + path)
        return text

    def run(command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    for instruction, rest in steps[users[0] + 1 :]:
        match instruction:
            case "WORKDIR":
                folder = Path(local(rest))
                folder.mkdir(parents=True, exist_ok=True)
            case "ENV":
                for setting in local(rest).split():
                    name, _, value = setting.partition("=")
                    environment[name] = value.replace("$PATH", environment["PATH"])
            case "ARG":
                name, _, value = rest.partition("=")
                environment.setdefault(name, value)
            case "COPY":
                *sources, target = [word for word in rest.split() if not word.startswith("--")]
                name = Path(sources[0]).name
                is_folder = len(sources) == 1 and (ROOT / sources[0]).is_dir()
                copy(sources, folder / target if is_folder or target.endswith("/") else folder / target / name)
            case "RUN":
                run(["/bin/sh", "-c", local(rest)])
            case _:
                assert instruction in ("HEALTHCHECK", "CMD"), instruction
    found = dict(
        line.split(maxsplit=1) for line in run(["megadiff", "doctor"]).replace("CPU kernels", "kernels").splitlines()
    )
    assert found["kernels"].startswith("native") and found["megatron-core"] == "0.16.1"
    assert str(tmp_path) in run(["python", "-c", "import megadiff.training.loop; print(megadiff.__file__)"])
