"""What a run will need, told before it starts: parameters, operations, and the peak memory of every pipeline stage.

All ranks of a pipeline stage need the same memory (tensor-parallel peers hold equal shards, data-parallel ones equal
copies), so a plan has one entry per stage. Memory is what the formulas of `megadiff.models.activations` say of a
micro-batch, times the micro-batches that the schedule holds, beside what lives from step to step. The peak is the
highest of the phases of a step, never their sum. Formulas: docs/memory.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megadiff.config import TrainConfig
from megadiff.models import accounting, activations
from megadiff.models.activations import FP32, Moment, Piece, Shard

GIB = 2**30
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
MEGATRON_BUCKET_SIZE = 40_000_000
"""Elements of a bucket where gradients are reduced while backward goes on; more with more than 40 ranks."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of each rank of one pipeline stage, in bytes."""

    stage: int
    num_layers: int
    parameters: int
    """Elements on one rank."""
    weights: int
    fp8_copies: int
    """Of the matrices of the layers, by Transformer Engine, beside their weights in bf16."""
    gradients: int
    optimizer: int
    communication: int
    """What stays: the buffer that sequence parallelism gathers into, the last gradients sent to the stage before."""
    activations: int
    """At the peak of forward and backward, of all micro-batches in flight."""
    logits: int
    """At that moment: logits, which become their own gradient; or what the fused head keeps."""
    working: int
    """At that moment: what the backward of `moment` needs beside."""
    moment: str
    """The part of the model whose backward is the peak of forward and backward."""
    micro_batches: float
    """In flight at that moment, in whole models of this rank."""
    update: int
    """What is there beside while gradients are clipped and parameters updated."""
    host: int
    """In the memory of the host: what the optimizer has offloaded; not part of any peak."""

    @property
    def constant(self) -> int:
        """What lives from step to step."""
        return self.weights + self.fp8_copies + self.gradients + self.optimizer + self.communication

    @property
    def forward_backward(self) -> int:
        return self.constant + self.activations + self.logits + self.working

    @property
    def optimizer_step(self) -> int:
        return self.constant + self.update

    @property
    def peak(self) -> int:
        return max(self.forward_backward, self.optimizer_step)

    @property
    def phase(self) -> str:
        """Where the peak is."""
        return f"backward: {self.moment}" if self.forward_backward >= self.optimizer_step else "optimizer step"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need."""

    parameters: int
    """Of the whole model, padded rows of embedding and head among them."""
    flops_per_token: accounting.TokenFlops
    """See `TrainConfig.flops_per_token`."""
    tokens_per_step: int
    """Of the full global batch."""
    train_steps: int
    checkpoint_bytes: int
    stages: list[StageMemory]

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.peak)


def plan(config: TrainConfig, world_size: int, vocab_size: int) -> Plan:
    """Count everything; milliseconds, whatever the size.

    Raises:
        ValueError: the configuration does not fit together in a job of `world_size` processes.
    """
    parameters = accounting.total_parameters(config.model, vocab_size)
    return Plan(
        parameters=parameters,
        flops_per_token=config.flops_per_token(vocab_size),
        tokens_per_step=config.training.global_batch_size * config.data.sequence_length,
        train_steps=config.training.train_steps,
        checkpoint_bytes=parameters * checkpoint_bytes_per_parameter(config),
        stages=plan_memory(config, world_size, vocab_size),
    )


def plan_memory(
    config: TrainConfig, world_size: int, vocab_size: int, *, fuses_norms: bool = False
) -> list[StageMemory]:
    """Predict the memory of every pipeline stage.

    Args:
        fuses_norms: the layers are Transformer Engine's; says how parameters lie in buffers, not how much they are.

    Raises:
        ValueError: the configuration does not fit together in a job of `world_size` processes.
    """
    config.check_fp8()
    copies = [fp8_copy_bytes(config, layers) for layers in config.fp8.layers_in_fp8(config.model, config.parallel)]
    # Which kernels this machine has says nothing about the one that will run; other tensors in FP8 are counted as bf16.
    model = dataclasses.replace(config.model, attention_backend="local", transformer_impl="local")
    training = dataclasses.replace(config.training, precision=config.training.parameter_precision)
    config = dataclasses.replace(config, model=model, training=training)
    config.check(world_size)
    return [
        _stage_memory(config, world_size, vocab_size, stage, of_stage, fuses_norms)
        for stage, of_stage in enumerate(copies)
    ]


def _stage_memory(
    config: TrainConfig, world_size: int, vocab_size: int, stage: int, fp8_copies: int, fuses_norms: bool
) -> StageMemory:
    parallel, element = config.parallel, ELEMENT_BYTES[config.training.parameter_precision]
    ranks = parallel.data_parallel_size(world_size) * parallel.context_parallel_size
    num_stages, virtual_stages = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages
    shard = Shard.of(
        config.model,
        parallel,
        num_tokens=config.training.micro_batch_size * config.objective.model_length(config.data.sequence_length),
        vocab_size=vocab_size,
        element=element,
    )

    chunks, sizes, buffers = [], [], 0
    for chunk, place in enumerate(chunk_places(config, stage)):
        parameters = accounting.chunk_parameters(
            config.model, vocab_size, parallel.tensor_model_parallel_size, fuses_norms=fuses_norms, **place
        )
        chunks.append(_chunk_pieces(config, shard, **place))
        sizes += parameters
        bucket_size = max(MEGATRON_BUCKET_SIZE, 1_000_000 * ranks)
        buffers += accounting.buffer_elements(
            parameters,
            distributed_optimizer=parallel.use_distributed_optimizer,
            data_parallel_size=ranks,
            bucket_size=bucket_size if parallel.overlap_grad_reduce and chunk == 0 else None,
        )

    # Megatron's model keeps the input that it was handed last, and its schedule the gradient that it has sent last.
    received = shard.residual * (virtual_stages - (stage == 0)) if num_stages > 1 else 0
    sharing = ranks // parallel.num_distributed_optimizer_instances if parallel.use_distributed_optimizer else 1
    moment, in_flight = _peak_of_schedule(chunks, stage, num_stages, _num_micro_batches(config, world_size))
    return StageMemory(
        stage=stage,
        num_layers=config.model.layers_per_stage(parallel)[stage],
        parameters=sum(sizes),
        weights=element * buffers,
        fp8_copies=fp8_copies,
        gradients=FP32 * buffers,
        optimizer=optimizer_bytes(config, buffers // sharing),
        communication=received + (shard.gathered if parallel.sequence_parallel else 0),
        activations=moment.activations,
        logits=moment.logits,
        working=moment.working,
        moment=moment.name,
        micro_batches=in_flight,
        update=received + update_bytes(config, min(max(sizes), buffers // sharing), buffers // sharing),
        host=host_bytes(config, buffers // sharing),
    )


def chunk_places(config: TrainConfig, stage: int) -> list[dict[str, Any]]:
    """What each virtual stage of a pipeline rank holds, as the arguments of `accounting.chunk_parameters`."""
    num_stages, virtual_stages = config.parallel.pipeline_model_parallel_size, config.parallel.num_virtual_stages
    num_layers = config.model.layers_per_stage(config.parallel)[stage]
    return [
        {
            "num_layers": num_layers // virtual_stages,
            "has_embedding": stage == 0 and chunk == 0,
            "has_head": stage == num_stages - 1 and chunk == virtual_stages - 1,
        }
        for chunk in range(virtual_stages)
    ]


def fp8_copy_bytes(config: TrainConfig, num_layers: int) -> int:
    """Copies in FP8 of the matrices of so many layers, which Transformer Engine keeps for all micro-batches of a step.

    One by rows for forward and one by columns for the input's gradient: tensor cores of Hopper read FP8 in one order
    alone. Blackwell's do without the second with recipes tensorwise and delayed. With `fp8.param_gather` the two are
    the weights, and counted as such.
    """
    if config.training.precision != "fp8" or config.fp8.param_gather:
        return 0
    matrices = sum(size for size in accounting.layer_parameters(config.model) if size > config.model.hidden_size)
    return 2 * num_layers * matrices // config.parallel.tensor_model_parallel_size


def optimizer_bytes(config: TrainConfig, elements: int) -> int:
    """State on the device for the parameters that this rank updates: fp32 copies of bf16 ones, moments, average."""
    master = 0 if config.training.parameter_precision == "fp32" else FP32
    return round((1.0 - _offloaded_share(config)) * elements * (master + 2 * FP32 + _average_bytes(config)))


def host_bytes(config: TrainConfig, elements: int) -> int:
    """State on the host of what is offloaded: fp32 weight, two moments, a copy of the gradient, and the average."""
    return round(_offloaded_share(config) * elements * (4 * FP32 + _average_bytes(config)))


def _offloaded_share(config: TrainConfig) -> float:
    return config.optimizer.optimizer_offload_fraction if config.optimizer.optimizer_cpu_offload else 0.0


def _average_bytes(config: TrainConfig) -> int:
    return FP32 if config.optimizer.ema_decay is not None else 0


def update_bytes(config: TrainConfig, largest_gradient: int, elements: int) -> int:
    """What clipping and the optimizer work with, one after the other: fused Adam with nothing.

    Megatron's fallback for clipping scales a copy of one gradient after the other. Where Transformer Engine or Apex is
    installed, gradients are scaled in place, and this is a few MiB too many. LaProp makes the roots of the second
    moments, a group at a time: counted as all that this rank updates.
    """
    clipping = FP32 * largest_gradient if config.optimizer.clip_grad else 0
    roots = FP32 * elements if config.optimizer.algorithm == "laprop" else 0
    return max(clipping, roots)


def checkpoint_bytes_per_parameter(config: TrainConfig) -> int:
    """Weights, their average, and the optimizer's state: two moments, and fp32 copies of what is not fp32 itself."""
    weights = ELEMENT_BYTES[config.training.parameter_precision]
    copies = FP32 if config.training.parameter_precision == "bf16" else 0
    return weights + copies + 2 * FP32 + _average_bytes(config)


