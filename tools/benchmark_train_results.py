"""How the figures of `benchmark_train.py` are written down: a page of tables, and files for programs."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_train_machine import CLOCKS

Record = dict[str, Any]

PLACE = ("date", "hardware", "cores")
"""Facts of a machine that have a sentence of their own."""
SHARED = ("layers", "fp8_recipe", "attention", "optimizer", "gradient_accumulation", "kernels", *CLOCKS.values())
"""What the records of a case have in common beside shape, precision and threads: facts, and no results."""


def section(title: str, shape: str, precision: str, records: Sequence[Record]) -> str:
    """Records of one case as Markdown: what they have in common, and a table."""
    shared = [f"{name.replace('_', ' ')} {value}" for name in SHARED if (value := records[0].get(name))]
    facts = f"{', '.join(shared)}.\n\n" if shared else ""
    return f"## {title}: {shape}, {precision}\n\n{facts}{table(records)}\n"


def table(records: Sequence[Record]) -> str:
    """Records of one case as a Markdown table with aligned columns."""
    columns = [name for name in records[0] if name not in ("shape", "precision", "threads", *SHARED)]
    cells = [[name.replace("_", " ") for name in columns]]
    cells += [[str(record[name]) for name in columns] for record in records]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def heading(facts: Record, argv: Sequence[str], *, threads: int, rounds: int, warm_up: float) -> str:
    """The facts above the tables."""
    software = [f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value and name not in PLACE]
    return (
        f"# {facts['date']}, training steps\n\n"
        f"{facts['hardware']}, {facts['cores']} cores, {threads} thread(s) per process; "
        f"{facts['cores'] // threads + 1} processes or more share cores.\n"
        f"{', '.join(software)}.\n"
        f"Medians and quartiles of {rounds} rounds, after {warm_up:g} s of warm-up.\n\n"
        f"    {shlex.join(['python', 'tools/benchmark_train.py', *argv])}\n"
    )


def write_csv(path: Path, facts: Record, records: Sequence[Record]) -> None:
    """Records, each with the machine that they were measured on."""
    lines = [{**facts, **record} for record in records]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
