"""Where the numbers of a run go: metrics.jsonl for programs, TensorBoard for eyes, the console for patience.

`metrics.jsonl` has one training line per step and one line per validation. On resume, lines after the checkpoint are
dropped, so the file always reads as if the run had never been interrupted. Sinks get the reported steps, and more about
them: what is a mean there is one over all steps since the report before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from megadiff.integrity import replace_text

if TYPE_CHECKING:
    from megadiff.training.config import TrainingConfig
    from megadiff.training.observed import Observed
    from megadiff.training.sinks import Sink
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
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


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


def memory_gib(device: torch.device) -> float:
    """Most memory that this process has had: allocated on its GPU since the start, or its own on a CPU, now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


class MetricsWriter:
    """Writes the numbers of one run; only one rank of the job should have one."""

    def __init__(
        self,
        run_dir: Path,
        sinks: Sequence[Sink],
        training: TrainingConfig,
        *,
        resumed_step: int,
        flops_per_sample: int,
        peak_flops: float | None,
        device: torch.device,
    ) -> None:
        """Open the files of a run that has completed `resumed_step` steps.

        Args:
            sinks: closed with the writer.
            flops_per_sample: forward and backward, of all its positions, counted or not; see `TokenFlops`.
            peak_flops: operations per second of all devices of the job; None where it is not known.
            device: this rank's.
        """
        _drop_lines_after(run_dir, resumed_step)
        self._sinks, self._training, self._device = sinks, training, device
        self._flops_per_sample, self._peak_flops = flops_per_sample, peak_flops
        self._lines = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._seconds_since_report = 0.0
        self._steps_since_report = 0
        self._samples_since_report = 0
        self._observed_since_report: Observed | None = None
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

    def _numbers(self, step: int, numbers: dict[str, float]) -> None:
        for sink in self._sinks:
            with self._surviving_a_full_disk():
                sink.numbers(step, numbers)

    def training(self, line: dict[str, Any], observed: Observed, grad_norms: dict[str, float]) -> None:
        """Record one training step.

        Args:
            observed: sums of the step.
            grad_norms: by group of parameters, of the last reported step.
        """
        self._write(line)
        self._seconds_since_report += line["step_time"]
        self._steps_since_report += 1
        first, end = line["ordinals"]
        self._samples_since_report += end - first
        before = self._observed_since_report
        self._observed_since_report = observed if before is None else before + observed
        step = line["step"]
        if not self._training.is_reported(step):
            return
        mean_time = self._seconds_since_report / self._steps_since_report
        names = ("loss", "nelbo", "grad_norm", "learning_rate", "tokens_per_second", "step_time")
        numbers = {f"train/{name}": line[name] for name in names}
        numbers |= self._observed_since_report.scalars
        numbers |= {f"grad_norm/{name}": norm for name, norm in grad_norms.items()}
        numbers["device/memory_gib"] = memory_gib(self._device)
        if self._peak_flops is not None:
            flops = self._samples_since_report * self._flops_per_sample
            numbers["device/mfu"] = flops / self._seconds_since_report / self._peak_flops
        self._numbers(step, numbers)
        self._seconds_since_report, self._steps_since_report, self._samples_since_report = 0.0, 0, 0
        self._observed_since_report = None
        train_steps = self._training.train_steps
        logger.info(
            "step %*d/%d | loss %.4f | nelbo %.3f | grad norm %.3f | lr %.2e | %s tokens/s | %s left",
            len(str(train_steps)),
            step,
            train_steps,
            line["loss"],
            line["nelbo"],
            line["grad_norm"],
            line["learning_rate"],
            f"{line['tokens_per_second'] * line['step_time'] / mean_time:,.0f}",
            format_duration((train_steps - step) * mean_time),
        )

    def stragglers(self, step: int, report: StragglerReport) -> None:
        """Record who was slow, for sinks only: metrics.jsonl has what a repeated run repeats, and times."""
        self._numbers(
            step, {"device/slowest_rank": report.slowest_rank, "device/straggler_ratio": report.straggler_ratio}
        )

    def validation(self, line: dict[str, Any]) -> None:
        """Record one validation."""
        self._write(line)
        names = ("nelbo", "nelbo_stderr", "bits_per_byte")
        self._numbers(line["step"], {f"{line['split']}/{name}": line[name] for name in names})

    def texts(self, step: int, texts: dict[str, str]) -> None:
        """Show texts, Markdown by name."""
        for sink in self._sinks:
            with self._surviving_a_full_disk():
                for name, markdown in texts.items():
                    sink.text(step, name, markdown)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for close in (self._lines.close, *(sink.close for sink in self._sinks)):
            with self._surviving_a_full_disk():
                close()
