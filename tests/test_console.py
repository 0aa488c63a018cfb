"""What libraries below may say: nothing that a user can do nothing about."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import logging
from megadiff.console import setup_logging
setup_logging()
import torch  # sets levels of its own
logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME='/usr'")
logging.getLogger("torch._dynamo").warning("recompiled too often")
"""


def test_torch_does_not_note_that_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert "CUDA_HOME" not in done.stderr and "recompiled too often" in done.stderr
