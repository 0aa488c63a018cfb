"""Build entry point: metadata is in pyproject.toml, here are the native libraries of csrc/.

Two plain shared libraries on LibTorch's stable ABI, which `megadiff.ops` loads with `torch.ops.load_library`: one
binary serves every torch from 2.10 on and every Python.

    megadiff/_lib/libmegadiff_cpu.so    wherever there is a C++ compiler
    megadiff/_lib/libmegadiff_cuda.so   wherever there is nvcc, whether or not this machine has a GPU or a CUDA torch

Only headers of torch are needed, and torch is never imported. Whatever cannot be built is left out with one warning:
megadiff then runs its eager twins. Settings, from the environment:

    MEGADIFF_BUILD       cpu,cuda (default): which libraries to try; none builds nothing
    CXX, NVCC            the compilers, c++ (or g++) and nvcc by default
    MEGADIFF_CUDA_ARCHS  compute capabilities, e.g. 90a or 80;90a; by default 80, 90a and newer ones that nvcc knows
    MAX_JOBS             compilers at a time; one per core by default
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = runpy.run_path(str(ROOT / "megadiff/ops/_sources.py"))["digest"](CSRC)
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_ARCHS = ("80", "90a", "100")
# No -march=native: a wheel must run elsewhere. Kernels whose speed depends on the instruction set are compiled for
# each of these and chosen at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    },
}


@dataclass
class Library:
    """One shared library: how each object is compiled, and how they are linked."""

    compiler: list[str]
    flags: list[str]
    sources: list[tuple[Path, list[str]]]
    link_flags: list[str] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    """Libraries that are needed where this one runs, and may be missing where it is built."""


class CannotBuild(Exception):
    """A library is left out, for the reason given."""


def torch_folder() -> Path:
    """The torch that megadiff is to run with.

    pip hides its environment from an isolated build, but builds by that environment's Python, so torch lies in one of
    its folders, in one of the Python that the environment is made of, or in the user's.
    """
    if (spec := importlib.util.find_spec("torch")) and spec.origin:
        return Path(spec.origin).parent
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    folders = [sysconfig.get_path("platlib")]
    folders += [sysconfig.get_path("platlib", scheme, vars=base) for scheme in sysconfig.get_scheme_names()]
    for folder in folders:
        if Path(folder, "torch", "include").is_dir():
            return Path(folder, "torch")
    raise CannotBuild("no torch to take headers from: install torch first, and then megadiff")


def compiler(variable: str, *candidates: str) -> list[str]:
    wanted = os.environ.get(variable)
    for name in [wanted] if wanted else candidates:
        program, *options = shlex.split(name)
        if path := shutil.which(program):
            return [path, *options]
    raise CannotBuild(f"no {wanted or ' or '.join(candidates)} on PATH: install one, or name another with {variable}")


def common_flags(torch: Path) -> list[str]:
    headers = ["-isystem", str(torch / "include")]
    return ["-std=c++17", "-O3", f"-I{CSRC}", *headers, OLDEST_TORCH, f"-DMEGADIFF_SOURCES={SOURCES}"]


def cpu_library() -> Library:
    torch = torch_folder()
    sources: list[tuple[Path, list[str]]] = [(CSRC / "registration.cpp", [])]
    for path in sorted(CSRC.glob("*/*_cpu.cpp")):
        sources.append((path, []))
    for path in sorted(CSRC.glob("*/*_cpu_kernels.cpp")):
        for name, flags in INSTRUCTION_SETS.get(platform.machine(), {"baseline": []}).items():
            sources.append((path, [f"-DMEGADIFF_ISA={name}", *flags]))
    # Loops of float sums keep their order: results must not depend on what the compiler finds faster.
    flags = ["-fPIC", "-Wall", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", *common_flags(torch)]
    return Library(compiler("CXX", "c++", "g++"), flags, sources, [f"-L{torch / 'lib'}", "-ltorch_cpu"])


def cuda_library() -> Library:
    nvcc = compiler("NVCC", "nvcc")
    if wanted := os.environ.get("MEGADIFF_CUDA_ARCHS"):
        archs = wanted.replace(",", ";").split(";")
    else:
        known = run([*nvcc, "--list-gpu-arch"]).split()
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('a')}" in known]
        if not archs:
            raise CannotBuild(f"{' '.join(nvcc)} knows none of the compute capabilities {', '.join(CUDA_ARCHS)}")
    flags = ["-Xcompiler=-fPIC", "-DUSE_CUDA", *common_flags(torch_folder())]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(archs, key=lambda arch: int(arch.rstrip("a"))).rstrip("a")
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # newer devices compile it for themselves
    # The torch here may have no CUDA: an empty library of the right name stands for the one that is needed at run time.
    link_flags = ["-Xlinker=--no-as-needed", "-ltorch_cuda"]
    return Library(nvcc, flags, [(path, []) for path in sorted(CSRC.glob("*/*_cuda.cu"))], link_flags, ["torch_cuda"])


LIBRARIES = {"cpu": cpu_library, "cuda": cuda_library}


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CannotBuild(f"this command failed:\n{shlex.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


class BuildLibraries(build_ext):
    """Compile csrc/ with plain compiler commands; an object is made anew when sources, compiler or flags change."""

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.rsplit("_", 1)[-1]
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            if name not in os.environ.get("MEGADIFF_BUILD", "cpu,cuda").split(","):
                raise CannotBuild("MEGADIFF_BUILD leaves it out")
            self.build_library(LIBRARIES[name](), target)
        except CannotBuild as reason:
            target.unlink(missing_ok=True)
            # pip shows nothing of a build that succeeds; `megadiff doctor` tells again.
            print(f"warning: megadiff is installed without its {name} kernels: {reason}", file=sys.stderr)

    def build_library(self, library: Library, target: Path) -> None:
        folder = Path(self.build_temp) / target.stem
        folder.mkdir(parents=True, exist_ok=True)

        def compile_source(source: Path, flags: list[str]) -> str:
            # The flags hold the digest of all sources, headers among them.
            command = [*library.compiler, *library.flags, *flags, "-c", str(source)]
            made = folder / f"{source.stem}-{hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]}.o"
            if not made.exists():
                run([*command, "-o", f"{made}.part"])
                os.replace(f"{made}.part", made)
            return str(made)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as compilers:
            objects = list(compilers.map(compile_source, *zip(*library.sources, strict=True)))
        for name in library.stand_ins:
            (folder / "empty.cpp").write_text("")
            soname = f"-Xlinker=-soname=lib{name}.so"
            run([*library.compiler, "-shared", soname, str(folder / "empty.cpp"), "-o", str(folder / f"lib{name}.so")])
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*library.compiler, "-shared", *objects, f"-L{folder}", *library.link_flags, "-o", str(target)])

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def copy_extensions_to_source(self) -> None:
        """Editable installs: place the libraries beside the sources."""
        for extension in self.extensions:
            file = self.get_ext_filename(extension.name)
            built, place = Path(self.build_lib, file), ROOT / file
            if built.exists():
                place.parent.mkdir(exist_ok=True)
                # A new file takes the old one's name: processes that run on the old one keep it.
                os.replace(shutil.copy2(built, f"{place}.new"), place)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class AnyPython(bdist_wheel):
    """The libraries depend on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"megadiff._lib.libmegadiff_{name}", sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
