"""A Transformer Engine that cannot be imported: Megatron-Core does without it, and the reason is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from unittest.mock import patch

from megadiff.cli import main

assert main(["train", "no_such_recipe.py", "--run-dir", "nowhere"]) == 2
assert "megatron.core" not in sys.modules or sys.modules["transformer_engine"] is None
import megadiff.training.loop
from megadiff import accelerations

with patch("torch.cuda.is_available", lambda: True):
    print(accelerations.transformer_engine_concern())
    print(accelerations._imported(accelerations.FUSED_ADAMS["transformer_engine"])[1])
"""


@pytest.mark.parametrize("error", ["ImportError('undefined symbol: _ZN3c10')", "OSError('undefined symbol: _ZN3c10')"])
def test_megatron_does_without_a_package_that_fails_to_import(tmp_path: Path, error: str) -> None:
    """As one does whose libraries were made for another torch: its outermost module is there."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("__version__ = '2.20.2'\n")
    (package / "__init__.py").write_text(f"raise {error}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    told = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    reason = "transformer_engine.pytorch fails to import: undefined symbol: _ZN3c10"
    assert f"cannot be used on this GPU ({reason})" in told.stdout, told.stderr[-2000:]
    assert told.stdout.splitlines()[-1] == reason
