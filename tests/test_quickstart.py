"""The quickstart as a newcomer runs it; slow, because it is the real thing.

It works in the checkout's ignored folders data/ and runs/, in runs named by their settings.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ("--training.train-steps", "5", "--validation.num-sequences", "16")
pytestmark = pytest.mark.slow


def started(*settings: str, script: Path = ROOT / "examples" / "quickstart.sh") -> subprocess.Popen[str]:
    """The script in a process group of its own, with the number of threads left to it."""
    return subprocess.Popen(
        ["bash", str(script), *settings],
        cwd=script.parent,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def quickstart(*settings: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    process = started(*settings)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def kill(process: subprocess.Popen[str]) -> None:
    """End the whole group if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fresh_run(*settings: str) -> Path:
    run_dir = ROOT / "runs" / "-".join(["quickstart", *(setting.removeprefix("--") for setting in settings)])
    shutil.rmtree(run_dir, ignore_errors=True)
    return run_dir


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_ends_below_the_unigram_entropy_and_is_reused() -> None:
    settings = ("--training.seed", "20", "--training.train-steps", "350")  # users wait for 500
    run_dir = fresh_run(*settings)
    first = quickstart(*settings)
    assert first.returncode == 0, first.stdout

    last = [line for line in lines_of(run_dir) if line.get("split") == "validation"][-1]
    assert last["num_sequences"] >= 512
    assert last["nelbo"] + 5 * last["nelbo_stderr"] < last["unigram_entropy"]
    assert "tensor 2 x context 1 x pipeline 1 x data 1" in first.stdout
    assert "\ndef " in first.stdout.partition("a sample")[2]
    assert (run_dir / "hf" / "model.safetensors").is_file()
    assert f"The run is in {run_dir.relative_to(ROOT)}" in first.stdout

    beginning = time.monotonic()
    second = quickstart(*settings)
    assert second.returncode == 0, second.stdout
    assert "already completed" in second.stdout
    assert time.monotonic() - beginning < 120


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        (("--parallel.pipeline-model-parallel-size", "2"), "tensor 1 x context 1 x pipeline 2 x data 1"),
        (("--parallel.tensor-model-parallel-size", "1"), "tensor 1 x context 1 x pipeline 1 x data 2"),
    ],
)
def test_other_layouts_by_an_option(settings: tuple[str, str], layout: str) -> None:
    settings = (*settings, *SHORT)
    run_dir = fresh_run(*settings)
    finished = quickstart(*settings)
    assert finished.returncode == 0, finished.stdout
    assert layout in finished.stdout
    assert (run_dir / "hf" / "config.json").is_file()
    # One thread per process is the script's doing: torchrun would announce its own.
    assert "2 process(es) of 1 thread(s)" in finished.stdout
    assert "Setting OMP_NUM_THREADS" not in finished.stdout


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on() -> None:
    settings = ("--training.train-steps", "499")
    run_dir = fresh_run(*settings)
    process = started(*settings)
    try:
        assert process.stdout is not None
        while "1/499 | loss" not in (line := process.stdout.readline()):
            assert line, "ended before the first step"
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "==> stopped; start again to go on"
    assert "Traceback" not in output and "a sample" not in output
    assert list((run_dir / "checkpoints").glob("step_*"))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A checkout in a folder with a space, with stand-ins for megadiff, which trains to step 9, and for the setup."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "examples", checkout / "examples")
    (checkout / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "run_state.sh", checkout / "tools")
    functions = (ROOT / "tools" / "setup_env.sh").read_text()
    (checkout / "tools" / "setup_env.sh").write_text(functions + "\nsetup_env() { :; }\n")
    (checkout / "megadiff").mkdir()
    (checkout / "megadiff" / "__main__.py").write_text(
        """
import json, os, pathlib, sys

if os.environ.get("RANK", "0") == "0":
    with open("calls", "a") as file:
        print(json.dumps(sys.argv[1:]), file=file)
    if "--run-dir" in sys.argv:
        run_dir = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
        (run_dir / "checkpoints" / "step_00000009").mkdir(parents=True)
        (run_dir / "config.yaml").write_text(f"training:\\n  train_steps: {os.environ['TRAIN_STEPS']}\\n")
sys.exit("--fail" in sys.argv and "RANK" in os.environ and 3)
"""
    )
    return checkout / "examples" / "quickstart.sh"


def test_a_run_stopped_from_within_is_not_taken_for_complete(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_STEPS", "10")
    process = started(script=script)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "==> stopped; start again to go on"


def test_a_failing_rank_gives_the_exit_code(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_STEPS", "9")
    process = started("--fail", script=script)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "Traceback" not in output and "a sample" not in output


def test_paths_with_spaces_and_text_of_ones_own(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_STEPS", "9")
    text = tmp_path / "my text.txt"
    text.write_text("text")

    process = started(
        "--input=../../my text.txt", "--input", str(tmp_path), "--vocab-size", "300", "--validation-fraction=0.3",
        "--parallel.tensor-model-parallel-size=1", "--training.seed", "7",
        script=script,
    )  # fmt: skip
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    calls = (script.parents[1] / "calls").read_text()
    check, prepare, train, generate, convert = map(json.loads, calls.splitlines())
    settings = ["--parallel.tensor-model-parallel-size=1", "--training.seed", "7"]
    assert check == ["train", "examples/recipes/quickstart.py", "--help-config", *settings]
    assert prepare[-3:] == ["--input", str(text), str(tmp_path)]
    assert prepare[-7:-3] == ["--vocab-size", "300", "--validation-fraction", "0.3"]
    assert train[-3:] == settings
    corpus, run_dir = train[train.index("--data.path") + 1], train[train.index("--run-dir") + 1]
    assert prepare[2] == corpus and corpus.startswith("data/quickstart-vocab-size-300-validation-fraction-0.3-")
    assert run_dir == corpus.replace("data", "runs") + "-parallel.tensor-model-parallel-size=1-training.seed-7"
    assert (generate[1], convert[1]) == (run_dir, run_dir)
    assert f"megadiff preview examples/recipes/quickstart.py --data.path {corpus}\n" in output
    assert f"cd {tmp_path}/a\\ checkout" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.train-step", "5"], "unknown option --training.train-step: did you mean --training.train-steps?"),
        (["--run-dir", "runs/mine"], "--run-dir is chosen by this script"),
        (["--data.path=data/mine"], "--data.path is chosen by this script"),
        (["--help-config"], "list the settings by: python -m megadiff train"),
        (["--input", "/no/such file"], "--input '/no/such file' does not exist"),
        (["--vocab-size"], "--vocab-size has no value"),
    ],
)
def test_wrong_option_is_one_sentence_before_any_work(options: list[str], message: str) -> None:
    refused = quickstart(*options)
    assert refused.returncode == 2
    assert refused.stdout.splitlines()[-1].startswith(f"error: {message}")
    assert "1/5" not in refused.stdout