def _num_micro_batches(config: TrainConfig, world_size: int) -> int:
    """Of the largest global batch."""
    at_once = config.training.micro_batch_size * config.parallel.data_parallel_size(world_size)
    return config.training.global_batch_size // at_once


def _chunk_pieces(
    config: TrainConfig, shard: Shard, *, num_layers: int, has_embedding: bool, has_head: bool
) -> list[Piece]:
    """One micro-batch in one (virtual) pipeline stage."""
    pieces = [activations.embedding_piece(shard)] if has_embedding else []
    if has_embedding and config.model.log_snr_conditioning:
        pieces.append(activations.conditioning_piece(shard))
    pieces += activations.transformer_pieces(
        shard, config.parallel, num_layers=num_layers, input_is_received=not has_embedding
    )
    if has_head:
        fused = config.model.fused_head_loss
        pieces += activations.fused_head_pieces(shard) if fused else activations.head_pieces(shard)
    return pieces


def schedule(
    stage: int, num_stages: int, virtual_stages: int, num_micro_batches: int
) -> Iterator[tuple[Literal["forward", "backward"], int]]:
    """The passes of a pipeline rank in Megatron's order, each through one of its chunks.

    One-forward-one-backward, interleaved where there are virtual stages: some forwards ahead, then forward and backward
    in turn, then the backwards that are left. Forwards go through the chunks in order, one group of `num_stages`
    micro-batches after the other; backwards through the chunks in reverse.

    Source: `get_pp_rank_microbatches` and `get_schedule_table` of Megatron-Core 0.16.1.
    """
    total = num_micro_batches * virtual_stages
    ahead = num_stages - stage - 1
    if virtual_stages > 1:
        ahead = 2 * ahead + (virtual_stages - 1) * num_stages
    ahead = min(ahead, total)
    chunk = [place // num_stages % virtual_stages for place in range(total)]
    for place in range(total + ahead):
        if place < total:
            yield "forward", chunk[place]
        if place >= ahead:
            yield "backward", virtual_stages - 1 - chunk[place - ahead]


def _peak_of_schedule(
    chunks: list[list[Piece]], stage: int, num_stages: int, num_micro_batches: int
) -> tuple[Moment, float]:
    """The highest moment of all backwards of a step, with what other micro-batches keep; and how many are in flight."""
    keeps = [activations.kept(pieces) for pieces in chunks]
    moments = [activations.highest(pieces) for pieces in chunks]
    in_flight: Counter[int] = Counter()
    best: tuple[Moment, float] | None = None
    # By then the schedule repeats itself: it is at most two groups of micro-batches ahead, and one round takes a third.
    enough = min(num_micro_batches, 4 * num_stages)
    for direction, chunk in schedule(stage, num_stages, len(chunks), enough):
        if direction == "forward":
            in_flight[chunk] += 1
            continue
        others = sum(keeps[index] * count for index, count in in_flight.items()) - keeps[chunk]
        moment = dataclasses.replace(moments[chunk], activations=moments[chunk].activations + others)
        if best is None or moment.total > best[0].total:
            best = moment, in_flight.total() / len(chunks)
        in_flight[chunk] -= 1
    assert best is not None
    return best
