"""Process groups: who shares a tensor, a pipeline, a batch.

The only file that touches Megatron-Core's `parallel_state`. Everything else receives a `Groups` value and reads
ranks and groups from it, so no other function depends on global state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megadiff.fields import require
from megadiff.parallel import cpu


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks of a job divide the work; the data-parallel size is what the world leaves over.

    Nothing here changes the result: every layout trains the same model. Names are Megatron's.
    """

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices, the vocabulary and the heads."""
    sequence_parallel: bool = False
    """Between the matrices, divide positions over the tensor-parallel ranks: less memory, no more traffic."""
    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive groups of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Groups of layers per pipeline rank (interleaved schedule): a shorter bubble for more traffic."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first pipeline rank, which also embeds; an equal share by default."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last pipeline rank, which also has head and loss; an equal share by default."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; keys and values of attention are gathered over them."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data- and context-parallel ranks."""
    num_distributed_optimizer_instances: int = 1
    """Copies of the sharded optimizer state over the data-parallel ranks: less traffic between nodes, more memory."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while backward goes on, bucket by bucket."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward goes on; needs overlap_grad_reduce and the distributed
    optimizer."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Drop activations in forward and compute them again in backward: of whole layers, or of recompute_modules only."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full recompute: of all layers, recompute_num_layers at a time, or of as many layers of each stage."""
    recompute_num_layers: int = 1
    """Full recompute: layers per unit (uniform) or per stage (block)."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Selective recompute: of attention between its projections, of the feed-forward layer, or of both."""
    timeout_minutes: float = 30.0
    """How long a collective may wait for a missing rank before the job fails."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "num_distributed_optimizer_instances",
            "recompute_num_layers",
        ):
            require(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "be at least 1")
        for name, smallest in (
            ("virtual_pipeline_model_parallel_size", 2),
            ("num_layers_in_first_pipeline_stage", 1),
            ("num_layers_in_last_pipeline_stage", 1),
        ):
            value = getattr(self, name)
            require(value is None or value >= smallest, f"parallel.{name}", value, f"be at least {smallest}, or none")
            require(
                value is None or self.pipeline_model_parallel_size > 1,
                f"parallel.{name}",
                value,
                "be none without a pipeline: set parallel.pipeline_model_parallel_size to 2 or more",
            )
        require(
            0 < self.timeout_minutes < math.inf,
            "parallel.timeout_minutes",
            self.timeout_minutes,
            "be positive and finite",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel",
            self.sequence_parallel,
            "be false without tensor parallelism: set parallel.tensor_model_parallel_size to 2 or more",
        )
        require(
            not self.overlap_param_gather or (self.overlap_grad_reduce and self.use_distributed_optimizer),
            "parallel.overlap_param_gather",
            self.overlap_param_gather,
            "be false without parallel.overlap_grad_reduce and parallel.use_distributed_optimizer: set both",
        )
        require(
            self.num_distributed_optimizer_instances == 1 or self.use_distributed_optimizer,
            "parallel.num_distributed_optimizer_instances",
            self.num_distributed_optimizer_instances,
            "be 1 without parallel.use_distributed_optimizer",
        )

    @property
    def num_virtual_stages(self) -> int:
        """Groups of layers that each pipeline rank holds."""
        return self.virtual_pipeline_model_parallel_size or 1

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that see different samples in a job of `world_size` processes.

        Raises:
            ValueError: the world does not divide into copies of the model.
        """
        sizes = {
            "tensor": self.tensor_model_parallel_size,
            "context": self.context_parallel_size,
            "pipeline": self.pipeline_model_parallel_size,
        }
        model_size = math.prod(sizes.values())
        if world_size % model_size:
            product = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"{world_size} process(es) cannot hold copies of a model divided over {product} ranks: start a "
                f"multiple of {model_size} processes (torchrun --nproc-per-node {model_size}) or lower the sizes"
            )
        data_parallel_size = world_size // model_size
        instances = self.num_distributed_optimizer_instances
        if data_parallel_size * self.context_parallel_size % instances:
            raise ValueError(
                f"parallel.num_distributed_optimizer_instances is {instances}, but must divide data x context = "
                f"{data_parallel_size * self.context_parallel_size} ranks: choose a divisor"
            )
        return data_parallel_size


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This process's place in the job, and the groups it communicates in."""

    config: ParallelConfig
    device: torch.device
    collection: ProcessGroupCollection
    tp: dist.ProcessGroup
    """Tensor-parallel peers: same samples, same layers, different shards."""
    pp: dist.ProcessGroup
    """Pipeline stages of one copy of the model."""
    cp: dist.ProcessGroup
    """Context-parallel peers: same samples, same layers, different positions."""
    dp: dist.ProcessGroup
    """Ranks with the same shard, the same positions and different samples."""
    mp: dist.ProcessGroup
    """One copy of the model: tensor x pipeline."""
    control: dist.ProcessGroup
    """All ranks, over gloo: flags and decisions that live on the host."""

    def connect_to_store(self) -> dist.Store:
        """A connection to the job's key-value store for a thread of its own, which nobody else's waiting blocks."""
        return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage, where logits and losses live."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)

    @property
    def tp_source_rank(self) -> int:
        """Global rank of the tensor-parallel peer that reads the data."""
        return dist.get_global_rank(self.tp, 0)


