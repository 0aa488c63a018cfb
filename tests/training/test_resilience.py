"""The decisions of a step boundary and the clock of a run; that both stop a whole job is tested in test_faults.py."""

from __future__ import annotations

import logging
import os
import signal
import time

import psutil
import pytest
from distributed import run_ranks

from megadiff.training.config import TrainingConfig
from megadiff.training.resilience import RunClock


def stop_and_interrupt() -> list[str | None]:
    """What the ranks agree on before and after a signal, what SIGINT after it does, and what is left afterwards."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.resilience import STOP_SIGNALS, StepBoundary

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    found: list[str | None] = []
    for number in STOP_SIGNALS:
        with StepBoundary(groups.control) as boundary:
            found.append(boundary.agree().stop)
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            found.append(boundary.agree(time_is_up=True).stop)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                found.append("interrupted")
    found.append("restored" if [signal.getsignal(number) for number in STOP_SIGNALS] == before else "lost")
    return found


def test_first_signal_stops_and_sigint_after_it_interrupts() -> None:
    signals = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
    expected = [entry for name in signals for entry in (None, name, "interrupted")]
    assert run_ranks(1, stop_and_interrupt)[0] == [*expected, "restored"]


def flags_of_one_rank() -> list[tuple[str | None, bool, bool, bool]]:
    """What both ranks decide when only rank 1 has a signal, a clock that is up or a checkpoint that is due."""
    import torch.distributed as dist

    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.resilience import StepBoundary

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig(use_distributed_optimizer=True))
    is_one = dist.get_rank() == 1
    with StepBoundary(groups.control) as boundary:
        decisions = [
            boundary.agree(),
            boundary.agree(save_is_due=is_one, is_writing=is_one),
            boundary.agree(time_is_up=is_one),
        ]
        if is_one:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
        decisions.append(boundary.agree(time_is_up=is_one))
    return [(d.stop, d.save, d.is_writing, d.seconds_since_signal >= 0.05) for d in decisions]


def test_what_one_rank_asks_for_all_ranks_do() -> None:
    expected = [
        (None, False, False, False),
        (None, True, True, False),
        ("training.exit_after", False, False, False),
        ("SIGUSR1", False, False, True),
    ]
    assert run_ranks(2, flags_of_one_rank) == [expected, expected]


def test_clock_leaves_time_for_what_is_to_come() -> None:
    """Parts are expected to take the longest of their last five times, or the grace where nothing was measured."""
    clock = RunClock(TrainingConfig())
    assert not clock.is_up("step", "save"), "without exit_after it never is"

    age = time.monotonic() - clock._started
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=60), "of this process"
    clock = RunClock(TrainingConfig(exit_after=age + 100.0, stop_grace=60.0))
    assert not clock.is_up("save") and clock.is_up("save", "step")
    clock.record("save", 0.05)
    assert clock.last("save") == 0.05
    assert not clock.is_up("save", "step") and clock.is_up("validation", "step")
    for seconds in (99.0, 1.0, 1.0, 1.0):
        clock.record("step", seconds)
    assert not clock.is_up("step") and clock.is_up("step", "step")
    for _ in range(2):
        clock.record("step", 1.0)
    assert not clock.is_up("step", "step"), "the slow one, as the first often is, is forgotten"


def test_clock_of_a_job_is_older_than_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGADIFF_JOB_START", str(time.time() - 5000))
    clock = RunClock(TrainingConfig(exit_after=5100.0, stop_grace=60.0))
    assert not clock.is_up("save") and clock.is_up("save", "step")


def test_short_grace_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = RunClock(TrainingConfig(stop_grace=0.04))
    clock.record("step", 0.03)
    clock.warn_if_grace_is_short()
    assert caplog.text == "", "nothing is known before a save"
    clock.record("save", 0.03)
    with caplog.at_level(logging.WARNING):
        clock.warn_if_grace_is_short()
        clock.warn_if_grace_is_short()
    (record,) = caplog.records
    assert "more than training.stop_grace 0s" in record.message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exit_after", 0.0, "be positive"),
        ("stop_grace", 0.0, "be positive"),
        ("hang_timeout", -1.0, "be at least 0"),
        ("straggler_ratio", 1.0, "be more than 1"),
        ("spike_factor", 0.5, "be more than 1"),
    ],
)
def test_settings_are_refused(name: str, value: float, expected: str) -> None:
    with pytest.raises(ValueError, match=f"training.{name} is {value}, but must {expected}"):
        TrainingConfig(**{name: value})
