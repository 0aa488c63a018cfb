"""Heartbeats for the launcher of nvidia-resiliency-ext, where it started this process.

`ft_launcher` starts a monitor beside each rank and restarts the job when one falls silent. A process that it did not
start, or that lacks the package, sends nothing: our own watchdog needs neither.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SOCKET_VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"


@contextmanager
def rank_monitor() -> Iterator[Callable[[], None]]:
    """Connect to this rank's monitor, if there is one; yields what sends a heartbeat to it."""
    if _SOCKET_VARIABLE not in os.environ or importlib.util.find_spec("nvidia_resiliency_ext") is None:
        yield lambda: None
        return
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    yield client.send_heartbeat
    client.shutdown_workload_monitoring()
