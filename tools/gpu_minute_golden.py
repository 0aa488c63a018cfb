"""Eight steps of each objective at the quickstart's shape, against losses that a CPU computed: is training right here?

    python tools/gpu_minute_golden.py --write tests/golden/one_process.json     where it is known to be right
    python tools/gpu_minute_golden.py --precision bf16 --output FILE.jsonl      elsewhere
    python tools/gpu_minute_golden.py --resume --output FILE.jsonl              through the command line, and a kill

The same words draw data, noise and initial weights everywhere, so curves differ by rounding alone: in fp32 by at most
1e-5, as between layouts (9e-7 with eager operators and two threads). In bf16 a CPU differs by 6e-4 in losses and 4.5 %
in gradient norms at most; three times as much is allowed.

Tokens are integers made of integers, so no library's release changes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_train_steps import NUM_SPECIAL_IDS, write_corpus

from megadiff.config import TrainConfig, load_recipe
from megadiff.objectives import (
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DuoConfig,
    EsoLmConfig,
    GiddConfig,
    MdlmConfig,
    ObjectiveConfig,
)
from megadiff.parallel import groups as parallel_groups
from megadiff.philox import Purpose, multiply_high, random_words
from megadiff.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "recipes" / "quickstart.py"
GOLDEN = ROOT / "tests" / "golden" / "one_process.json"
VOCAB_SIZE, STEPS = 2048, 8
SETTINGS = (
    *("--training.train-steps=400", "--training.log-interval=1"),  # more than are taken
    # Gentle: what is compared is rounding, which steep steps would amplify.
    *("--optimizer.lr=5e-4", "--optimizer.decoupled-lr=0.01", "--optimizer.lr-warmup-steps=4"),
    *("--validation.interval=0", "--checkpoint.interval=4", "--watch.num-texts=0"),
)
TOY = (
    *("--model.num-layers=1", "--model.hidden-size=32", "--data.sequence-length=32"),
    *("--training.global-batch-size=4", "--training.micro-batch-size=2"),
)
"""Of a dry run."""
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "gidd": GiddConfig(noise="hybrid", shift=0.0),
    "mdlm": MdlmConfig(),
    "duo": DuoConfig(),
    "eso_lm": EsoLmConfig(),
    "block_diffusion": BlockDiffusionConfig(),
    "autoregressive": AutoregressiveConfig(),
}
MEASURES = ("loss", "nelbo", "grad_norm")
ALLOWED = {
    "fp32": dict.fromkeys(MEASURES, 1e-5),
    "bf16": {"loss": 2e-3, "nelbo": 2e-3, "grad_norm": 0.14},
}
"""Largest relative difference by precision and measure."""

Curve = dict[str, list[float]]
"""Loss, bound and gradient norm of every step."""
Record = dict[str, Any]


def write_tokens(directory: Path, num_tokens: int = 200_000) -> None:
    """Write a corpus in which small ids are common: each is the product of two random numbers."""
    first, second = random_words(0, torch.arange(num_tokens), 0, Purpose.SHUFFLE)[:, :2].unbind(-1)
    product = (first * (second >> 1)) >> 31  # below 2^32
    tokens = NUM_SPECIAL_IDS + multiply_high(product, VOCAB_SIZE - NUM_SPECIAL_IDS)
    write_corpus(directory, VOCAB_SIZE, tokens.numpy().astype(np.int32))


def config_of(corpus: Path, precision: str, extra: list[str]) -> TrainConfig:
    """The quickstart's run on such a corpus, of few steps."""
    settings = [*SETTINGS, f"--data.path={corpus}", f"--training.precision={precision}", *extra]
    return load_recipe(RECIPE).overridden(settings)


def curves(config: TrainConfig) -> Iterator[tuple[str, Curve]]:
    """Train every objective from the same weights, one after the other in this process."""
    with parallel_groups.joined(config.parallel) as groups:
        for name, objective in OBJECTIVES.items():
            trainer = Trainer(dataclasses.replace(config, objective=objective), Path("unused"), groups)
            batches = trainer.training_batches()
            lines = [trainer.train_step(batches) for _ in range(STEPS)]
            yield name, {measure: [float(line[measure]) for line in lines] for measure in MEASURES}


def verdict(name: str, precision: str, curve: Curve, golden: Curve | None) -> Record:
    """How far a curve is from the golden one, and whether that is near enough; nothing is compared without one."""
    record: Record = {"objective": name, "precision": precision, "passed": True, "loss": curve["loss"]}
    if golden is None:
        return record
    for measure in MEASURES:
        pairs = zip(curve[measure], golden[measure], strict=True)
        deviation = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
        record[f"{measure}_deviation"] = deviation
        record["passed"] &= deviation <= ALLOWED[precision][measure]
    return record


def steps_of(run_dir: Path) -> list[Record]:
    """The lines of training steps, whole ones."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "loss" in record]


def kill_and_resume(corpus: Path, folder: Path, extra: list[str], golden: Curve | None) -> Record:
    """Kill a run of the command line after its first checkpoint, start it again, and compare its first steps.

    Raises:
        RuntimeError: the run ended by itself.
    """
    run_dir, log = folder / "run", folder / "run.log"
    settings = [*SETTINGS, f"--data.path={corpus}", "--training.precision=fp32", *extra]
    command = [sys.executable, "-m", "megadiff", "train", str(RECIPE), "--run-dir", str(run_dir), *settings]
    with log.open("w") as file:
        for ending, has_come in (
            (signal.SIGKILL, lambda: (run_dir / "checkpoints" / "step_00000004").exists()),
            (signal.SIGTERM, lambda: len(steps_of(run_dir)) >= STEPS),
        ):
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
            while not has_come() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(ending)
            if process.wait() not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the run ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    lines = steps_of(run_dir)[:STEPS]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step once"
    assert "resumed from" in log.read_text(), "else nothing was shown"
    curve = {measure: [float(line[measure]) for line in lines] for measure in MEASURES}
    return verdict("gidd, killed and resumed", "fp32", curve, golden)


def verdicts(arguments: argparse.Namespace, corpus: Path, scratch: Path) -> Iterator[Record]:
    """What was asked for, one after the other."""
    extra = list(TOY) if arguments.toy else []
    golden: dict[str, Curve] = {} if arguments.toy else json.loads(GOLDEN.read_text())
    if arguments.resume:
        yield kill_and_resume(corpus, scratch, extra, golden.get("gidd"))
        return
    for name, curve in curves(config_of(corpus, arguments.precision, extra)):
        yield verdict(name, arguments.precision, curve, golden.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write golden losses of this machine, in fp32, and compare nothing")
    parser.add_argument("--precision", choices=ALLOWED, default="fp32")
    parser.add_argument("--resume", action="store_true", help="kill and resume a run instead")
    parser.add_argument("--toy", action="store_true", help="a tiny model, compared with nothing")
    parser.add_argument("--output", type=Path, help="file for a line of JSON per objective, written as they come")
    arguments = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch, corpus = Path(folder), Path(folder) / "corpus"
        write_tokens(corpus)
        if arguments.write:
            found = dict(curves(config_of(corpus, "fp32", [])))
            arguments.write.write_text(json.dumps(found, indent=1) + "\n")
            return 0
        output = stack.enter_context(arguments.output.open("w")) if arguments.output else None
        for record in verdicts(arguments, corpus, scratch):
            passed &= record["passed"]
            print({name: value for name, value in record.items() if name != "loss"}, flush=True)
            if output:
                print(json.dumps(record), file=output, flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
