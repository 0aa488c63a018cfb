"""Length, batch and precision of a run, and what it does when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megadiff.fields import Seconds, require, require_choices
from megadiff.models.fp8 import Precision, parameter_precision


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision of a run, and what it does when something goes wrong."""

    train_steps: int = 10_000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 256
    """Sequences per optimizer step, over all ranks and accumulated micro-batches."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """Start,increment,samples: the first global batch, what is added at a time, and the samples over which it grows in
    equal parts to global_batch_size."""
    micro_batch_size: int = 8
    """Sequences that one rank processes at once; changes memory and speed, never the result."""
    seed: int = 1234
    """Seed of initial weights, data order and noise (64 bits)."""
    precision: Precision = "bf16"
    """Of parameters and activations; bf16 keeps fp32 master weights. Loss and gradients are reduced in fp32. fp8 is
    bf16 with the products of the layers in FP8, on GPUs that have it and Transformer Engine; fp8-emulated rounds as FP8
    does on any device, slowly (docs/fp8.md). A run may go on in any of the three."""
    init_from: str | None = None
    """Begin with the weights of this checkpoint (a step_* directory or a run directory) instead of random ones; a run
    that has checkpoints of its own goes on from those."""
    init_weights: Literal["model", "ema"] = "model"
    """Which weights of init_from: those that were trained, or their moving average."""
    log_interval: int = 10
    """Steps between console and TensorBoard reports; metrics.jsonl has every step."""
    exit_after: Seconds | None = None
    """Save and exit while this long after the start of the process (or after MEGADIFF_JOB_START, in seconds since 1970)
    is not yet over, step and checkpoint in progress included: 3h50m for a Slurm job of four hours."""
    stop_grace: Seconds = 30.0
    """How long the launcher waits after its signal before it kills (torchrun: 30s, and from torch 2.12 on
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT): if step and checkpoint take longer, the run warns."""
    hang_timeout: Seconds | None = None
    """A rank that makes no progress for so long is reported, and all ranks exit; 0 never does. By default half of
    parallel.timeout_minutes, which must be longer: it ends collectives without naming anybody."""
    straggler_ratio: float = 1.3
    """Warn when a rank works this many times as long as the median of its pipeline stage, three reports in a row."""
    rerun_mode: Literal["disabled", "validate_results", "report_determinism_stats"] = "disabled"
    """Megatron's rerun state machine: compute a step again if its loss is not a number or a spike, and tell faults of
    the device from those of the run; or compute every step twice and report the differences."""
    spike_factor: float = 10.0
    """With rerun_mode validate_results: a loss or gradient norm this many times the median of the last 100 steps is a
    spike."""

    def __post_init__(self) -> None:
        require_choices(self, "training")
        for name in ("train_steps", "global_batch_size", "micro_batch_size", "log_interval"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "be at least 1")
        for name in ("exit_after", "stop_grace"):
            value = getattr(self, name)
            require(value is None or value > 0, f"training.{name}", value, "be positive")
        for name in ("straggler_ratio", "spike_factor"):
            require(getattr(self, name) > 1, f"training.{name}", getattr(self, name), "be more than 1")
        require(
            self.hang_timeout is None or self.hang_timeout >= 0,
            "training.hang_timeout",
            self.hang_timeout,
            "be at least 0",
        )
        require(0 <= self.seed < 2**64, "training.seed", self.seed, "lie in [0, 2^64)")
        if self.rampup_batch_size is not None:
            start, increment, samples = self.rampup_batch_size
            require(
                1 <= start <= self.global_batch_size
                and increment >= 1
                and samples >= 0
                and (self.global_batch_size - start) % increment == 0,
                "training.rampup_batch_size",
                ",".join(map(str, self.rampup_batch_size)),
                f"be start,increment,samples such that increments lead from start to training.global_batch_size "
                f"{self.global_batch_size}",
            )

    @property
    def parameter_precision(self) -> Literal["bf16", "fp32"]:
        """Of parameters and activations."""
        return parameter_precision(self.precision)

    def is_reported(self, step: int) -> bool:
        """Whether console and pages tell of a step, 1-based: every `log_interval`-th, the first and the last."""
        return step % self.log_interval == 0 or step in (1, self.train_steps)

    def global_batch_size_at(self, consumed_samples: int) -> int:
        """Sequences of the step that follows `consumed_samples` samples.

        While the batch grows, every size from the start to the last but one is used for an equal share of the samples,
        and each rounded up to whole steps.
        """
        if self.rampup_batch_size is None:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        num_increments = (self.global_batch_size - start) // increment
        if consumed_samples >= samples or not num_increments:
            return self.global_batch_size
        return start + increment * (consumed_samples * num_increments // samples)

    def check_batches(self, data_parallel_size: int, micro_batches_multiple: int = 1) -> None:
        """Check that every global batch of the run divides into micro-batches.

        Args:
            micro_batches_multiple: what the number of micro-batches per rank must be a multiple of: the interleaved
                schedule hands them over in groups of one per pipeline stage.

        Raises:
            ValueError: one does not.
        """
        at_once = self.micro_batch_size * data_parallel_size * micro_batches_multiple
        sizes = {"training.global_batch_size": self.global_batch_size}
        if self.rampup_batch_size is not None:
            start, increment, _ = self.rampup_batch_size
            sizes |= {"the start of training.rampup_batch_size": start, "its increment": increment}
        for name, size in sizes.items():
            if size % at_once:
                stages = f" x pipeline stages {micro_batches_multiple}" if micro_batches_multiple > 1 else ""
                raise ValueError(
                    f"{name} {size} is not a multiple of training.micro_batch_size {self.micro_batch_size} x "
                    f"data-parallel size {data_parallel_size}{stages} = {at_once}: change one of them"
                )
