"""The stop signal within one process; that it reaches other ranks is tested in test_resume.py."""

from __future__ import annotations

import os
import signal

from distributed import run_ranks


def stop_and_interrupt() -> list[str | None]:
    """What the ranks agree on before and after SIGINT, what a second SIGINT does, and what is left afterwards."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.resilience import StopSignal

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    before = signal.getsignal(signal.SIGINT)
    found: list[str | None] = []
    with StopSignal(groups.control) as stop:
        found.append(stop.agreed())
        os.kill(os.getpid(), signal.SIGINT)
        found.append(stop.agreed())
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            found.append("interrupted")
    found.append("restored" if signal.getsignal(signal.SIGINT) is before else "lost")
    return found


def test_first_signal_stops_second_interrupts() -> None:
    assert run_ranks(1, stop_and_interrupt)[0] == [None, "SIGINT", "interrupted", "restored"]
