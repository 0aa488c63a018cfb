"""Of our constraints, those for packages that a container's own constraints leave open.

    python tools/open_constraints.py THEIRS OURS > BOTH_HOLD

pip wants all constraints to hold at once, so two versions of one package would be none at all. Nor can ours hold for a
package whose releases name versions of one that is theirs: pydantic 2.14.3 wants exactly one pydantic-core.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PARTNERS = (
    {"annotated-types", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection"},
    {
        "googleapis-common-protos",
        "grpcio",
        "opentelemetry-exporter-otlp-proto-common",
        "opentelemetry-exporter-otlp-proto-http",
        "opentelemetry-proto",
        "protobuf",
        "tensorboard",
        "tensorboard-data-server",
        "typing-extensions",
        "wandb",
    },
    {
        "anyio",
        "click",
        "filelock",
        "fsspec",
        "hf-xet",
        "httpcore2",
        "httpx2",
        "huggingface-hub",
        "safetensors",
        "tokenizers",
        "transformers",
        "typer",
    },
    {"contourpy", "matplotlib", "numpy"},
    {"markdown-it-py", "mdurl", "pygments", "rich"},
    {"mpmath", "sympy"},
    {"markupsafe", "jinja2", "werkzeug"},
)
"""Packages of tools/constraints.txt that have to be chosen together: releases of one exclude releases of another."""


def constraints(path: Path) -> dict[str, str]:
    """Lines by the name of their package, as pip compares names; without comments and options."""
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    wanted = [line for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(Requirement(line).name): line for line in wanted}


def left_open(theirs: Path, ours: Path) -> list[str]:
    """Lines of ours for packages that neither are among theirs nor have a partner there."""
    taken = set(constraints(theirs))
    taken |= {name for partners in PARTNERS if partners & taken for name in partners}
    return [line for name, line in constraints(ours).items() if name not in taken]


if __name__ == "__main__":
    print(*left_open(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
