"""Heartbeats reach the launcher of nvidia-resiliency-ext where it started the process, and nobody elsewhere."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest

from megadiff.training.rank_monitor import rank_monitor


class Client:
    calls: list[str]

    def init_workload_monitoring(self) -> None:
        self.calls.append("init")

    def send_heartbeat(self) -> None:
        self.calls.append("heartbeat")

    def shutdown_workload_monitoring(self) -> None:
        self.calls.append("shutdown")


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("launched", [False, True])
def test_heartbeats_need_package_and_launcher(installed: bool, launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Client.calls = []
    package = types.ModuleType("nvidia_resiliency_ext")
    package.__spec__ = importlib.machinery.ModuleSpec("nvidia_resiliency_ext", None)
    inner = types.ModuleType("nvidia_resiliency_ext.fault_tolerance")
    inner.RankMonitorClient = Client  # type: ignore[attr-defined]
    for module in (package, inner):
        if installed:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        else:
            monkeypatch.delitem(sys.modules, module.__name__, raising=False)
    if launched:
        monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    else:
        monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    with rank_monitor() as send_heartbeat:
        send_heartbeat()
        send_heartbeat()
    expected = ["init", "heartbeat", "heartbeat", "shutdown"] if installed and launched else []
    assert Client.calls == expected
