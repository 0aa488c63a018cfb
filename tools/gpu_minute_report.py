"""What an archive of tools/gpu_minute.sh shows, as a page: goals beside figures, and the tables behind them.

    python tools/gpu_minute_report.py gpu_minute.tar.gz                       writes docs/benchmarks/DATE-gpu.md
    python tools/gpu_minute_report.py gpu_minute.tar.gz --output PAGE.md

An archive may hold any of the parts, each as far as its time went. What is not in it is "not measured".
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_MEASURED = "not measured"
LARGE = {"vocab_size": "131072", "rows": "8192", "dtype": "bfloat16"}
"""The row loss that counts most: where logits are largest."""
LAYERS_OF_7B, MEASURED_LAYERS = 36, 8
Record = dict[str, str]
KERNEL_TESTS = ("kernels.log", "attention.log")
OUTCOME = re.compile(r"^tests/\S.* (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
"""A line of pytest -v: it stands there as soon as the test has ended."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The files of an archive, by their names below results/."""

    files: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Archive:
        """Read an archive.

        Raises:
            ValueError: it is none.
        """
        try:
            with tarfile.open(path) as archive:
                members = [member for member in archive if member.isfile()]
                contents = [archive.extractfile(member) for member in members]
                texts = [content.read().decode(errors="replace") for content in contents if content is not None]
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{path} is not an archive of tools/gpu_minute.sh ({error}): name the .tar.gz") from None
        names = [member.name.removeprefix("./").removeprefix("results/") for member in members]
        if "parts.csv" not in names:
            raise ValueError(f"{path} has no parts.csv, but must be an archive that tools/gpu_minute.sh wrote")
        return cls(files=dict(zip(names, texts, strict=True)))

    def table(self, folder: str, ending: str) -> list[Record]:
        """The lines of all CSV files of a folder whose names end so; none where there is no such file."""
        names = sorted(name for name in self.files if name.startswith(folder) and name.endswith(ending))
        return [line for name in names for line in csv.DictReader(io.StringIO(self.files[name]))]

    def records(self, name: str) -> list[dict[str, object]]:
        """The lines of a JSON Lines file."""
        return [json.loads(line) for line in self.files.get(name, "").splitlines()]

    @property
    def is_dry_run(self) -> bool:
        """Whether sizes were toys, on a CPU."""
        return "dry-run" in self.files

    @property
    def row_losses(self) -> list[Record]:
        return [*self.table("rows/", ".csv"), *self.table("compiled/", ".csv")]

    def steps(self, shape: str) -> dict[str, Record]:
        """Steps in bf16 by contender."""
        return {line["contender"]: line for line in self.table(f"steps-{shape}/", "-step.csv")}


