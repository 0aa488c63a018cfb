"""The protocol that holds FP8 to bf16: windows, band and verdict, and both runs by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import run_ranks

from megadiff.cli import main
from megadiff.training.parity import compare_curves


def write_run(run_dir: Path, losses: list[float], nelbo: float | None = None, first_ordinal: int = 0) -> Path:
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "ordinals": [first_ordinal + 8 * step, first_ordinal + 8 * step + 8]}
        for step, loss in enumerate(losses, start=1)
    ]
    if nelbo is not None:
        lines.append({"step": len(losses), "split": "validation", "nelbo": nelbo, "nelbo_stderr": 0.1})
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_noise_that_averages_out_is_parity_and_a_drift_is_not(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "bf16", [4.0, 2.0] * 6, nelbo=3.0)
    noisy = write_run(tmp_path / "noisy", [4.3, 1.7] * 6, nelbo=3.01)
    parity = compare_curves(reference, noisy, band=0.01, window=4)
    assert parity.holds and [window.name for window in parity.windows] == [
        "steps 1 to 4",
        "steps 5 to 8",
        "steps 9 to 12",
        "validation, step 12",
    ]
    assert parity.windows[0].spread == pytest.approx(0.12**0.5 / 2 / 3.0)
    assert "parity: all windows are within 1.00%" in parity.table()

    drifting = write_run(tmp_path / "drifting", [4.0, 2.0] * 4 + [4.1, 2.1] * 2, nelbo=3.0)
    parity = compare_curves(reference, drifting, band=0.01, window=4)
    assert not parity.holds and [abs(w.difference) > 0.01 for w in parity.windows] == [False, False, True, False]
    assert "+3.333%" in parity.table() and parity.table().count("outside") == 1
    assert not compare_curves(reference, write_run(tmp_path / "worse", [4.0, 2.0] * 6, 3.1), band=0.01, window=4).holds
    assert not compare_curves(reference, write_run(tmp_path / "nan", [float("nan")] * 12), band=9.0, window=4).holds


def test_a_last_window_has_at_least_half_of_its_steps(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [1.0] * 10) for name in ("a", "b")]
    assert [w.name for w in compare_curves(*runs, band=0.1, window=4).windows][-1] == "steps 9 to 10"
    assert [w.name for w in compare_curves(*runs, band=0.1, window=7).windows] == ["steps 1 to 7"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write_run(tmp_path / name, [1.0] * 4) for name in ("a", "b"))
    other = write_run(tmp_path / "other", [1.0] * 4, first_ordinal=1)
    for runs, settings, message in (
        ((a, other), {"band": 0.1, "window": 2}, r"at step 1 .*saw the samples \[8, 16\], but .*\[9, 17\]"),
        ((a, b), {"band": 0.1, "window": 9}, r"have 4 steps from 1 on in common, but --window is 9"),
        ((a, b), {"band": 0.1, "window": 4, "first_step": 4}, r"have 1 steps from 4 on in common, but --window is 4"),
        ((a, b), {"band": 0.0, "window": 2}, r"--band is 0.0, but must be positive"),
        ((a, b), {"band": 0.1, "window": 0}, r"--window is 0, but must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_curves(*runs, **settings)  # type: ignore[arg-type]
    recipe = str(Path(__file__).parents[2] / "examples" / "recipes" / "quickstart.py")
    assert main(["parity", recipe, "--run-dir", str(tmp_path)]) == 2
    assert "training.precision is fp32, but parity is that of FP8 with bf16" in capsys.readouterr().err
    odd = ["--training.precision", "fp8-emulated", "--training.micro-batch-size", "1", "--control"]
    assert main(["parity", recipe, "--run-dir", str(tmp_path), *odd]) == 2
    assert "training.micro_batch_size is 1, but --control halves it: choose an even one" in capsys.readouterr().err


def test_what_comes_before_the_first_step_is_left_out(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "bf16", [4.0] * 4 + [2.0] * 4, nelbo=2.0)
    sooner = write_run(tmp_path / "sooner", [4.0] * 2 + [2.0] * 6, nelbo=2.0)
    assert not compare_curves(reference, sooner, band=0.01, window=4).holds
    parity = compare_curves(reference, sooner, band=0.01, window=4, first_step=5)
    assert parity.holds and [window.name for window in parity.windows] == ["steps 5 to 8", "validation, step 8"]


def parity_by_command(corpus: Path, run_dir: Path, band: str) -> int:
    recipe = run_dir.parent / "recipe.py"
    recipe.write_text(f"from tiny import tiny_config\n\n\ndef config():\n    return tiny_config({str(corpus)!r})\n")
    settings = ["--training.precision", "fp8-emulated", "--training.train-steps", "6"]
    options = ["--run-dir", str(run_dir), "--band", band, "--window", "3", "--control"]
    return main(["parity", str(recipe), *options, *settings])


def test_one_command_trains_both_runs_and_goes_on_from_them(corpus_dir: Path, tmp_path: Path) -> None:
    assert run_ranks(1, parity_by_command, corpus_dir, tmp_path / "runs", "0.1") == [0]
    runs = {path.name: yaml.safe_load((path / "config.yaml").read_text()) for path in (tmp_path / "runs").iterdir()}
    assert {
        name: (run["training"]["precision"], run["training"]["micro_batch_size"]) for name, run in runs.items()
    } == {
        "bf16": ("bf16", 2),
        "bf16-control": ("bf16", 1),
        "fp8-emulated": ("fp8-emulated", 2),
    }
    assert run_ranks(1, parity_by_command, corpus_dir, tmp_path / "runs", "1e-9") == [1]
