"""The images of the Dockerfile, built for real: by buildah, as root, on bases made of Debian's packages.

The bases that the Dockerfile names are gigabytes from registries. Debian with the same things in the same places stands
in for them, under their names: the builder finds them in a store of its own and never pulls. Packages come from where
this machine's pip takes them.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
DEBIAN = {"trixie": "3.13", "bookworm": "3.11"}
"""Releases, and the Python of each."""

SLIM_PYTHON = """
FROM {system}
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv
"""

# As NVIDIA's: a compiler, nvcc on PATH, a user 1000, pip without ensurepip, and packages outside of any environment,
# torch among them, which a file of constraints holds. Its torch is a CPU build under the version of NVIDIA's.
NVIDIA = """
FROM {system}
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip g++ git
RUN useradd --create-home --uid 1000 ubuntu
ENV PIP_NO_CACHE_DIR=1
RUN PIP_EXTRA_INDEX_URL={index} pip install --break-system-packages torch=={torch} numpy=={numpy} packaging
COPY relabel.py /
RUN python /relabel.py {version}
COPY constraint.txt /etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PATH=/usr/local/cuda/bin:$PATH
"""

RELABEL = """
import pathlib, shutil, sys, sysconfig

[metadata] = pathlib.Path(sysconfig.get_path("platlib", "posix_local")).glob("torch-*.dist-info")
old, new = metadata.name[len("torch-") : -len(".dist-info")], sys.argv[1]
for file in (metadata / "METADATA", metadata / "RECORD", metadata.parent / "torch" / "version.py"):
    file.write_text(file.read_text().replace(old, new))
shutil.move(metadata, metadata.with_name(f"torch-{new}.dist-info"))  # a folder of another layer cannot be renamed
"""


@dataclass(frozen=True)
class Source:
    """Where a CPU build of torch comes from."""

    release: str
    """The Debian for whose Python it is made."""

    index: str
    """What pip needs beside its own settings; empty where they suffice."""


def find_torch(version: str, index: str) -> Source | None:
    """The newest Debian for whose Python there is a CPU build of torch, with this machine's indexes or with `index`.

    Others are gigabytes of CUDA libraries.
    """
    for release, python in DEBIAN.items():
        for extra in ("", index):
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--dry-run",
                "--quiet",
                "--report",
                "-",
                "--retries",
                "0",
            ]
            command += ["--no-deps", "--ignore-installed", "--only-binary", ":all:", "--python-version", python]
            asked = subprocess.run(
                [*command, "--target", "unused", f"torch=={version}"],
                env={**os.environ, "PIP_EXTRA_INDEX_URL": extra},
                capture_output=True,
                text=True,
                timeout=300,
            )
            if asked.returncode == 0:
                [torch] = json.loads(asked.stdout)["install"]
                if "+cpu-" in unquote(torch["download_info"]["url"]):
                    return Source(release, extra)
    return None


def cuda_toolkit() -> Path | None:
    """The folder of this machine's nvcc, with headers and libraries in it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, timeout=60)
    [top] = [line.partition("TOP=")[2] for line in dry.stderr.splitlines() if "TOP=" in line]
    folder = Path(top).resolve()
    return folder if (folder / "include" / "cuda_runtime.h").exists() else None


def why_not() -> str:
    """Why images cannot be built on this machine; empty where they can."""
    missing = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: apt-get install buildah debootstrap"
    return "" if os.geteuid() == 0 else "only root makes Debian's folders and mounts what a build needs"


def pip_settings() -> dict[str, str]:
    """What this machine's pip is told about where packages come from, by files and variables."""
    names = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "proxy", "timeout")
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, name = name.partition(".")
        name = "timeout" if name == "default-timeout" else name
        if section in found and name in names:
            found[section][name] = ast.literal_eval(value)
    return found["global"] | found["install"] | found[":env:"]


def mounts_of_pip(settings: dict[str, str], folder: Path) -> dict[Path, str]:
    """What a build must see so that its pip works as this machine's: a file of settings, and what they name."""
    file = folder / "pip.conf"
    lines = ["[global]"]
    mounts = {file: "/etc/pip.conf"}
    for name, value in settings.items():
        lines.append(f"{name} = {' '.join(value.split())}")
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            # An index names files that lie beside it.
            path = path.parent if word.startswith("file://") else path
            if path.is_absolute() and path.exists():
                mounts[path] = str(path)
    file.write_text("\n".join(lines) + "\n")
    return mounts


@dataclass(frozen=True)
class Builder:
    """buildah with its images in a folder of its own."""

    folder: Path
    mounts: dict[Path, str]

    def __call__(self, *arguments: str | Path, timeout: float = 300, fails: bool = False) -> str:
        """Output and messages of one command, which is to succeed, or else to fail."""
        places = ("--root", self.folder / "root", "--runroot", self.folder / "run")
        command = [str(part) for part in ("buildah", *places, *arguments)]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert (process.returncode != 0) == fails, f"{command} gave {process.returncode}:\n{output[-6000:]}"
        return output

    def build(self, tag: str, context: Path, *options: str | Path, timeout: float = 3000, fails: bool = False) -> str:
        """Build an image; give all that the build has said."""
        mounts = [f"--volume={here}:{there}:ro" for here, there in self.mounts.items()]
        fixed = ("--isolation", "chroot", "--network", "host", "--pull-never", "--layers")
        return self("build", *fixed, *mounts, *options, "--tag", tag, context, timeout=timeout, fails=fails)

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Container]:
        """A container of an image; its files last as long as it."""
        name = self("from", "--pull-never", image).strip().splitlines()[-1]
        try:
            yield Container(self, name)
        finally:
            self("rm", name)

    def add_debian(self, release: str) -> str:
        """Make an image of a bare Debian with its Python, and give its name.

        Raises:
            ConnectionError: Debian's packages are out of reach.
        """
        tree, name = self.folder / release, f"localhost/debian:{release}"
        included = "--include=python3,python-is-python3,ca-certificates"
        command = ["debootstrap", "--variant=minbase", included, release, tree]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if "Failed getting release file" in done.stdout:
            raise ConnectionError(f"debootstrap does not reach Debian's packages: {done.stdout.splitlines()[-1]}")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        # As in the images that are named so: nobody needs a package to survive a loss of power while it is installed.
        (tree / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
        container = self("from", "scratch").strip()
        self("add", "--quiet", container, tree, "/")
        self("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(tree)
        return name

    def add_base(self, name: str, containerfile: str, **files: str) -> None:
        """Build a stand-in under the name that the Dockerfile has for a base."""
        context = self.folder / "base"
        context.mkdir()
        (context / "Containerfile").write_text(containerfile)
        for file, text in files.items():
            (context / file).write_text(text)
        self.build(name, context, "--format", "oci")
        shutil.rmtree(context)


@dataclass(frozen=True)
class Container:
    """A container in which commands run as its image says: user, folder, variables."""

    builder: Builder
    name: str

    def __call__(self, *command: str, timeout: float = 600) -> str:
        fixed = ("--isolation", "chroot", "--network", "host")
        return self.builder("run", *fixed, self.name, "--", *command, timeout=timeout)


@contextlib.contextmanager
def builder(folder: Path) -> Iterator[Builder]:
    """A builder whose images, containers and mounts are gone at the end."""
    builder = Builder(folder, mounts_of_pip(pip_settings(), folder))
    try:
        yield builder
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            builder("rm", "--all")
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            place = line.split()[1]
            if Path(place).is_relative_to(folder):
                subprocess.run(["umount", "--lazy", place], check=False, timeout=60)
        shutil.rmtree(folder)
