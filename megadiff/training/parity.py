"""Whether a run in another precision learns as the one in bf16 does: two curves of the same seed, and a band.

Both runs see the same samples with the same noise, step by step, so what differs between their losses is the precision
and what it has led to, not luck. Losses are averaged over windows of steps; in each window the ratio of the averages
must stay in the band. The estimates of the bound on the validation split, which have one noise for all runs, are held
to it, too.

Training amplifies any rounding, most of all where a loss leaves a plateau: a step sooner or later is some per cent. How
much that is without FP8 tells a control, in bf16 with micro-batches of half the size: the same sums in another order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.fields import require
from megadiff.training.metrics import read_metrics

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

REFERENCE, CONTROL = "bf16", "bf16-control"
"""Run directories beside that of the candidate, which is named by its precision."""


def runs_of_protocol(config: TrainConfig, *, control: bool) -> dict[str, TrainConfig]:
    """The runs that parity of a configuration in FP8 needs, by the names of their directories, the candidate last.

    Raises:
        ValueError: the configuration is not in FP8, or its micro-batches cannot be halved for a control.
    """
    training = config.training
    if training.precision not in ("fp8", "fp8-emulated"):
        raise ValueError(
            f"training.precision is {training.precision}, but parity is that of FP8 with bf16: give "
            "--training.precision fp8, or fp8-emulated"
        )
    in_bf16 = dataclasses.replace(training, precision="bf16")
    settings = {REFERENCE: in_bf16}
    if control:
        half, rest = divmod(training.micro_batch_size, 2)
        if rest:
            raise ValueError(
                f"training.micro_batch_size is {training.micro_batch_size}, but --control halves it: choose an even one"
            )
        settings[CONTROL] = dataclasses.replace(in_bf16, micro_batch_size=half)
    settings[training.precision] = training
    return {name: dataclasses.replace(config, training=of_run) for name, of_run in settings.items()}


@dataclass(frozen=True, kw_only=True)
class Window:
    """A few steps of both runs, or one validation."""

    name: str
    reference: float
    """Mean loss, or bound; nats per token."""
    candidate: float
    spread: float = 0.0
    """Standard error of the relative difference, from how it scatters within the window; 0 for a validation."""

    @property
    def difference(self) -> float:
        """Relative to the reference; positive where the candidate is worse."""
        return self.candidate / self.reference - 1.0


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What a comparison of two curves found."""

    windows: list[Window]
    band: float
    """Largest relative difference that counts as parity."""

    @property
    def holds(self) -> bool:
        # Written so that NaN is outside.
        return all(abs(window.difference) <= self.band for window in self.windows)

    def table(self) -> str:
        """The windows as a table, and the verdict."""
        lines = [f"{'':<22}{'reference':>10}{'candidate':>10}{'difference':>12}  standard error"]
        for window in self.windows:
            outside = "" if abs(window.difference) <= self.band else "  outside"
            spread = f"{window.spread:16.3%}" if window.spread else " " * 16
            lines.append(
                f"{window.name:<22}{window.reference:>10.4f}{window.candidate:>10.4f}{window.difference:>+12.3%}"
                f"{spread}{outside}"
            )
        verdict = "parity: all windows are" if self.holds else "no parity: not all windows are"
        return "\n".join([*lines, f"{verdict} within {self.band:.2%}"])


def compare_curves(reference: Path, candidate: Path, *, band: float, window: int, first_step: int = 1) -> Parity:
    """Compare the smoothed curves of two runs.

    Args:
        first_step: what comes before is left out, validations too.
        band: largest relative difference in a window, of losses and bounds.
        window: steps of a window; the last one may have fewer, but no fewer than half of that.

    Raises:
        ValueError: a directory has no metrics, the runs saw other samples or have no window in common, or band or
            window are out of range.
    """
    require(band > 0, "--band", band, "be positive")
    require(window >= 1, "--window", window, "be at least 1")
    lines = [[line for line in read_metrics(run) if line["step"] >= first_step] for run in (reference, candidate)]
    pairs = list(_common(*([line for line in of_run if "loss" in line] for of_run in lines)))
    for a, b in pairs:
        if a["ordinals"] != b["ordinals"]:
            raise ValueError(
                f"at step {a['step']} {reference} saw the samples {a['ordinals']}, but {candidate} {b['ordinals']}: "
                "train both with the same settings but for the precision"
            )
    windows = [
        _window(pairs[start : start + window])
        for start in range(0, len(pairs), window)
        if 2 * len(pairs[start : start + window]) >= window
    ]
    if not windows:
        raise ValueError(
            f"{reference} and {candidate} have {len(pairs)} steps from {first_step} on in common, but --window is "
            f"{window}: train on, or choose a smaller window"
        )
    validations = [
        Window(name=f"validation, step {a['step']}", reference=a["nelbo"], candidate=b["nelbo"])
        for a, b in _common(*([line for line in of_run if "nelbo_stderr" in line] for of_run in lines))
    ]
    return Parity(windows=windows + validations, band=band)


def _common(of_a: list[dict[str, Any]], of_b: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Lines of the same step, in order."""
    by_step = {line["step"]: line for line in of_b}
    return ((line, by_step[line["step"]]) for line in of_a if line["step"] in by_step)


def _window(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Window:
    reference, candidate = (sum(line["loss"] for line in of_run) / len(pairs) for of_run in zip(*pairs, strict=True))
    scatter = sum((b["loss"] - a["loss"] - (candidate - reference)) ** 2 for a, b in pairs)
    return Window(
        name=f"steps {pairs[0][0]['step']} to {pairs[-1][0]['step']}",
        reference=reference,
        candidate=candidate,
        spread=math.sqrt(scatter / max(1, len(pairs) - 1) / len(pairs)) / reference,
    )