# -------------------------------------------------------------------------------------------------- goals and figures


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A sentence, and the figure that it is held against."""

    what: str
    goal: str
    figure: Callable[[Archive], str]
    """Raises LookupError or ValueError where the archive has not what it takes."""


def tests(*logs: str) -> Callable[[Archive], str]:
    """How many tests of these parts passed and failed, and whether a part was stopped before its end."""

    def figure(archive: Archive) -> str:
        texts = [archive.files[log] for log in logs if log in archive.files]
        outcomes = [outcome for text in texts for outcome in OUTCOME.findall(text)]
        counts = [f"{outcomes.count(name)} {name.lower()}" for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")]
        ended = sum(bool(re.search(r"\d+ (passed|failed|skipped|error).* in ", text)) for text in texts)
        stopped = f"; {len(logs) - ended} of {len(logs)} parts not ended" if ended < len(logs) else ""
        return ", ".join(count for count in counts if not count.startswith("0 ")) + stopped or NOT_MEASURED

    return figure


def deviations(name: str) -> Callable[[Archive], str]:
    """The worst relative deviation of a loss from the golden one, and of how many curves."""

    def figure(archive: Archive) -> str:
        records = archive.records(name)
        worst = max(float(str(record["loss_deviation"])) for record in records)
        num_passed = sum(bool(record["passed"]) for record in records)
        return f"{worst:.1e}; {num_passed} of {len(records)} within"

    return figure


def row_loss(archive: Archive, folder: str, noise: str, name: str) -> Record:
    """Of one process, in which what is compared took turns."""
    wanted = {**LARGE, "noise": noise, "implementation": name}
    [line, *_] = [line for line in archive.table(folder, ".csv") if wanted.items() <= line.items()]
    return line


def over_floor(noise: str) -> Callable[[Archive], str]:
    def figure(archive: Archive) -> str:
        return f"{1 / float(row_loss(archive, 'rows/', noise, 'megadiff in place')['copy_share']):.2f}"

    return figure


def row_loss_ratio(noise: str, other: str) -> Callable[[Archive], str]:
    def figure(archive: Archive) -> str:
        ours, theirs = (row_loss(archive, "compiled/", noise, name) for name in ("megadiff", other))
        return f"{float(ours['time_ms']) / float(theirs['time_ms']):.2f}"

    return figure


def of_step(shape: str, column: str) -> Callable[[Archive], str]:
    return lambda archive: archive.steps(shape)["hybrid, fused head"][column] or NOT_MEASURED


def memory(shape: str) -> Callable[[Archive], str]:
    def figure(archive: Archive) -> str:
        line = archive.steps(shape)["hybrid, fused head"]
        peak, plan = float(line["peak_gib"]), float(line["plan_gib"])
        return f"{peak:.1f} of {plan:.1f} GiB, {100 * (peak / plan - 1):+.1f} %"

    return figure


def whole_7b(archive: Archive) -> str:
    """Tokens per second of all layers, at the utilisation that some of them had."""
    from benchmark_train_cases import RECIPE, SHAPES

    from megadiff.config import load_recipe
    from megadiff.models.accounting import flops_per_token

    shape = SHAPES["7b-layers"]
    line = archive.steps("7b")["hybrid, fused head"]
    float(line["mfu"])  # a figure of a GPU
    flops = []
    for num_layers in (MEASURED_LAYERS, LAYERS_OF_7B):
        config = load_recipe(RECIPE).overridden([*shape.settings, f"--model.num-layers={num_layers}"])
        flops.append(flops_per_token(config.model, shape.vocab_size, config.data.sequence_length).total)
    return f"{float(line['tokens_per_s']) * flops[0] / flops[1]:.0f}"


def most_graphs(archive: Archive) -> str:
    return str(max(int(line["graphs_compiled"]) for line in archive.table("attention.csv", "")))


GOALS = [
    Goal(what="kernels against definitions", goal="all pass", figure=tests(*KERNEL_TESTS)),
    Goal(
        what="six objectives, fp32, from the CPU's losses",
        goal="≤ 1e-5",
        figure=deviations("golden-fp32.jsonl"),
    ),
    Goal(
        what="six objectives, bf16, from the CPU's in fp32",
        goal="≤ 2e-3",
        figure=deviations("golden-bf16.jsonl"),
    ),
    Goal(what="killed and resumed, fp32", goal="≤ 1e-5", figure=deviations("resume.jsonl")),
    Goal(what="row loss, hybrid, over its byte floor", goal="≤ 1.25", figure=over_floor("hybrid")),
    Goal(what="row loss, masked, over its byte floor", goal="≤ 1.25", figure=over_floor("masked")),
    Goal(
        what="row loss, hybrid, to compiled cross-entropy",
        goal="≤ 1",
        figure=row_loss_ratio("hybrid", "cross-entropy compiled"),
    ),
    Goal(
        what="row loss, hybrid, to the compiled dense loss",
        goal="≤ 1",
        figure=row_loss_ratio("hybrid", "dense compiled"),
    ),
    Goal(what="3B-shaped layers, MFU in bf16", goal="≥ 0.55", figure=of_step("3b", "mfu")),
    Goal(what="3B-shaped layers, step to cross-entropy's", goal="≤ 1.03", figure=of_step("3b", "ratio")),
    Goal(what="3B-shaped layers, memory to the plan", goal="± 5 %", figure=memory("3b")),
    Goal(what="7B-shaped layers, MFU in bf16", goal="≥ 0.50", figure=of_step("7b", "mfu")),
    Goal(what="7B-shaped layers, memory to the plan", goal="± 5 %", figure=memory("7b")),
    Goal(
        what="7B, 36 layers, tokens per second, at the MFU of 8 layers, without communication",
        goal="> 9600, Sumi's on 288 H100",
        figure=whole_7b,
    ),
    Goal(what="graphs compiled for five further masks of a kind", goal="0", figure=most_graphs),
]


def figure_of(goal: Goal, archive: Archive) -> str:
    """The figure, or that it was not measured."""
    if archive.is_dry_run:
        return NOT_MEASURED
    try:
        return goal.figure(archive)
    except (LookupError, ValueError):
        return NOT_MEASURED


# -------------------------------------------------------------------------------------------------------------- page


def markdown(records: Iterable[Record], columns: dict[str, str]) -> str:
    """A table of these columns under these titles; a sentence where there are no records."""
    rows = [[record.get(name, "") for name in columns] for record in records]
    if not rows:
        return f"{NOT_MEASURED.capitalize()}.\n"
    lines = [list(columns.values()), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def page(archive: Archive) -> str:
    """The whole page."""
    goals = [{"what": goal.what, "goal": goal.goal, "figure": figure_of(goal, archive)} for goal in GOALS]
    steps = [{"shape": shape, **line} for shape in ("3b", "7b") for line in archive.steps(shape).values()]
    lines = [line for log in KERNEL_TESTS for line in archive.files.get(log, "").splitlines()]
    failed = [line for line in lines if OUTCOME.match(line) and ("FAILED" in line or "ERROR" in line)]
    losses = {"implementation": "", "noise": "", "dtype": "", "vocab_size": "V", "rows": "T", "time_ms": "ms"}
    stepped = {"shape": "", "contender": "", "step_ms": "step ms", "passes_ms": "passes ms", "tokens_per_s": "tokens/s"}
    stepped |= {"ratio": "ratio", "mfu": "MFU", "peak_gib": "GiB", "plan_gib": "plan GiB", "sm_clock_mhz": "MHz"}
    doctor = archive.files.get("doctor.log", "").strip() or NOT_MEASURED
    sections = {
        "Goals": markdown(goals, {"what": "", "goal": "goal", "figure": "figure"}),
        "Machine": f"```\n{doctor}\n```\n",
        "Parts": markdown(
            archive.table("parts.csv", ""),
            {"part": "", "name": "part", "seconds": "s", "limit_s": "limit, s", "exit_code": "exit code"},
        ),
        "Tests that failed": "\n".join(f"- `{line}`" for line in failed) + "\n" if failed else "None that ran.\n",
        "Training steps, bf16": markdown(steps, stepped),
        "Training steps, FP8": markdown(archive.table("fp8/", "-step.csv"), stepped),
        "Row loss": markdown(archive.row_losses, losses | {"copy_share": "share of copy", "peak_extra_mib": "MiB"}),
        "Output layer and loss": markdown(archive.table("head/", ".csv"), losses | {"peak_extra_mib": "MiB"}),
        "Where the time of a hybrid step goes": markdown(
            [line for line in archive.table("profile/", "-profile.csv") if float(line["hybrid_ms"]) > 0],
            {"part": "part", "hybrid_ms": "ms", "hybrid_share": "share", "cross_entropy_ms": "cross-entropy's ms"},
        ),
        "Kernels that take the longest": markdown(
            archive.table("profile/", "-kernels.csv"), {"kernel": "kernel", "ms": "ms", "share": "share"}
        ),
        "Samplers": markdown(
            archive.table("sampling.csv", ""),
            {"sampler": "", "samples": "samples", "length": "L", "steps": "steps", "tokens_per_s": "tokens/s"},
        ),
        "Attention of a layer, both ways": markdown(
            archive.table("attention.csv", ""),
            {"mask": "mask", "length": "L", "ms": "ms", "mask_ms": "mask, ms", "graphs_compiled": "graphs"},
        ),
    }
    dry = "**A dry run: toy sizes, on a CPU. No figure is one of a GPU.** " if archive.is_dry_run else ""
    title = f"# {date_of(archive)}, what one GPU could tell\n\n{dry}Written by `tools/gpu_minute_report.py`.\n"
    return "\n".join([title, *(f"## {name}\n\n{text}" for name, text in sections.items())])


def date_of(archive: Archive) -> str:
    """The day of the measurements, as their files have it."""
    dated = (Path(name).name[:10] for name in archive.files if Path(name).name[:2] == "20")
    return min(dated, default="undated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--output", type=Path, help="the page; docs/benchmarks/DATE-gpu.md by default")
    arguments = parser.parse_args()
    try:
        archive = Archive.read(arguments.archive)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = arguments.output or ROOT / "docs" / "benchmarks" / f"{date_of(archive)}-gpu.md"
    output.write_text(page(archive))
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
