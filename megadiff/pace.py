"""How long a run takes, by arithmetic alone: operations of a step over what its devices are assumed to do of them.

Utilisation counts what the model computes (`TokenFlops.total`: the full square of attention, the padded head) and
neither recomputation nor anything else that a device does; it is an assumption that the caller states, not a result.
Layouts of one model are compared by `step_costs`, which adds up what each pays beside its products.
"""

from __future__ import annotations

from dataclasses import dataclass

from megadiff.config import TrainConfig
from megadiff.devices import BF16_TFLOPS
from megadiff.fields import require
from megadiff.planning import Plan, StageMemory

H100_TFLOPS = BF16_TFLOPS["H100"]
"""Of the SXM module, at its largest clock."""
SECONDS_PER_DAY = 86_400
SAVING_STEPS = 20
"""Steps behind which a checkpoint is to hide: 4 % of the 500 between two of them."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """A run at an assumed utilisation."""

    world_size: int
    device_tflops: float
    mfu: float
    step_flops: int
    """Of the full global batch, forward and backward."""
    step_seconds: float
    tokens_per_second: float
    """Of all devices."""
    days: float
    """Of all steps, without validation, saving and restarts."""
    saving_bytes_per_second: float
    """At which a checkpoint is written within `SAVING_STEPS` steps, by all nodes together."""

    def __str__(self) -> str:
        return (
            f"at an assumed {100 * self.mfu:g} % of {self.device_tflops:g} TFLOP/s on {self.world_size} device(s); "
            "computed, not measured:\n"
            f"  {self.step_seconds:.2f} s per step, {self.tokens_per_second:,.0f} tokens/s, {self.days:.1f} days\n"
            f"  a checkpoint hides behind {SAVING_STEPS} steps where {self.saving_bytes_per_second / 1e9:.2f} GB/s are "
            "written"
        )


def pace(plan: Plan, world_size: int, *, mfu: float, device_tflops: float = H100_TFLOPS) -> Pace:
    """Compute how long a planned run takes.

    Args:
        mfu: share of `device_tflops` that goes into the model's operations, in (0, 1].

    Raises:
        ValueError: `mfu` is no such share, or `device_tflops` is not positive.
    """
    require(0 < mfu <= 1, "--mfu", mfu, "lie in (0, 1]: the share of the device's peak that the model gets")
    require(device_tflops > 0, "--device-tflops", device_tflops, "be positive")
    step_flops = plan.flops_per_token.total * plan.tokens_per_step
    step_seconds = step_flops / (world_size * device_tflops * 1e12 * mfu)
    return Pace(
        world_size=world_size,
        device_tflops=device_tflops,
        mfu=mfu,
        step_flops=step_flops,
        step_seconds=step_seconds,
        tokens_per_second=plan.tokens_per_step / step_seconds,
        days=plan.train_steps * step_seconds / SECONDS_PER_DAY,
        saving_bytes_per_second=plan.checkpoint_bytes / (SAVING_STEPS * step_seconds),
    )


def bubble(config: TrainConfig, world_size: int) -> float:
    """Share of a step's computing time that a pipeline rank waits for the first and the last micro-batches.

    (stages - 1) / (virtual stages · micro-batches), where all stages take equally long and sending takes no time.

    Source: Narayanan et al. (arXiv 2104.04473), section 2.2.
    """
    parallel, training = config.parallel, config.training
    at_once = training.micro_batch_size * parallel.data_parallel_size(world_size)
    micro_batches = training.global_batch_size // at_once
    return (parallel.pipeline_model_parallel_size - 1) / (parallel.num_virtual_stages * micro_batches)


def accumulated_bytes(stage: StageMemory) -> int:
    """What adding the weight gradients of one micro-batch up moves through the memory of a rank.

    A product writes a gradient in bf16; it is read again with the fp32 sum, which is written: 2 + 2 + 4 + 4 bytes per
    parameter, however few tokens the micro-batch has. Where products add to the sum themselves (Transformer Engine's
    layers, or Apex's kernel), 8 of these are left.
    """
    return 12 * stage.parameters


def tensor_parallel_bytes(config: TrainConfig) -> int:
    """What a rank of the largest stage sends to its tensor-parallel peers for a micro-batch, with sequence parallelism.

    Rows are gathered or scattered four times a layer forward, and six times backward, where the inputs of both pairs of
    products are gathered once more; each moves (n - 1) / n of the rows. Embedding and head are not counted.
    """
    parallel = config.parallel
    size, layers = parallel.tensor_model_parallel_size, max(config.model.layers_per_stage(parallel))
    tokens = config.training.micro_batch_size * config.objective.model_length(config.data.sequence_length)
    rows = 2 * tokens * config.model.hidden_size  # bf16
    return 10 * layers * rows * (size - 1) // size


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a GPU is assumed to reach, per second. Defaults: an H100 with NVLink, and 400 Gbit/s of network for each."""

    products: float = 0.6 * H100_TFLOPS * 1e12
    """Operations of matrix products."""
    memory: float = 0.8 * 3.35e12
    """Bytes through its memory."""
    node: float = 0.8 * 450e9
    """Bytes to GPUs of the same node, one way."""
    network: float = 0.8 * 50e9
    """Bytes to other nodes, one way."""


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Seconds of a step by what they are spent on, where nothing hides behind anything else."""

    products: float
    accumulation: float
    """Of gradients, in every micro-batch."""
    tensor_parallel: float
    bubble: float
    gradients: float
    """Shared once, and the new weights."""

    @property
    def total(self) -> float:
        return self.products + self.accumulation + self.tensor_parallel + self.bubble + self.gradients


def step_costs(config: TrainConfig, plan: Plan, world_size: int, rates: Rates | None = None) -> StepCosts:
    """Add up what a layout pays in each step, on the ranks of the stage with most parameters.

    What a layout can hide counts in full, and norms, activations, optimizer and sends between stages not at all: these
    sums rank layouts of one model; they foretell no times.
    """
    rates, parallel = rates or Rates(), config.parallel
    sharing = parallel.data_parallel_size(world_size)
    micro_batches = config.training.global_batch_size // (config.training.micro_batch_size * sharing)
    recompute = 4 / 3 if parallel.recompute_granularity == "full" else 1.0
    products = recompute * plan.flops_per_token.total * plan.tokens_per_step / (world_size * rates.products)
    largest = max(plan.stages, key=lambda stage: stage.parameters)
    accumulation = micro_batches * accumulated_bytes(largest) / rates.memory
    tensor_parallel = micro_batches * tensor_parallel_bytes(config) / rates.node
    return StepCosts(
        products=products,
        accumulation=accumulation,
        tensor_parallel=tensor_parallel,
        bubble=bubble(config, world_size) * (products + accumulation + tensor_parallel),
        gradients=exchanged_bytes(largest, sharing * parallel.context_parallel_size) / rates.network,
    )


def exchanged_bytes(stage: StageMemory, sharing_ranks: int) -> int:
    """What a rank of a stage sends once a step with the distributed optimizer: fp32 gradients out, new weights back.

    Reduce-scatter and all-gather over n ranks each move (n - 1) / n of their buffer.

    Args:
        sharing_ranks: data x context, in one instance of the optimizer.
    """
    return (stage.gradients + stage.weights) * (sharing_ranks - 1) // sharing_ranks
