"""What differs from the rest, or is too slow on all of them, in sentences: pure functions of what the ranks report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megadiff.devices import peak_tflops
from megadiff.fields import require


def unit_of(measurement: str) -> str:
    """Of all but these, bandwidth."""
    return {"matrix products": "TFLOP/s", "GPU clock": "MHz"}.get(measurement, "GB/s")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What the pre-flight check writes, how long it waits, and what it calls wrong."""

    scratch: Path | None = None
    """A directory on the file system of the run directory, to measure writing there; not measured without."""
    scratch_mib: int = 512
    """Size of the file that each rank writes there and deletes."""
    timeout: float = 180.0
    """Seconds that a rank may be late, or that one measurement may take, before it is named and the check ends."""
    min_compute: float = 0.9
    """Least share of the median that matrix products and GPU clock may have: healthy GPUs of one kind lie within a few
    per cent of each other, and all ranks wait for the slowest one in every step."""
    min_bandwidth: float = 0.8
    """Least share of the median that collectives may have; other jobs on the network cost less than a broken link,
    which halves it."""
    min_writing: float = 0.5
    """Least share of the median that writing may have: shared file systems scatter, a wrong mount is slower by far."""
    min_share_of_peak: float = 0.6
    """Least share of the device's peak that matrix products must have, where the peak is known; 0: none. A healthy H100
    reaches two thirds to three quarters, and GPUs that are all short of power are equal to their median."""
    min_node_gb_per_s: float = 0.0
    """Least bus bandwidth of collectives within a node; 0: none, for the links decide what to expect."""
    min_pair_gb_per_s: float = 0.0
    """Least bus bandwidth of collectives of two nodes; 0: none. TCP in place of InfiniBand is slow on all alike."""
    min_job_gb_per_s: float = 0.0
    """Least bus bandwidth of collectives of the whole job; 0: none."""
    min_sending_gb_per_s: float = 0.0
    """Least bandwidth, each way, between a GPU and its peer on a neighbouring node; 0: none."""
    max_clock_offset: float = 2.0
    """Seconds that the time of day of a node may be off: rank 0's decides when to save and to stop, and logs of
    several nodes are read side by side."""

    def __post_init__(self) -> None:
        require(self.scratch_mib >= 1, "--scratch-mib", self.scratch_mib, "be at least 1")
        for name in ("timeout", "max_clock_offset"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')}", getattr(self, name), "be positive")
        for name in ("min_compute", "min_bandwidth", "min_writing", "min_share_of_peak"):
            require(0 <= getattr(self, name) < 1, f"--{name.replace('_', '-')}", getattr(self, name), "lie in [0, 1)")
        for name in ("min_node_gb_per_s", "min_pair_gb_per_s", "min_job_gb_per_s", "min_sending_gb_per_s"):
            require(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "be at least 0")

    def least_share(self, measurement: str) -> float:
        """Of the median, below which a measurement is wrong."""
        if measurement in ("matrix products", "GPU clock"):
            return self.min_compute
        return self.min_writing if measurement == "writing" else self.min_bandwidth

    def floor(self, measurement: str, gpu: str) -> float:
        """What a measurement must reach whatever the others do, in its unit; 0 where nothing is asked of it."""
        if measurement == "matrix products":
            return self.min_share_of_peak * (peak_tflops(gpu) or 0.0)
        floors = {
            "node": self.min_node_gb_per_s,
            "pairs of nodes": self.min_pair_gb_per_s,
            "job": self.min_job_gb_per_s,
        }
        kind, _, scope = measurement.partition(", ")
        return self.min_sending_gb_per_s if kind == "sending" else floors.get(scope, 0.0)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank says."""

    host: str
    facts: dict[str, str]
    measured: dict[str, float]
    """By name; more is better."""
    times_of_day: list[float] = field(default_factory=list)
    """Seconds since 1970 when this rank left each of several barriers."""
    problems: list[str] = field(default_factory=list)
    """What it could not do."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A measurement of one rank beside the median of the nodes."""

    name: str
    rank: int
    host: str
    value: float
    median: float

    @property
    def share(self) -> float:
        return self.value / self.median

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {unit_of(self.name)}, {self.share:.2f} of the median {self.median:.4g}"


def compare(reports: Sequence[Report]) -> list[Comparison]:
    """Of each measurement and node its slowest rank, against the median over the nodes of their ranks' medians."""
    found = []
    for name in dict.fromkeys(name for report in reports for name in report.measured):
        nodes: dict[str, list[tuple[float, int]]] = {}
        for rank, report in enumerate(reports):
            if name in report.measured:
                nodes.setdefault(report.host, []).append((report.measured[name], rank))
        median = statistics.median(statistics.median(value for value, _ in values) for values in nodes.values())
        for host, values in nodes.items():
            value, rank = min(values)
            found.append(Comparison(name=name, rank=rank, host=host, value=value, median=median))
    return found


def findings(reports: Sequence[Report], config: PreflightConfig) -> Iterator[str]:
    """What is wrong, a sentence each; nothing where all is well."""
    for rank, report in enumerate(reports):
        for problem in report.problems:
            yield f"rank {rank} on {report.host}: {problem}"
    yield from _mismatches(reports)
    for one in compare(reports):
        least = config.least_share(one.name)
        if one.share < least:
            yield f"node {one.host}, rank {one.rank}: {one}, but must be at least {least:g}: repair it, or leave it out"
    yield from _below_floors(reports, config)
    for host, offset in clock_offsets(reports).items():
        if abs(offset) > config.max_clock_offset:
            yield (
                f"node {host}: its time of day is {offset:+.1f} s off, but must be within "
                f"{config.max_clock_offset:g} s: synchronise it (chrony, ntpd)"
            )


def _mismatches(reports: Sequence[Report]) -> Iterator[str]:
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        values = [report.facts.get(name, "not there") for report in reports]
        usual = Counter(values).most_common(1)[0][0]
        for other in dict.fromkeys(value for value in values if value != usual):
            hosts = dict.fromkeys(report.host for report, value in zip(reports, values, strict=True) if value == other)
            yield f"{name} is {other} on {', '.join(hosts)}, but {usual} elsewhere: make them the same"


def _below_floors(reports: Sequence[Report], config: PreflightConfig) -> Iterator[str]:
    """What is too slow by itself, said once for all nodes: where all are, none differs from the median."""
    too_slow: dict[tuple[str, str, float], list[Comparison]] = {}
    for one in compare(reports):
        gpu = reports[one.rank].facts.get("GPU", "")
        floor = config.floor(one.name, gpu)
        if one.value < floor:
            too_slow.setdefault((one.name, gpu, floor), []).append(one)
    for (name, gpu, floor), found in too_slow.items():
        worst = min(found, key=lambda one: one.value)
        reason, remedy = "", "look which links NCCL has found (NCCL_DEBUG=INFO) and whether they are up"
        if name == "matrix products":
            reason = f" ({config.min_share_of_peak:g} of the peak of {gpu})"
            remedy = "look for limits of power and heat (nvidia-smi -q -d PERFORMANCE)"
        yield (
            f"{name} {worst.value:.4g} {unit_of(name)} on rank {worst.rank}, and too slow on {len(found)} node(s): "
            f"{', '.join(one.host for one in found)}, but must be at least {floor:.4g}{reason}: {remedy}"
        )


def clock_offsets(reports: Sequence[Report]) -> dict[str, float]:
    """Seconds by which the time of day of each node differs from the median of all ranks.

    Of several barriers and ranks the smallest difference counts: a rank may be late out of a barrier, which is not its
    clock's fault.
    """
    smallest: dict[str, float] = {}
    for times in zip(*(report.times_of_day for report in reports), strict=True):
        median = statistics.median(times)
        for report, now in zip(reports, times, strict=True):
            best = smallest.get(report.host)
            if best is None or abs(now - median) < abs(best):
                smallest[report.host] = now - median
    return smallest


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All reports, judged."""

    num_ranks: int
    num_nodes: int
    comparisons: list[Comparison]
    wrong: list[str]
    """A sentence each; empty where all is well."""

    @classmethod
    def of(cls, reports: Sequence[Report], config: PreflightConfig) -> Verdict:
        return cls(
            num_ranks=len(reports),
            num_nodes=len({report.host for report in reports}),
            comparisons=compare(reports),
            wrong=list(findings(reports, config)),
        )

    def __str__(self) -> str:
        """A line for each measurement, the slowest node (said where nothing is wrong, too), and what is wrong."""
        lines = [f"{self.num_ranks} rank(s) on {self.num_nodes} node(s)", ""]
        lines.append(f"{'':<34}{'median':>10}{'slowest':>10}  {'unit':<9}slowest rank")
        for name in dict.fromkeys(one.name for one in self.comparisons):
            worst = _slowest(one for one in self.comparisons if one.name == name)
            place = f"{worst.rank} on {worst.host}"
            lines.append(f"{name:<34}{worst.median:>10.4g}{worst.value:>10.4g}  {unit_of(name):<9}{place}")
        worst = _slowest(self.comparisons)
        lines += ["", f"slowest: node {worst.host}, rank {worst.rank}: {worst}"]
        lines += [f"wrong: {sentence}" for sentence in self.wrong] or ["nothing is wrong"]
        return "\n".join(lines)


def _slowest(comparisons: Iterable[Comparison]) -> Comparison:
    """What is furthest below its median."""
    return min(comparisons, key=lambda one: one.share)
