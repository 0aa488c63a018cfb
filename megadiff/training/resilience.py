"""What stops a run, and how all ranks stop together.

A signal reaches one process and a clock is read by one; a run can only stop as a whole, between two steps. So every
rank raises its flags where it is, and at each step boundary all exchange them, once: what one of them asks for, all do
after the same step. Whoever asks to stop is asking for a checkpoint soon, so the parts of a run are timed, and
`RunClock` knows whether one more step and a checkpoint still fit into the time that is granted.
"""

from __future__ import annotations

import logging
import os
import signal
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megadiff.integrity import replace_text
from megadiff.training.config import TrainingConfig
from megadiff.training.metrics import format_duration

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

PID_FILE = "MEGADIFF_PID_FILE"
"""Names a file in which the first rank of a node says that it listens to signals: for launchers that cannot know it."""
JOB_START = "MEGADIFF_JOB_START"
"""When the scheduler began to count, in seconds since 1970, where a launcher knows it."""


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient is no longer a number; nothing was updated."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What all ranks do at this step boundary."""

    stop: str | None
    """Why the run ends here: the name of a signal, or that of the setting whose time is up."""
    save: bool
    """A checkpoint is due by the clock."""
    is_writing: bool
    """Some rank is still writing its part of a checkpoint."""
    seconds_since_signal: float
    """Since the first signal on any rank; 0 without one."""


class StepBoundary:
    """Turns signals and clocks of any rank into decisions of all ranks at the same step.

    Use as a context manager: the previous signal handlers come back at the end. A second SIGINT interrupts at once.
    """

    def __init__(self, control_group: dist.ProcessGroup) -> None:
        self._control_group = control_group
        self._received = 0
        self._received_at = 0.0
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._pid_file = Path(os.environ[PID_FILE]) if is_first and os.environ.get(PID_FILE) else None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StepBoundary:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        if self._pid_file is not None:
            try:
                replace_text(self._pid_file, str(os.getpid()))
            except OSError as error:
                logger.warning(
                    "%s cannot be written (%s): the launcher cannot pass signals on to this node's ranks",
                    self._pid_file,
                    error,
                )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received, self._received_at = number, time.monotonic()

    def agree(self, *, time_is_up: bool = False, save_is_due: bool = False, is_writing: bool = False) -> Decisions:
        """Exchange flags: what is so on one rank, all know; a collective of five integers over all ranks.

        Args:
            time_is_up: by this rank's clock, the run has to end here.
            save_is_due: by this rank's clock, a checkpoint has to be written.
            is_writing: this rank is still writing its part of a checkpoint.
        """
        waited_ms = round(1000 * (time.monotonic() - self._received_at)) if self._received else 0
        flags = torch.tensor([self._received, waited_ms, time_is_up, save_is_due, is_writing], dtype=torch.int64)
        # all-reduce MAX over all ranks, on the host
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control_group)
        received, waited_ms, is_up, is_due, is_writing = flags.tolist()
        stop = signal.Signals(received).name if received else "training.exit_after" if is_up else None
        return Decisions(
            stop=stop, save=bool(is_due), is_writing=bool(is_writing), seconds_since_signal=waited_ms / 1000
        )


class RunClock:
    """How long the parts of a run take, and whether what remains of the granted time is enough for them."""

    def __init__(self, config: TrainingConfig) -> None:
        """Start with the age of this process, or of the job where a launcher tells it: what a scheduler counts."""
        self._config = config
        started = float(os.environ.get(JOB_START) or psutil.Process().create_time())
        self._started = time.monotonic() - (time.time() - started)
        self._measured: dict[str, deque[float]] = {}
        self._has_warned = False

    def record(self, part: str, seconds: float) -> None:
        """Note how long a part has taken."""
        self._measured.setdefault(part, deque(maxlen=5)).append(seconds)

    def last(self, part: str) -> float:
        """Seconds that a part took when it was measured last."""
        return self._measured[part][-1]

    def is_up(self, *upcoming: str) -> bool:
        """Whether training.exit_after would pass before the parts that are to come are over.

        Each is expected to take as long as the longest of its last five times, and training.stop_grace where it was
        never measured.
        """
        if self._config.exit_after is None:
            return False
        expected = sum(max(self._measured.get(part, [self._config.stop_grace])) for part in upcoming)
        return time.monotonic() - self._started + expected >= self._config.exit_after

    def warn_if_grace_is_short(self) -> None:
        """Say once that step in progress and checkpoint take longer than a launcher waits after a signal."""
        if self._has_warned or "save" not in self._measured:
            return
        step, save = (statistics.median(self._measured[part]) for part in ("step", "save"))
        if step + save > self._config.stop_grace:
            self._has_warned = True
            logger.warning(
                "a step takes %s and a checkpoint %s, more than training.stop_grace %s: a launcher that kills so soon "
                "after its signal takes the last checkpoint's work; let it wait longer (torchrun, "
                "from torch 2.12 on: TORCH_ELASTIC_SHUTDOWN_TIMEOUT) and say so in training.stop_grace",
                format_duration(step),
                format_duration(save),
                format_duration(self._config.stop_grace),
            )
