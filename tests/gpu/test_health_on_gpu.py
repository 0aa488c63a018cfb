"""The container's health check beside a training job: it opens no context on the GPU, as its driver tells."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SCRIPT = """
import ctypes
import sys

from megadiff.cli import main

code = main(["doctor", *sys.argv[1:]])
driver, flags, is_active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
failures = driver.cuInit(0) or driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(is_active))
print(code, failures, is_active.value)
"""


@pytest.mark.parametrize("option, is_active", [("--health", 0), ("--require", 1)])
def test_health_is_told_without_a_context(option: str, is_active: int) -> None:
    command = [sys.executable, "-c", SCRIPT, option, "cuda"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines()[-1:] == [f"0 0 {is_active}"], told.stderr
