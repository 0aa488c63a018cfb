"""Every CUDA source compiles where there is nvcc, GPU or not, and no kernel spills registers to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    "arch", [pytest.param("80", marks=pytest.mark.slow), "90a", pytest.param("100", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
def test_no_kernel_spills_registers(source: Path, arch: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v"]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include"), "-Xcompiler=-fPIC"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(source), "-o", str(tmp_path / "object.o")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    kernels = REPORT.findall(result.stdout + result.stderr)
    assert kernels, "ptxas reports nothing"
    spilling = [name for name, *bytes_of_memory, _ in kernels if any(int(count) for count in bytes_of_memory)]
    assert not spilling, f"these kernels keep registers in memory: {spilling}"
    # Three blocks of 256 threads to a multiprocessor: what the kernels that keep a row in shared memory are cut for.
    crowded = {name: registers for name, *_, registers in kernels if "Lb1E" in name and int(registers) > 80}
    assert not crowded, f"these kernels leave no room for three blocks: {crowded}"
