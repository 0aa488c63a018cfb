"""Metrics files that crashes cut, durations for people, and the comparison of two runs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadiff.cli import main
from megadiff.training.compare import compare_runs
from megadiff.training.config import TrainingConfig
from megadiff.training.metrics import MetricsWriter, format_duration, read_metrics
from megadiff.training.observed import NUM_SUMS, Observed


def line(step: int, **changes: Any) -> dict[str, Any]:
    fixed = {"ordinals": [8 * step - 8, 8 * step], "loss": 1.0 / step, "nelbo": 5.0, "grad_norm": 0.5}
    return {"step": step, **fixed, "learning_rate": 1e-3, "tokens_per_second": 9.0, "step_time": 0.1, **changes}


OBSERVED = Observed.of([8.0] * NUM_SUMS)


def open_writer(run: Path, *sinks: Any, resumed_step: int = 0, log_interval: int = 1) -> MetricsWriter:
    return MetricsWriter(
        run,
        sinks,
        TrainingConfig(train_steps=5, log_interval=log_interval),
        resumed_step=resumed_step,
        flops_per_sample=50,
        peak_flops=10_000.0,
        device=torch.device("cpu"),
    )


def write_run(directory: Path, lines: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return directory


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [line(1), line(2), {"step": 2, "split": "validation", "nelbo": 4.0}, line(3)])
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed while writing
    assert len(read_metrics(run)) == 4
    with open_writer(run, resumed_step=2) as writer:
        writer.training(line(3, loss=7.0), OBSERVED, {})
        writer.validation({"step": 3, "split": "validation", "nelbo": 4.0, "nelbo_stderr": 0.1, "bits_per_byte": 2.0})
    assert [(entry["step"], entry.get("loss")) for entry in read_metrics(run)] == [
        (1, 1.0),
        (2, 0.5),
        (2, None),
        (3, 7.0),
        (3, None),
    ]


def test_a_full_disk_costs_numbers_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        suppress(OSError),  # of what is left unwritten in the end
        Path("/dev/full").open("a", buffering=1) as full,
        open_writer(tmp_path, log_interval=9) as writer,
    ):
        writer.training(line(1), OBSERVED, {})
        there_is_room, writer._lines = writer._lines, full
        writer.training(line(2), OBSERVED, {})
        writer.training(line(3), OBSERVED, {})
        writer._lines = there_is_room
        writer.training(line(4), OBSERVED, {})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 4]
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "metrics are lost until there is room again" in warning and "No space left" in warning


def test_utilisation_counts_all_positions_and_speed_what_counts(tmp_path: Path) -> None:
    """Samples of 50 operations, by devices with 10 000 per second, whatever share of their tokens counted."""
    shown: dict[str, float] = {}
    sink: Any = SimpleNamespace(numbers=lambda step, numbers: shown.update(numbers), close=lambda: None)
    with open_writer(tmp_path, sink, log_interval=2) as writer:
        writer.training(line(2, ordinals=[8, 16]), OBSERVED, {})
        assert shown["device/mfu"] == pytest.approx(8 * 50 / 0.1 / 10_000)
        writer.training(line(3, ordinals=[16, 24], step_time=0.3), OBSERVED, {})
        writer.training(line(4, ordinals=[24, 40]), OBSERVED, {})
    assert shown["device/mfu"] == pytest.approx(24 * 50 / 0.4 / 10_000)
    assert shown["train/tokens_per_second"] == 9.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (200, "3m20s"), (18120, "5h02m"), (370800, "4d07h")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_compare_names_the_first_difference_and_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", [line(1), line(2), line(3), line(4)])
    b = write_run(tmp_path / "b", [line(1), line(2, loss=0.5 * (1 + 1e-6)), line(3, grad_norm=0.6)])
    assert main(["compare", str(a), str(a)]) == 0
    assert "all 4 common steps agree to the last bit" in capsys.readouterr().out
    assert main(["compare", str(a), str(b)]) == 1
    shown = capsys.readouterr().out
    assert "step 2 is the first of 3 common steps that differs: loss" in shown and "relative 1.0e-06" in shown
    assert main(["compare", str(a), str(b), "--tolerance", "1e-5"]) == 1
    assert "step 3 is the first of 3 common steps that differs: grad_norm 0.5 vs 0.6" in capsys.readouterr().out
    assert main(["compare", str(a), str(b), "--tolerance", "0.5"]) == 0


def test_compare_sees_other_samples_and_nan(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [line(1), line(2)])
    b = write_run(tmp_path / "b", [line(1, ordinals=[8, 16]), line(2)])
    nan = write_run(tmp_path / "nan", [line(1, loss=float("nan")), line(2)])
    assert compare_runs(a, b, tolerance=0.5).description.endswith("ordinals [0, 8] vs [8, 16]")
    assert compare_runs(a, nan, tolerance=0.5).first_difference == 1
    assert compare_runs(nan, nan).first_difference is None


def test_compare_refuses_runs_without_a_common_step(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", [line(1)]), write_run(tmp_path / "b", [line(2)])
    with pytest.raises(ValueError, match="have no step in common"):
        compare_runs(a, b)
    with pytest.raises(ValueError, match=r"no metrics.jsonl"):
        compare_runs(a, tmp_path)
