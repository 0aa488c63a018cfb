"""Where two runs part: the first step whose samples, loss or gradient norm differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.training.metrics import read_metrics

COMPARED = ("ordinals", "loss", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison of two runs found."""

    common_steps: int
    """Steps that both runs have."""
    first_difference: int | None
    """First step that differs, or None."""
    description: str


def _differs(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        # Written so that NaN differs from every number; NaN in both runs is the same failure.
        return not (abs(a - b) <= tolerance * max(abs(a), abs(b)) or (math.isnan(a) and math.isnan(b)))
    return a != b


def compare_runs(run_a: Path, run_b: Path, *, tolerance: float = 0.0) -> Comparison:
    """Compare the training lines of two runs step by step.

    Args:
        tolerance: largest relative difference of losses and gradient norms that counts as equal; 0 asks for equal bits.

    Raises:
        ValueError: a directory has no metrics, or the runs share no step.
    """
    lines_a, lines_b = ({line["step"]: line for line in read_metrics(run) if "loss" in line} for run in (run_a, run_b))
    common = sorted(lines_a.keys() & lines_b.keys())
    if not common:
        raise ValueError(f"{run_a} and {run_b} have no step in common: there is nothing to compare")
    for step in common:
        a, b = lines_a[step], lines_b[step]
        differing = [name for name in COMPARED if _differs(a[name], b[name], tolerance)]
        if differing:
            details = ", ".join(f"{name} {_difference(a[name], b[name])}" for name in differing)
            return Comparison(
                common_steps=len(common),
                first_difference=step,
                description=f"step {step} is the first of {len(common)} common steps that differs: {details}",
            )
    within = f"within {tolerance:g}" if tolerance else "to the last bit"
    return Comparison(
        common_steps=len(common),
        first_difference=None,
        description=f"samples, losses and gradient norms of all {len(common)} common steps agree {within}",
    )


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, float) and isinstance(b, float):
        return f"{a!r} vs {b!r} (relative {abs(a - b) / max(abs(a), abs(b)):.1e})"
    return f"{a} vs {b}"
