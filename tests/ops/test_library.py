"""Building and loading the native libraries, and what happens where they cannot be built or loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from ops.cases import MASK, make_case, make_logits

from megadiff import doctor, ops
from megadiff.ops import _library, _sources

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`_library` as at the start of a process that looks into an empty folder."""
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    _library.state.cache_clear()
    _library._load.cache_clear()
    yield tmp_path
    _library.state.cache_clear()
    _library._load.cache_clear()


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_kernels_are_live_where_there_is_a_compiler() -> None:
    assert _library.state("cpu") == "native"
    assert _library.instruction_set() in ("baseline", "avx2", "avx512")
    assert ("CPU kernels", f"native, compiled for {_library.instruction_set()}") in list(doctor.report())


@pytest.mark.slow
def test_pip_builds_in_isolation_against_the_torch_of_the_environment(tmp_path: Path) -> None:
    """Which pip hides from the build; compilers that fail show what they were called with."""
    pytest.importorskip("pip", reason="this environment has no pip")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "megadiff"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_lib"))
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path), str(tmp_path)],
        env={**os.environ, "CXX": "false", "NVCC": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    assert f"-isystem {Path(torch.__file__).parent / 'include'}" in result.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler", "NVCC": "no-such-nvcc"}, "no no-such-compiler on PATH: install one, or name"),
        ({"CXX": "false", "MEGADIFF_BUILD": "cpu"}, "this command failed"),
        ({"CXX": "false", "NVCC": "false", "MAX_JOBS": ""}, "this command failed"),
        ({"CXX": "false", "NVCC": "true"}, "this command failed"),
        ({"MEGADIFF_BUILD": "none"}, "MEGADIFF_BUILD leaves it out"),
    ],
)
def test_a_build_that_cannot_be_is_a_warning(environment: dict[str, str], reason: str, tmp_path: Path) -> None:
    result = build(tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert "warning: megadiff is installed without its cpu kernels: " + reason in result.stderr
    assert "without its cuda kernels" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_missing_library_is_one_warning_and_the_eager_twins_serve(fresh_library: Path) -> None:
    case, logits = make_case("hybrid 0", 6, 37), make_logits(6, 37)
    with pytest.warns(UserWarning, match=r"libmegadiff_cpu\.so is not built: with a C\+\+ compiler on PATH, `pip"):
        terms = ops.whole_row_loss(logits, case.targets, vocab_size=37, mask_id=MASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ops.whole_row_loss(logits, case.targets, vocab_size=37, mask_id=MASK)
    assert torch.equal(terms, again)
    assert any(
        name == "CPU kernels" and "eager: libmegadiff_cpu.so is not built" in text for name, text in doctor.report()
    )


def test_a_broken_library_is_named(fresh_library: Path) -> None:
    (fresh_library / "libmegadiff_cpu.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match=r"libmegadiff_cpu\.so does not load"):
        assert not _library.is_live("cpu")


def test_a_library_that_the_linker_refuses_is_told_in_its_words(fresh_library: Path) -> None:
    (fresh_library / "libmegadiff_cpu.so").write_bytes(b"not a library")
    assert re.search(
        r"libmegadiff_cpu\.so does not load \(\S+: (file too short|invalid ELF header)\): `pip",
        str(_library.why_not_loaded("cpu")),
    )


ASKED_BESIDE_A_JOB = """
import sys
from pathlib import Path

import torch

from megadiff.cli import main
from megadiff.ops import _library, _sources

_library._FOLDER = Path(sys.argv[1])
opened = []


def open_context():
    opened.append(True)
    raise RuntimeError("a context")


torch.cuda._lazy_init = open_context
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
codes = [main(["doctor", "--health", "cuda"]), main(["doctor", "--require-library", "cuda"])]
print(codes, opened)
try:
    _library.state("cuda")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_libraries_are_checked_without_opening_a_cuda_context(tmp_path: Path) -> None:
    """A CUDA library that loads, and a torch that would tell of a context: only who runs kernels opens one."""
    source = tmp_path / "cuda.cpp"
    source.write_text(
        f'extern "C" const char *megadiff_cuda_sources() {{ return "{_sources.digest(ROOT / "csrc")}"; }}\n'
        'extern "C" const char *megadiff_cuda_obstacle() { return ""; }\n'
    )
    library = tmp_path / "libmegadiff_cuda.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    (tmp_path / "libmegadiff_cpu.so").symlink_to(_library._path("cpu"))
    command = [sys.executable, "-c", ASKED_BESIDE_A_JOB, str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert told.stdout.splitlines() == ["[0, 0] []", "a context"], told.stderr


def test_a_library_of_other_sources_is_not_used(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.undo()
    monkeypatch.setattr(_library, "_ROOT", fresh_library)
    (fresh_library / "csrc").mkdir()
    (fresh_library / "csrc" / "registration.cpp").write_text("// changed since")
    with pytest.warns(UserWarning, match=r"libmegadiff_cpu\.so was built from other sources than csrc/ holds"):
        assert not _library.is_live("cpu")


def test_a_source_distribution_holds_the_sources(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected < held and "setup.py" in held


def test_an_unknown_instruction_set_is_refused(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGADIFF_CPU_ISA", "AVX2")
    with pytest.raises(ValueError, match="MEGADIFF_CPU_ISA is 'AVX2': expected one of baseline, avx2, avx512"):
        _library.is_live("cpu")


def test_the_environment_may_ask_for_the_eager_twins(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGADIFF_KERNELS", "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _library.state("cpu") == "eager: MEGADIFF_KERNELS asks for it"


def test_the_cuda_library_is_not_loaded_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(_library, "_load", lambda name: pytest.fail(f"{name} was loaded"))
    assert _library.state("cuda") == "eager: torch finds no CUDA device"
    assert _library.state("mps") == "eager: there are no native kernels for mps"
