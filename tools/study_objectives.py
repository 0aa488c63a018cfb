"""Train every objective on the same text, model and token budget, and compare their bounds: a table, a CSV, a plot.

    python tools/study_objectives.py --work-dir runs/study                         all contenders, two at a time
    python tools/study_objectives.py --work-dir runs/study --only autoregressive gidd-masked --steps 100
    python tools/study_objectives.py --work-dir runs/study --output-dir docs/study      write what has been measured

Every contender is one `megadiff train` of the quickstart recipe in its own run directory, one process each, with its
objective's settings replaced and nothing else: same corpus, order, initial weights, optimizer and validation samples.
A run that was interrupted goes on; one that is complete is not repeated. Bounds are those of the last validation, in
nats per token with their standard errors; the error of a difference between two rows is smaller than it looks, because
both saw the same sequences.

The corpus is that of examples/quickstart.sh: `megadiff prepare` it first, or run the quickstart once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark_ops import hardware

RECIPE = Path("examples/recipes/quickstart.py")
CONTENDERS: dict[str, dict[str, str]] = {
    "autoregressive": {"objective": "autoregressive"},
    "gidd-masked": {"objective": "gidd", "objective.noise": "masked"},
    "gidd-low-uniform": {"objective": "gidd", "objective.noise": "hybrid", "objective.shift": "-2"},
    "gidd-balanced": {"objective": "gidd", "objective.noise": "hybrid", "objective.shift": "0"},
    "gidd-high-uniform": {"objective": "gidd", "objective.noise": "hybrid", "objective.shift": "2"},
    "gidd-uniform": {"objective": "gidd", "objective.noise": "uniform"},
    "mdlm": {"objective": "mdlm", "objective.loss-weighting": "nelbo"},
    "mdlm-simple": {"objective": "mdlm", "objective.loss-weighting": "simple"},
    "duo": {"objective": "duo", "model.log-snr-conditioning": "true"},
    "eso-lm": {"objective": "eso_lm", "objective.loss-weighting": "simple"},
    "eso-lm-half": {"objective": "eso_lm", "objective.alpha-0": "0.5"},
    "block-16": {"objective": "block_diffusion", "objective.block-size": "16"},
    "block-4": {"objective": "block_diffusion", "objective.block-size": "4"},
}
"""What differs from the recipe, by name."""


def command(name: str, run_dir: Path, steps: int, extra: list[str]) -> list[str]:
    """The training command of a contender."""
    settings = {
        "training.train-steps": str(steps),
        "training.log-interval": "50",
        "validation.interval": str(max(1, steps // 4)),
        "checkpoint.interval": str(max(1, steps // 2)),
        **CONTENDERS[name],
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "megadiff", "train", str(RECIPE), "--run-dir", str(run_dir), *flags, *extra]


def train(name: str, work_dir: Path, steps: int, extra: list[str]) -> str:
    """Train one contender to its end; what happened, in a line."""
    run_dir = work_dir / name
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "log.txt").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            command(name, run_dir, steps, extra), stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if finished.returncode:
        return f"{name}: exit code {finished.returncode}, see {run_dir / 'log.txt'}"
    result = read_result(name, work_dir)
    return f"{name}: NELBO {result['nelbo']:.4f} ± {result['nelbo_stderr']:.4f}" if result else f"{name}: no validation"


def read_lines(name: str, work_dir: Path) -> list[dict[str, Any]]:
    """All metrics of a contender; none if it has not been trained."""
    path = work_dir / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_result(name: str, work_dir: Path) -> dict[str, Any] | None:
    """The last validation of a contender, with the tokens it had seen and its median speed."""
    lines = read_lines(name, work_dir)
    validations = [line for line in lines if "split" in line]
    steps = [line for line in lines if "loss" in line]
    if not validations or not steps:
        return None
    speeds = sorted(line["tokens_per_second"] for line in steps)
    last = validations[-1]
    return {
        "name": name,
        "settings": " ".join(f"{key}={value}" for key, value in CONTENDERS[name].items()),
        "step": last["step"],
        "consumed_tokens": steps[-1]["consumed_tokens"],
        "nelbo": last["nelbo"],
        "nelbo_stderr": last["nelbo_stderr"],
        "bits_per_byte": last["bits_per_byte"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "unigram_entropy": last["unigram_entropy"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, best bound first."""
    lines = [
        "| objective | settings | NELBO, nats/token | ± s.e. | bits/byte | tokens/s, one core |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(results, key=lambda row: row["nelbo"]):
        lines.append(
            f"| {row['name']} | `{row['settings']}` | {row['nelbo']:.4f} | {row['nelbo_stderr']:.4f} | "
            f"{row['bits_per_byte']:.4f} | {row['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], work_dir: Path, path: Path) -> None:
    """Bounds over tokens, with two standard errors.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install 'megadiff[plots]', or give --no-plot") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in sorted(results, key=lambda row: row["nelbo"]):
        lines = read_lines(row["name"], work_dir)
        tokens_of = {line["step"]: line["consumed_tokens"] for line in lines if "loss" in line}
        points = [line for line in lines if "split" in line and line["step"] in tokens_of]
        axes.errorbar(
            [tokens_of[line["step"]] / 1e6 for line in points],
            [line["nelbo"] for line in points],
            yerr=[2 * line["nelbo_stderr"] for line in points],
            label=f"{row['name']}  {row['nelbo']:.2f}",
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
    axes.axhline(results[0]["unigram_entropy"], color="grey", linestyle=":", label="unigram entropy")
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("validation NELBO, nats per token (± 2 s.e.)")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def write(results: list[dict[str, Any]], work_dir: Path, output_dir: Path, with_plot: bool) -> None:
    """Write table, CSV and plot, named by the day."""
    output_dir.mkdir(parents=True, exist_ok=True)
    day = datetime.date.today().isoformat()
    picture = output_dir / f"{day}-objectives.png"
    if with_plot:
        plot(results, work_dir, picture)
    with (output_dir / f"{day}-objectives.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    text = [
        "# All objectives on the same text",
        "",
        f"{day}, {hardware('cpu')}. `tools/study_objectives.py`: {results[0]['consumed_tokens']:,} training tokens, "
        f"model and data of `{RECIPE}`; unigram entropy {results[0]['unigram_entropy']:.4f} nats/token.",
        "",
        table(results),
        "",
        *([f"![Validation bounds over training tokens]({picture.name})", ""] if with_plot else []),
    ]
    (output_dir / f"{day}-objectives.md").write_text("\n".join(text))


def main() -> None:
    """Train what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, metavar="DIR", help="one run directory per contender")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write table, CSV and plot there")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--steps", type=int, default=500, help="of 4096 tokens each (default: 500)")
    parser.add_argument("--jobs", type=int, default=2, help="contenders trained at the same time (default: 2)")
    parser.add_argument("--no-plot", action="store_true", help="do not plot")
    arguments, extra = parser.parse_known_args()
    names = arguments.only or list(CONTENDERS)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(train, name, arguments.work_dir, arguments.steps, extra) for name in names]
        for done in concurrent.futures.as_completed(running):
            print(done.result(), flush=True)
    results = [result for name in CONTENDERS if (result := read_result(name, arguments.work_dir))]
    if not results:
        sys.exit("error: no contender has a result: see the logs above")
    print(table(results))
    if arguments.output_dir:
        write(results, arguments.work_dir, arguments.output_dir, with_plot=not arguments.no_plot)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
