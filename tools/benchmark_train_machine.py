"""What the figures of `benchmark_train.py` are measured on: device, software, kernels, and clocks meanwhile.

Without these a figure cannot be compared with another one. What nvidia-smi would say is left empty where it is missing.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from benchmark_ops import hardware

from megadiff import accelerations
from megadiff.integrity import sources_digest
from megadiff.machine.versions import versions
from megadiff.ops import _library

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

CLOCKS = {"clocks.sm": "sm_clock_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c"}
"""What nvidia-smi is asked while steps are measured, and our names of it."""
LIMITS = {"driver_version": "driver", "clocks.max.sm": "max_sm_clock_mhz", "power.limit": "power_limit_w"}
"""What it is asked once."""


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Device, software and date."""
    on_gpu = torch.cuda.is_available()
    installed = versions()
    limits = dict.fromkeys(LIMITS.values(), "")
    if on_gpu and (lines := _nvidia_smi(list(LIMITS))):
        limits = dict(zip(LIMITS.values(), lines[0], strict=True))
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device_type()),
        "cores": len(os.sched_getaffinity(0)),
        **limits,
        "torch": installed["torch"],
        "cuda": torch.version.cuda if on_gpu else "",
        "cudnn": torch.backends.cudnn.version() if on_gpu else "",
        **{name: installed.get(name, "") for name in ("transformer_engine", "apex")},
        "megatron_core": installed["megatron-core"],
        "sources": sources_digest(),
    }


def implementations(config: TrainConfig) -> dict[str, Any]:
    """Whose kernels compute what in a run on this machine, as the run resolves it."""
    layers = config.resolved_transformer_impl()
    return {
        "layers": layers,
        "fp8_recipe": config.fp8.recipe if config.used_fp8 else "",
        "attention": config.resolved_attention(),
        "optimizer": config.optimizer.description,
        "gradient_accumulation": accelerations.used(layers)["gradient_accumulation"],
        "kernels": _library.state(device_type()),
    }


def why_no_figures() -> str:
    """Why figures of this GPU would say nothing about megadiff; empty where they would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say is returned
        state = _library.state("cuda")
    return "" if state == "native" else state


def _nvidia_smi(fields: list[str]) -> list[list[str]]:
    """A line of answers about this process's GPU; none where nvidia-smi is missing."""
    try:
        done = subprocess.run(_query(fields), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _values(done.stdout, len(fields))


def _query(fields: list[str]) -> list[str]:
    """Ask for the GPU by its identity: numbers of visible devices are not those of nvidia-smi."""
    identity = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    return ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _values(text: str, width: int) -> list[list[str]]:
    """The whole lines of an answer."""
    lines = [[value.strip() for value in line.split(",")] for line in text.splitlines()]
    return [line for line in lines if len(line) == width]


class Clocks:
    """Medians of clock, power and temperature while something runs, read every second; empty without a GPU."""

    def __init__(self) -> None:
        self.medians: dict[str, str] = dict.fromkeys(CLOCKS.values(), "")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        if torch.cuda.is_available():
            command = [*_query(list(CLOCKS)), "--loop=1"]
            with suppress(OSError):  # not installed in this container
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        lines = _values(self._process.communicate()[0], len(CLOCKS))
        for name, column in zip(CLOCKS.values(), zip(*lines, strict=True), strict=False):
            numbers = [float(value) for value in column if value.replace(".", "", 1).isdigit()]
            self.medians[name] = f"{statistics.median(numbers):g}" if numbers else ""
