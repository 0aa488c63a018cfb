"""Of our constraints, those for packages that a container's own constraints leave open.

    python tools/open_constraints.py THEIRS OURS > BOTH_HOLD

pip wants all constraints to hold at once, so two versions of one package would be none at all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def constraints(path: Path) -> dict[str, str]:
    """Lines by the name of their package, as pip compares names; without comments and options."""
    lines = (line.partition(" #")[0].strip() for line in path.read_text().splitlines())
    wanted = [line for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(Requirement(line).name): line for line in wanted}


def left_open(theirs: Path, ours: Path) -> list[str]:
    """Lines of ours for packages that are not among theirs."""
    taken = constraints(theirs)
    return [line for name, line in constraints(ours).items() if name not in taken]


if __name__ == "__main__":
    print(*left_open(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
