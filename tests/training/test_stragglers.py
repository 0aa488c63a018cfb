"""The rank that works longest is named, and waiting for it is nobody else's work."""

from __future__ import annotations

import logging
import time

from distributed import run_ranks


def burn_on_rank_one() -> tuple[list[tuple[int, float]], list[str]]:
    """Reports of six times two steps in which rank 1 computes and rank 0 waits for it, and the warnings."""
    import torch.distributed as dist

    from megadiff.parallel import groups as parallel_groups
    from megadiff.training import stragglers as module

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    stragglers = module.Stragglers(groups, threshold=2.0)
    reports = []
    for report in range(6):
        slow = 1 if report else 0  # the first report has another slowest rank
        for _ in range(2):
            stragglers.begin()
            deadline = time.process_time() + (0.15 if groups.rank == slow else 0.0)
            while time.process_time() < deadline:
                pass
            dist.barrier(group=groups.control)
            stragglers.end()
        found = stragglers.report(step=10 * report)
        reports.append((found.slowest_rank, found.straggler_ratio))
    return reports, warnings


def test_the_rank_that_works_is_slow_and_the_one_that_waits_is_not() -> None:
    (reports, warnings), (same_reports, no_warnings) = run_ranks(2, burn_on_rank_one)
    assert [rank for rank, _ in reports] == [0, 1, 1, 1, 1, 1]
    assert all(ratio > 4 for _, ratio in reports), reports
    assert same_reports == reports and no_warnings == []
    (warning,) = warnings
    assert warning.startswith("straggler at step 30: rank 1 (host ")
