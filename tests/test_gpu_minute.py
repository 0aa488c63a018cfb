"""What one GPU is asked for nine minutes, without one: a dry run of all parts, time limits, stops, and the page."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed import run_ranks

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "gpu_minute.sh"
PARTS = {
    **dict.fromkeys(("build", "doctor"), "a"),
    **dict.fromkeys(("kernels", "attention", "golden-fp32", "golden-bf16", "resume"), "b"),
    **dict.fromkeys(("rows", "compiled", "head", "rows-fp32"), "c"),
    **dict.fromkeys(("steps-3b", "steps-7b", "profile"), "d"),
    "sampling": "e",
    **dict.fromkeys(("engine", "fp8"), "f"),
}


def run(*arguments: str, python: str = sys.executable, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def contents(out: Path) -> dict[str, str]:
    """Texts of an archive by name; it is all that came out."""
    assert [path.name for path in out.iterdir()] == ["gpu_minute.tar.gz"]
    with tarfile.open(out / "gpu_minute.tar.gz") as archive:
        members = [member for member in archive if member.isfile()]
        return {m.name.removeprefix("results/"): archive.extractfile(m).read().decode() for m in members}  # type: ignore[union-attr]


def parts(files: dict[str, str]) -> dict[str, dict[str, str]]:
    return {line["name"]: line for line in csv.DictReader(io.StringIO(files["parts.csv"]))}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("gpu_minute_report")


@pytest.mark.slow
def test_every_part_runs_at_a_toy_size(tmp_path: Path, report: ModuleType) -> None:
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    files = contents(tmp_path)
    found = parts(files)
    assert {name: line["part"] for name, line in found.items()} == PARTS
    assert {line["exit_code"] for line in found.values()} == {"0"}
    page = report.page(report.Archive(files=files))
    assert "No figure is one of a GPU" in page
    for section in ("Training steps, bf16", "Row loss", "Output layer and loss", "Samplers", "Kernels that take"):
        assert f"## {section}" in page
    assert page.count("Not measured.") == 0


def golden_curves(scratch: Path) -> dict[str, dict[str, list[float]]]:
    sys.path.insert(0, str(ROOT / "tools"))
    golden: Any = importlib.import_module("gpu_minute_golden")
    golden.write_tokens(scratch)
    return dict(golden.curves(golden.config_of(scratch, "fp32", [])))


@pytest.mark.slow
def test_six_objectives_keep_their_losses(tmp_path: Path) -> None:
    """Those that a GPU is held to: a change of noise, order, weights, model, loss or optimizer shows here."""
    [found] = run_ranks(1, golden_curves, tmp_path / "corpus", timeout=300)
    golden = json.loads((ROOT / "tests" / "golden" / "one_process.json").read_text())
    assert found.keys() == golden.keys()
    for name, curve in golden.items():
        for measure, expected in curve.items():
            assert len(expected) == 8
            assert found[name][measure] == pytest.approx(expected, rel=1e-5), (name, measure)


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A Python that builds nothing, takes a while in the doctor, and never ends in a test."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/bash\ncase "$*" in *pytest*) sleep 600;; *doctor*) echo fine; sleep 1;; *version*) exit 1;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


def test_a_stop_in_the_middle_loses_nothing(tmp_path: Path, stand_in: str) -> None:
    out = tmp_path / "out"
    command = ["bash", str(SCRIPT), "--dry-run", "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHON": stand_in}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("a  doctor"):
        pass
    time.sleep(0.5)  # within the next part
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    files = contents(out)
    assert files["doctor.log"].splitlines()[-1] == "fine"
    assert parts(files)["build"]["exit_code"] == "0"


def test_time_runs_out_in_order_of_value(tmp_path: Path, stand_in: str) -> None:
    """Six seconds: the kernel tests, which never end here, take them, and nothing after them begins."""
    out = tmp_path / "out"
    done = run("--dry-run", "--minutes", "0.1", "--only", "b,e", "--out", str(out), python=stand_in, timeout=60)
    assert done.returncode == 1
    found = parts(contents(out))
    assert list(found) == ["kernels", "golden-fp32", "attention", "golden-bf16", "sampling", "resume"]
    assert {line["exit_code"] for line in found.values()} == {"124"}
    assert int(found["kernels"]["seconds"]) >= 5 and found["sampling"]["seconds"] == "0"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--only", "a,g"], "--only is a,g, but must be letters from a to f, joined by commas"),
        (["--minutes", "soon"], "--minutes is soon, but must be a number of minutes"),
        (["--out"], "--out has no value: give one as --out VALUE"),
        (["--fast"], "unknown argument --fast: --help lists them"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {sentence}\n")


# ---------------------------------------------------------------------------------------------------------- the page


def lines(*records: dict[str, str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def test_figures_stand_beside_their_goals(report: ModuleType) -> None:
    large = {"vocab_size": "131072", "rows": "8192", "dtype": "bfloat16", "noise": "hybrid", "peak_extra_mib": ""}
    step = {"contender": "hybrid, fused head", "tokens_per_s": "60000", "peak_gib": "38.0", "plan_gib": "37.5"}
    step |= {"mfu": "0.500", "ratio": "1.020"}
    files = {
        "parts.csv": lines({"part": "a", "name": "build", "limit_s": "90", "seconds": "55", "exit_code": "0"}),
        "kernels.log": "tests/gpu/test_x.py::test_y[1] PASSED [ 50%]\ntests/gpu/test_x.py::test_y[2] FAILED [ 99%]\n"
        "===== 1 failed, 1 passed in 61.20s =====\n",
        "attention.log": "tests/gpu/test_z.py::test_z[a b] PASSED [  3%]\ntests/gpu/test_z.py::test_z[c]",
        "golden-fp32.jsonl": "".join(
            json.dumps({"loss_deviation": deviation, "passed": deviation < 1e-5}) + "\n" for deviation in (2e-6, 3e-5)
        ),
        "rows/2026-11-30-ops.csv": lines(
            {**large, "implementation": "megadiff in place", "time_ms": "1.0", "copy_share": "0.800"},
            {**large, "implementation": "megadiff", "time_ms": "1.1", "copy_share": "0.727"},
        ),
        "compiled/2026-11-30-ops.csv": lines(
            {**large, "implementation": "megadiff", "time_ms": "1.2", "copy_share": "0.7"},
            {**large, "implementation": "cross-entropy compiled", "time_ms": "2.4", "copy_share": "0.3"},
        ),
        "steps-7b/2026-11-30-train-step.csv": lines(step),
    }
    archive = report.Archive(files=files)
    figures = {goal.what: report.figure_of(goal, archive) for goal in report.GOALS}
    assert figures["kernels against definitions"] == "2 passed, 1 failed; 1 of 2 parts not ended"
    assert figures["six objectives, fp32, from the CPU's losses"] == "3.0e-05; 1 of 2 within"
    assert figures["row loss, hybrid, over its byte floor"] == "1.25"
    assert figures["row loss, hybrid, to compiled cross-entropy"] == "0.50"
    assert figures["7B-shaped layers, MFU in bf16"] == "0.500"
    assert figures["7B-shaped layers, memory to the plan"] == "38.0 of 37.5 GiB, +1.3 %"
    # 36 layers have 3.6 times the operations: embedding and head are counted once.
    whole = int(figures["7B, 36 layers, tokens per second, at the MFU of 8 layers, without communication"])
    assert 60000 * 8 / 36 < whole < 60000 / 3
    assert figures["3B-shaped layers, MFU in bf16"] == figures["killed and resumed, fp32"] == "not measured"
    page = report.page(archive)
    assert page.startswith("# 2026-11-30, what one GPU could tell") and "test_y[2] FAILED" in page
    assert "## Samplers\n\nNot measured.\n" in page


def test_only_archives_of_the_script_are_read(tmp_path: Path, report: ModuleType) -> None:
    text, other = tmp_path / "text.tar.gz", tmp_path / "other.tar.gz"
    text.write_text("nothing")
    with tarfile.open(other, "w:gz") as archive:
        archive.add(text, "text")
    for path, sentence in ((text, "is not an archive of tools/gpu_minute.sh"), (other, "has no parts.csv")):
        with pytest.raises(ValueError, match=sentence):
            report.Archive.read(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tools_import_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    assert importlib.import_module("gpu_minute_sampling").DEVICE == "cpu"
