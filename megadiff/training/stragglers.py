"""Which rank is slow: the time of its own work, without the waiting for others that makes all ranks look alike.

On a CPU that is the processor time of the process (who waits in gloo sleeps), on a GPU the time between two events
around the forward and backward passes of a step, before gradients are reduced; the events are read when the step's
loss has long been, so nothing waits for them. Where tensor, context or pipeline parallelism exchange within these
passes, the GPU's time has waiting in it: the report tells copies of the model apart rather than ranks within one.

Ranks are compared with the median of their own pipeline stage: stages have different work.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megadiff.parallel.groups import Groups

logger = logging.getLogger(__name__)

REPORTS_TO_WARN = 3


@dataclass(frozen=True, kw_only=True)
class StragglerReport:
    """Who was slowest since the report before."""

    slowest_rank: int
    straggler_ratio: float
    """Its time over the median of its pipeline stage."""
    median_seconds: float
    """Of that stage, per step."""


class Stragglers:
    """Times this rank's own work and compares it with others'.

    Args:
        threshold: ratio to the median above which a rank that stays slowest is warned about.
    """

    def __init__(self, groups: Groups, *, threshold: float) -> None:
        """Learn the ranks' hosts and stages; a collective of the whole job."""
        self._groups, self._threshold = groups, threshold
        self._on_gpu = groups.device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds, self._steps = 0.0, 0
        self._slow_reports = 0
        self._last_slowest = -1
        places: list[tuple[str, int]] = [("", 0)] * groups.world_size
        # all-gather of one small object over all ranks, on the host
        dist.all_gather_object(places, (socket.gethostname(), groups.pp.rank()), group=groups.control)
        self._hosts, self._stages = zip(*places, strict=True)

    def begin(self) -> None:
        """The forward and backward passes of a step begin."""
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._seconds -= time.process_time()

    def end(self) -> None:
        """They are over, and the reduction of gradients has not begun."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.process_time()
        self._steps += 1

    def report(self, step: int) -> StragglerReport:
        """Compare the ranks' work since the last report; a collective of one number per rank."""
        if self._on_gpu:
            # Their steps' losses have been read: the events lie in the past.
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        mine = torch.tensor([self._seconds / max(self._steps, 1)], dtype=torch.float64)
        self._seconds, self._steps = 0.0, 0
        everyone = torch.empty(self._groups.world_size, dtype=torch.float64)
        # all-gather of one number over all ranks, on the host
        dist.all_gather_into_tensor(everyone, mine, group=self._groups.control)
        report = self._compare(everyone.tolist())
        self._warn_of(report, step)
        return report

    def _compare(self, seconds: list[float]) -> StragglerReport:
        medians = {
            stage: statistics.median_low(t for t, s in zip(seconds, self._stages, strict=True) if s == stage)
            for stage in set(self._stages)
        }
        ratios = [t / max(medians[stage], 1e-9) for t, stage in zip(seconds, self._stages, strict=True)]
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        return StragglerReport(
            slowest_rank=slowest, straggler_ratio=ratios[slowest], median_seconds=medians[self._stages[slowest]]
        )

    def _warn_of(self, report: StragglerReport, step: int) -> None:
        """Warn, on rank 0, of a rank that was slowest by more than the threshold in each of the last reports."""
        is_slow = report.straggler_ratio > self._threshold
        is_same = report.slowest_rank == self._last_slowest
        self._slow_reports = (self._slow_reports + 1 if is_same else 1) if is_slow else 0
        self._last_slowest = report.slowest_rank
        if self._slow_reports == REPORTS_TO_WARN and self._groups.rank == 0:
            logger.warning(
                "straggler at step %d: rank %d (host %s) takes %.2f times as long for its own work as the median of "
                "its pipeline stage, %.3g s; all others wait for it",
                step,
                report.slowest_rank,
                self._hosts[report.slowest_rank],
                report.straggler_ratio,
                report.median_seconds,
            )
