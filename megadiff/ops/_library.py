"""The native libraries: found beside the package, loaded once, each only where torch has its device.

`pip install --no-build-isolation` builds them into `megadiff/_lib` (see setup.py): CPU kernels wherever there is a C++
compiler, CUDA kernels wherever there is nvcc. Where one is missing or does not load, the eager twins serve, and one
warning says so. With MEGADIFF_KERNELS=eager in the environment neither is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

from megadiff.ops import _sources, fakes

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / "megadiff" / "_lib"
_INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
_BUILD = "`pip install --no-build-isolation --no-deps -e .` in the checkout"


@torch.compiler.assume_constant_result
def is_live(device_type: str) -> bool:
    """Whether native kernels serve tensors of this device type."""
    return state(device_type) == "native"


@functools.cache
def state(device_type: str) -> str:
    """`native`, or why the eager twins serve tensors of this device type."""
    if device_type not in ("cpu", "cuda"):
        return f"eager: there are no native kernels for {device_type}"
    if os.environ.get("MEGADIFF_KERNELS") == "eager":
        return "eager: MEGADIFF_KERNELS asks for it"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "eager: torch finds no CUDA device"
    wish = os.environ.get("MEGADIFF_CPU_ISA")
    if wish not in (None, *_INSTRUCTION_SETS):
        raise ValueError(f"MEGADIFF_CPU_ISA is {wish!r}: expected one of {', '.join(_INSTRUCTION_SETS)}, or unset it")
    reason = why_not_loaded(device_type) or (_why_not_run() if device_type == "cuda" else None)
    if reason is None:
        return "native"
    warnings.warn(
        f"megadiff's {device_type} kernels are not live, the slower eager operators serve: {reason}", stacklevel=2
    )
    return f"eager: {reason}"


def why_not_loaded(device_type: str) -> str | None:
    """Why the kernels for cpu or cuda cannot be loaded beside this torch; None where they can.

    Asks for no device, and opens no CUDA context: where an image is built there is no GPU, and where a job runs its GPU
    belongs to it.
    """
    # The CPU library holds the schemas of both.
    return _load("cpu") or (_load("cuda") if device_type == "cuda" else None)


@functools.cache
def _load(name: str) -> str | None:
    """Load one library and return None, or why it cannot be."""
    path = _path(name)
    if not path.exists():
        needed = "a C++ compiler" if name == "cpu" else "nvcc"
        return f"{path.name} is not built: with {needed} on PATH, {_BUILD} builds it"
    try:
        torch.ops.load_library(str(path))
        sources = _text(name, f"megadiff_{name}_sources")
    except (OSError, AttributeError) as error:
        # Of torch's error, which names the file alone, the cause is the linker's.
        return f"{path.name} does not load ({error.__cause__ or error}): {_BUILD} builds it anew"
    expected = _sources.digest(_ROOT / "csrc")
    if expected is not None and sources != expected:
        return f"{path.name} was built from other sources than csrc/ holds: {_BUILD} builds it anew"
    if name == "cpu":
        fakes.register()
    return None


def _why_not_run() -> str | None:
    """Why the loaded CUDA library has no kernels for the current device; None where it has."""
    torch.zeros(1, device="cuda")  # opens a context on it
    if obstacle := _text("cuda", "megadiff_cuda_obstacle"):
        return f"{_path('cuda').name} does not run on {torch.cuda.get_device_name()}: {obstacle}"
    return None


def _text(library: str, function: str) -> str:
    """What a function of one of the libraries returns that takes nothing and returns text."""
    call = getattr(ctypes.CDLL(str(_path(library))), function)
    call.restype = ctypes.c_char_p
    return call().decode()


def is_built(name: str) -> bool:
    """Whether the library of this device type lies beside the package."""
    return _path(name).exists()


def _path(name: str) -> Path:
    return _FOLDER / f"libmegadiff_{name}.so"


def instruction_set() -> str:
    """Which of its kernels the CPU library has chosen for this processor: baseline, avx2 or avx512."""
    return _text("cpu", "megadiff_cpu_instruction_set")
