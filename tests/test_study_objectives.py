"""The study reads what runs have measured, and ranks it; its settings are settings of the recipe."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megadiff.config import load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    return importlib.import_module("study_objectives")


def test_contenders_are_settings_of_the_recipe_and_differ(study: Any) -> None:
    recipe = load_recipe(ROOT / study.RECIPE)
    configs = []
    for name in study.CONTENDERS:
        words = study.command(name, Path("run"), 10, [])
        config = recipe.overridden(words[words.index("--run-dir") + 2 :])
        config.check(1)
        configs.append((config.objective, config.model))
    assert len(configs) == len({str(config) for config in configs})


def test_results_are_ranked_with_their_errors(study: Any, tmp_path: Path) -> None:
    for name, nelbo in (("mdlm", 5.25), ("autoregressive", 3.5)):
        lines: list[dict[str, Any]] = [
            {"step": step, "loss": 1.0, "consumed_tokens": 4096 * step} for step in (1, 2, 3)
        ]
        shared = {"split": "validation", "nelbo_stderr": 0.05, "bits_per_byte": 2.0, "unigram_entropy": 6.0}
        lines[2:2] = [{"step": 2, "nelbo": 9.0, **shared}]
        lines.append({"step": 3, "nelbo": nelbo, **shared})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = [study.read_validations(name, tmp_path) for name in ("mdlm", "autoregressive")]
    assert study.read_validations("duo", tmp_path) == []
    study.write(curves, tmp_path / "out", with_plot=False)
    [page] = (tmp_path / "out").glob("*.md")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ") and "settings" not in line]
    assert rows[0] == "| autoregressive | `objective=autoregressive` | 3.500 ± 0.050 | 2.000 |"
    assert rows[1].startswith("| mdlm |") and "12,288 training tokens" in page.read_text()
    [table] = (tmp_path / "out").glob("*.csv")
    with table.open() as file:
        found = [(row["name"], row["consumed_tokens"], row["nelbo"]) for row in csv.DictReader(file)]
    assert found[:2] == [("mdlm", "8192", "9.0"), ("mdlm", "12288", "5.25")] and len(found) == 4
