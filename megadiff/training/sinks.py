"""Where numbers and texts of a run are looked at: TensorBoard, Weights & Biases, Prometheus.

Each is a few lines around the library that knows its format. Only TensorBoard is always there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megadiff.fields import require


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is shown of a run while it trains, beside its numbers, and where."""

    num_texts: int = 1
    """Texts that are written after every validation, the first of them with the steps of its denoising; 0 for none."""
    text_prompt: str = ""
    """What these texts begin with."""
    text_length: int = 128
    """Tokens of such a text, the prompt included."""
    text_steps: int = 64
    """Denoising steps of such a text."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases, with the extra megadiff[watch]; WANDB_MODE=offline keeps it in the
    run directory."""
    prometheus_file: str | None = None
    """Also keep the newest numbers in this file, NAME.prom, for the textfile collector of Prometheus' node exporter,
    with that extra."""

    def __post_init__(self) -> None:
        require(self.num_texts >= 0, "watch.num_texts", self.num_texts, "be at least 0")
        for name in ("text_length", "text_steps"):
            require(getattr(self, name) >= 1, f"watch.{name}", getattr(self, name), "be at least 1")
        if self.prometheus_file is not None and not self.prometheus_file.endswith(".prom"):
            raise ValueError(
                f"watch.prometheus_file is {self.prometheus_file}, but node exporters read names that end with .prom: "
                "rename it"
            )

    def check(self) -> None:
        """Check that what is asked for is installed.

        Raises:
            ValueError: it is not.
        """
        for setting, library in (("wandb_project", "wandb"), ("prometheus_file", "prometheus_client")):
            if getattr(self, setting) is not None and importlib.util.find_spec(library) is None:
                raise ValueError(
                    f"watch.{setting} is {getattr(self, setting)}, but {library} is not installed: pip install "
                    "'megadiff[watch]', or leave it out"
                )


class Sink(Protocol):
    """Somewhere that numbers and texts go."""

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Record numbers of a step, by name with slashes."""

    def text(self, step: int, name: str, markdown: str) -> None:
        """Record a text of a step."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, run_dir: Path, *, purge_step: int | None = None) -> None:
        """Open a file.

        Args:
            purge_step: what others hold from this step on is not shown any more; None leaves all as it is.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Record curves; see `Sink`."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Record a text; see `Sink`."""
        self._writer.add_text(name, markdown, step)

    def close(self) -> None:
        """Flush; see `Sink`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one after every resume."""

    def __init__(self, run_dir: Path, project: str, settings: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        name = run_dir.resolve().name
        self._html = wandb.Html
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=str(run_dir), config=settings)

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Log numbers; see `Sink`."""
        self._run.log(numbers, step=step)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Log a text, as it is; see `Sink`."""
        escaped = markdown.replace("&", "&amp;").replace("<", "&lt;")
        self._run.log({name: self._html(f"<pre>{escaped}</pre>")}, step=step)

    def close(self) -> None:
        """End the run; see `Sink`."""
        self._run.finish()


class Prometheus:
    """One file that always holds the newest numbers; replaced as a whole, so nobody reads half of one."""

    def __init__(self, path: Path, run_name: str) -> None:
        library: Any = importlib.import_module("prometheus_client")
        self._path, self._run_name, self._library = path, run_name, library
        self._registry = library.CollectorRegistry()
        self._gauges: dict[str, Any] = {}

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Write all numbers as gauges with the label `run`; see `Sink`."""
        for name, number in {"step": float(step), **numbers}.items():
            gauge_name = "megadiff_" + "".join(c if c.isalnum() else "_" for c in name)
            if gauge_name not in self._gauges:
                self._gauges[gauge_name] = self._library.Gauge(gauge_name, name, ["run"], registry=self._registry)
            self._gauges[gauge_name].labels(self._run_name).set(number)
        self._library.write_to_textfile(os.fspath(self._path), self._registry)

    def text(self, step: int, name: str, markdown: str) -> None:
        """Nothing: Prometheus has no texts; see `Sink`."""

    def close(self) -> None:
        """Nothing: everything is written; see `Sink`."""


def open_sinks(watch: WatchConfig, run_dir: Path, resumed_step: int, settings: dict[str, Any]) -> list[Sink]:
    """What a run is watched by.

    Args:
        settings: of the run, for those who record them.
    """
    sinks: list[Sink] = [TensorBoard(run_dir, purge_step=resumed_step + 1)]
    if watch.wandb_project is not None:
        sinks.append(WandB(run_dir, watch.wandb_project, settings))
    if watch.prometheus_file is not None:
        sinks.append(Prometheus(Path(watch.prometheus_file), run_dir.resolve().name))
    return sinks
