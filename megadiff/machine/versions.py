"""Versions of installed packages, to be shown, recorded and compared between ranks.

pip's metadata of a package may lack its build: 2.13.0 for the torch of the default index, which itself reports
2.13.0+cu130. Two builds of one release compute differently, so torch is asked itself. Names are pip's, in which hyphens
and underscores are equal.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

REQUIRED = ("megadiff", "megatron-core", "torch")
OPTIONAL = ("transformer_engine", "flash_attn", "flash_attn_3", "apex", "deepspeed", "triton")
"""Packages that compute where they are installed."""


def version(package: str) -> str | None:
    """Return the version of a package with its build, or None where it is not installed."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package == "torch":
        import torch

        return str(torch.__version__)
    return found


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute, as far as they are installed."""
    found = {package: version(package) for package in REQUIRED + OPTIONAL}
    return {package: number for package, number in found.items() if number is not None}


def major_minor(number: str) -> tuple[int, int]:
    """Return what releases are compared by: (2, 10) for 2.10.0a0+b558c986e8.nv25.11, which pip puts before 2.10."""
    parsed = Version(number)
    return parsed.major, parsed.minor
