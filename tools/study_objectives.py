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
    "gidd-uniform-nelbo": {"objective": "gidd", "objective.noise": "uniform", "objective.loss-weighting": "nelbo"},
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
    validations = read_validations(name, work_dir)
    return f"{name}: {estimate(validations[-1])}" if validations else f"{name}: no validation"


def read_validations(name: str, work_dir: Path) -> list[dict[str, Any]]:
    """The validations of a contender in order, with the tokens it had seen; none if it has not been trained."""
    path = work_dir / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tokens_of = {line["step"]: line["consumed_tokens"] for line in lines if "loss" in line}
    return [
        {
            "name": name,
            "settings": " ".join(f"{key}={value}" for key, value in CONTENDERS[name].items()),
            "consumed_tokens": tokens_of[line["step"]],
            **{key: line[key] for key in ("step", "nelbo", "nelbo_stderr", "bits_per_byte", "unigram_entropy")},
        }
        for line in lines
        if "split" in line and line["step"] in tokens_of
    ]


def estimate(row: dict[str, Any]) -> str:
    """The bound of a validation with its standard error."""
    return f"{row['nelbo']:.3f} ± {row['nelbo_stderr']:.3f}"


def table(curves: list[list[dict[str, Any]]]) -> str:
    """The last bounds as Markdown, the best first."""
    lines = ["| contender | settings | NELBO ± s.e., nats/token | bits/byte |", "|---|---|---|---|"]
    for row in sorted((curve[-1] for curve in curves), key=lambda row: row["nelbo"]):
        lines.append(f"| {row['name']} | `{row['settings']}` | {estimate(row)} | {row['bits_per_byte']:.3f} |")
    return "\n".join(lines)


def plot(curves: list[list[dict[str, Any]]], path: Path) -> None:
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
    axes.set_prop_cycle(color=[plt.get_cmap("tab20")(index) for index in range(20)])
    for curve in sorted(curves, key=lambda curve: curve[-1]["nelbo"]):
        axes.errorbar(
            [row["consumed_tokens"] / 1e6 for row in curve],
            [row["nelbo"] for row in curve],
            yerr=[2 * row["nelbo_stderr"] for row in curve],
            label=f"{curve[-1]['name']}  {curve[-1]['nelbo']:.2f}",
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
    axes.axhline(curves[0][-1]["unigram_entropy"], color="grey", linestyle=":", label="unigram entropy")
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("validation NELBO, nats per token (± 2 s.e.)")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def write(curves: list[list[dict[str, Any]]], output_dir: Path, with_plot: bool) -> None:
    """Write table, all validations and plot, named by the day."""
    output_dir.mkdir(parents=True, exist_ok=True)
    day = datetime.date.today().isoformat()
    picture = output_dir / f"{day}-objectives.png"
    if with_plot:
        plot(curves, picture)
    rows = [row for curve in curves for row in curve]
    with (output_dir / f"{day}-objectives.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    last = curves[0][-1]
    text = [
        "# All objectives on the same text",
        "",
        f"{day}, {hardware('cpu')}. `tools/study_objectives.py`: {last['consumed_tokens']:,} training tokens, "
        f"model and data of `{RECIPE}`; unigram entropy {last['unigram_entropy']:.4f} nats/token.",
        "",
        table(curves),
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
    curves = [curve for name in CONTENDERS if (curve := read_validations(name, arguments.work_dir))]
    if not curves:
        sys.exit("error: no contender has been validated: see the logs above")
    print(table(curves))
    if arguments.output_dir:
        write(curves, arguments.output_dir, with_plot=not arguments.no_plot)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
