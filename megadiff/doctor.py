"""What this machine offers megadiff: versions, devices, kernels and accelerations, each named live or missing."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Iterator

import torch

from megadiff import accelerations
from megadiff.machine.versions import version
from megadiff.ops import _library

_PACKAGES = ("megadiff", "torch", "megatron-core", "sentencepiece", "transformers", "tensorboard")


def check_live(device_type: str) -> None:
    """Check that this machine has what it takes to train on a kind of device: one, and the kernels for it.

    Raises:
        ValueError: it has not.
    """
    if (found := _library.state(device_type)) != "native":
        raise ValueError(
            f"--require {device_type} asks for devices and native kernels of this kind, but the operators are {found}: "
            "see what `megadiff doctor` shows of both"
        )


def check_loads(device_type: str) -> None:
    """Check that the native kernels for a kind of device are built and load beside this torch; no device is asked for.

    Raises:
        ValueError: they are not, or do not.
    """
    if reason := _library.why_not_loaded(device_type):
        raise ValueError(f"the native kernels for {device_type} cannot be used by torch {torch.__version__}: {reason}")


def check_health(device_type: str) -> None:
    """Check what can be told beside a job: devices are seen, and the kernels for them load.

    Opens no CUDA context, which would take hundreds of MB on a GPU that a job has filled: torch counts devices by
    NVIDIA's management library. Whether kernels run on them is `check_live`'s question.

    Raises:
        ValueError: there is no device, or its kernels cannot be loaded.
    """
    if device_type == "cuda" and not torch.cuda.device_count():
        raise ValueError(
            "--health cuda asks for GPUs, but torch sees none: start the container with --gpus all (Docker) or --nv "
            "(Apptainer), and compare with nvidia-smi"
        )
    check_loads(device_type)


def report() -> Iterator[tuple[str, str]]:
    """Pairs of (name, finding), in the order in which a person would ask."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield package, version(package) or "missing"
    supported = accelerations.supported_transformer_engine()
    yield "transformer_engine", f"{version('transformer_engine') or 'missing'} (supported: {supported})"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        why = f", for torch's CUDA {torch.version.cuda} finds no device" if torch.version.cuda else ""
        cores = f"CPU only, {os.cpu_count()} cores{why}"
        yield "devices", f"{cores}: Megatron-Core runs over gloo behind megadiff.parallel.cpu"
    yield "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "unset (set it to 1 with several processes on CPU)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is said here
        cpu_kernels, cuda_kernels = _library.state("cpu"), _library.state("cuda")
    native = f"native, compiled for {_library.instruction_set()}" if cpu_kernels == "native" else cpu_kernels
    yield "CPU kernels", native
    yield "CUDA kernels", f"{'built' if _library.is_built('cuda') else 'not built'}, {cuda_kernels}"
    yield "nvcc", shutil.which("nvcc") or "missing (only needed to build CUDA kernels)"
    for acceleration in accelerations.table():
        yield acceleration.name, str(acceleration)
