"""Where the numbers of a run go: metrics.jsonl for programs, TensorBoard for eyes, the console for patience.

`metrics.jsonl` has one training line per step and one line per validation. On resume, lines after the checkpoint are
dropped, so the file always reads as if the run had never been interrupted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megadiff.training.stragglers import StragglerReport

logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, in order; a last line cut off by a crash is left out.

    Raises:
        ValueError: the directory holds no metrics.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl: expected a run directory of `megadiff train`")
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _drop_lines_after(run_dir: Path, step: int) -> None:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
    partial = path.with_suffix(".jsonl.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)


def format_duration(seconds: float) -> str:
    """A duration for people: 45s, 3m20s, 5h02m, 4d07h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class MetricsWriter:
    """Writes the numbers of one run; only one rank of the job should have one."""

    def __init__(self, run_dir: Path, *, resumed_step: int, train_steps: int, console_interval: int) -> None:
        """Open the files of a run that has completed `resumed_step` steps."""
        from torch.utils.tensorboard import SummaryWriter

        _drop_lines_after(run_dir, resumed_step)
        self._train_steps = train_steps
        self._console_interval = console_interval
        self._lines = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
        self._seconds_since_report = 0.0
        self._steps_since_report = 0
        self._is_full = False

    @contextmanager
    def _surviving_a_full_disk(self) -> Iterator[None]:
        """Say once that numbers are lost: a run must not end for want of them."""
        try:
            yield
        except OSError as error:
            if not self._is_full:
                logger.warning("metrics are lost until there is room again: %s", error)
            self._is_full = True

    def _write(self, line: dict[str, Any]) -> None:
        with self._surviving_a_full_disk():
            self._lines.write(json.dumps(line) + "\n")

    def _add_scalars(self, prefix: str, numbers: dict[str, float], step: int) -> None:
        with self._surviving_a_full_disk():
            for name, number in numbers.items():
                self._tensorboard.add_scalar(f"{prefix}/{name}", number, step)

    def training(self, line: dict[str, Any]) -> None:
        """Record one training step."""
        self._write(line)
        self._seconds_since_report += line["step_time"]
        self._steps_since_report += 1
        step = line["step"]
        if step % self._console_interval and step not in (1, self._train_steps):
            return
        mean_time = self._seconds_since_report / self._steps_since_report
        self._seconds_since_report, self._steps_since_report = 0.0, 0
        names = ("loss", "nelbo", "grad_norm", "learning_rate", "tokens_per_second", "step_time")
        self._add_scalars("train", {name: line[name] for name in names}, step)
        logger.info(
            "step %*d/%d | loss %.4f | nelbo %.3f | grad norm %.3f | lr %.2e | %s tokens/s | %s left",
            len(str(self._train_steps)),
            step,
            self._train_steps,
            line["loss"],
            line["nelbo"],
            line["grad_norm"],
            line["learning_rate"],
            f"{line['tokens_per_second'] * line['step_time'] / mean_time:,.0f}",
            format_duration((self._train_steps - step) * mean_time),
        )

    def stragglers(self, step: int, report: StragglerReport) -> None:
        """Record who was slow, for TensorBoard only: metrics.jsonl has what a repeated run repeats, and times."""
        numbers = {"slowest_rank": report.slowest_rank, "straggler_ratio": report.straggler_ratio}
        self._add_scalars("train", numbers, step)

    def validation(self, line: dict[str, Any]) -> None:
        """Record one validation."""
        self._write(line)
        names = ("nelbo", "nelbo_stderr", "bits_per_byte")
        self._add_scalars(line["split"], {name: line[name] for name in names}, line["step"])

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._lines, self._tensorboard):
            with self._surviving_a_full_disk():
                stream.close()
