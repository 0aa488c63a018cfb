"""The README's table of layouts is the list of layouts that are tested."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_readme_has_the_table_of_tested_layouts() -> None:
    table = runpy.run_path(str(Path(__file__).parent / "training" / "layouts.py"))["table"]
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert table() in readme, "README.md has another table: put there what `python tests/training/layouts.py` prints"
