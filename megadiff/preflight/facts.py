"""What is installed on a node, as names and texts that must be the same everywhere."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from megadiff.integrity import sources_digest
from megadiff.machine.versions import versions

_SETTINGS = ("NCCL_", "NVTE_", "TORCH_NCCL_", "CUDA_DEVICE_", "PYTORCH_", "OMP_")
"""Beginnings of environment variables that change what is computed or how it travels."""
_MAY_DIFFER = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
"""Names of a node's own interfaces."""


def facts() -> dict[str, str]:
    """Versions, the sources' digest and settings of this process."""
    found = {"python": platform.python_version(), **versions(), "megadiff's sources": sources_digest()}
    if torch.cuda.is_available():
        found |= {
            "GPU": torch.cuda.get_device_name(),
            "GPU driver": driver_version(),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
    return found | {name: value for name, value in sorted(settings.items()) if name not in _MAY_DIFFER}


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of NVIDIA's kernel module, as the kernel says."""
    found = re.search(r"\d+\.[\d.]+", path.read_text()) if path.exists() else None
    return found[0] if found else "unknown"
