"""What stops a run, and how all ranks stop together.

A signal reaches one process; a run can only stop as a whole, between two steps. Every rank therefore raises its flag
where the signal finds it and all ranks exchange flags at each step boundary.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient is no longer a number; nothing was updated."""


class StopSignal:
    """Turns SIGTERM and SIGINT, on any one rank, into a clean stop of all ranks at the same step.

    Use as a context manager: the previous handlers come back at the end. A second SIGINT interrupts at once.
    """

    def __init__(self, control_group: dist.ProcessGroup) -> None:
        self._control_group = control_group
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> str | None:
        """Name of the signal that some rank received, or None; a collective of one integer over all ranks."""
        flag = torch.tensor(self._received)
        # all-reduce MAX over all ranks, on the host
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control_group)
        return signal.Signals(int(flag)).name if int(flag) else None