def launched_world_size() -> int:
    """Number of processes of this job: torchrun's, or 1 when started alone.

    Raises:
        ValueError: srun started several processes that do not know of each other.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in os.environ and tasks != "1":
        raise ValueError(
            f"srun started {tasks} processes that do not know of each other (WORLD_SIZE is not set): let srun start "
            "one torchrun per node, which starts the processes"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: ParallelConfig) -> Groups:
    """Join the job and build its groups.

    Works under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) and alone, on
    CUDA over NCCL and without CUDA over gloo. May be called again with another layout; the old groups are dropped.

    Raises:
        ValueError: the number of processes does not fit the layout, or ranks do not know their devices.
    """
    config.data_parallel_size(launched_world_size())
    on_cpu = cpu.install()
    if on_cpu:
        device = torch.device("cpu")
    else:
        if launched_world_size() > 1 and "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
            raise ValueError(
                f"LOCAL_RANK is not set, but {torch.cuda.device_count()} devices are visible: start with torchrun, or "
                "show each process one device (CUDA_VISIBLE_DEVICES)"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    timeout = timedelta(minutes=config.timeout_minutes)
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        if launched_world_size() == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)

    divide(config, with_host_groups=True)
    return groups_of_this_rank(config, device, control=dist.new_group(backend="gloo", timeout=timeout))


def divide(config: ParallelConfig, *, with_host_groups: bool) -> None:
    """Divide the ranks of this job as a layout says, in place of an earlier layout.

    Args:
        with_host_groups: also make those groups over gloo in which Megatron's checkpoints gather on the host.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        num_distributed_optimizer_instances=config.num_distributed_optimizer_instances,
        distributed_timeout_minutes=max(1, round(config.timeout_minutes)),
        create_gloo_process_groups=with_host_groups,
    )
    # Megatron forks this tracker around every weight initialisation. Ours draw nothing: the seed is irrelevant.
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def groups_of_this_rank(config: ParallelConfig, device: torch.device, *, control: dist.ProcessGroup) -> Groups:
    """What `divide` has made, as a value.

    Args:
        control: all ranks, over gloo.
    """
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        config=config,
        device=device,
        collection=collection,
        tp=collection.tp,
        pp=collection.pp,
        cp=collection.cp,
        dp=collection.dp,
        mp=collection.mp,
        control=control,
    )


@contextmanager
def joined(config: ParallelConfig) -> Iterator[Groups]:
    """`initialize`, and leave the job at the end.

    After an error the groups are left standing: peers may be waiting in a collective, and the launcher ends them when
    this process ends.
    """
    yield initialize(config)
    shutdown()


def shutdown() -> None:
    """Leave the job."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
