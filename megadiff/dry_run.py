"""The modules of every rank, built without memory in one process and checked before a job is started.

The code is that which trains: Megatron's process groups (over torch's fake backend), `build_denoiser`, Megatron's data
parallelism. Of each rank it tells what it holds, and three independent accounts of that must agree:

    parameters    one by one, with `megadiff.models.accounting`
    buffers       Megatron's own, for weights and gradients, with `megadiff.planning`
    shards        those of each canonical name tile the whole tensor, once: nothing is missing, nothing is held twice

Ranks of one tensor-parallel rank and pipeline stage hold copies. Of each such role the first and the last copy are
built, and must hold the same; the others differ from these in nothing but the number of the copy. That makes at most a
few dozen ranks, and seconds, of any job.

Layers and attention are those that would train here. Where Transformer Engine's are asked for and cannot be built,
local ones stand in for them: they have the same parameters. Parameters in FP8 are built in bf16: there is nothing to
round.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica

from megadiff import accelerations
from megadiff.config import TrainConfig
from megadiff.models import accounting
from megadiff.models.config import AttentionBackend, TransformerImpl
from megadiff.models.denoiser import build_denoiser
from megadiff.models.weights import canonical_shards
from megadiff.parallel.groups import ParallelConfig
from megadiff.parallel.imagined import imagined_rank
from megadiff.planning import ELEMENT_BYTES, StageMemory, chunk_places, plan_memory
from megadiff.training.chunks import wrap_chunks
from megadiff.training.trainer import DTYPES


@dataclass(frozen=True, kw_only=True)
class BuiltRank:
    """What one rank holds."""

    rank: int
    tensor: int
    """Tensor-parallel rank."""
    stage: int
    """Pipeline stage."""
    parameters: list[list[int]]
    """Elements of each parameter, in the order of the modules, by virtual stage."""
    buffer_elements: int
    """Of Megatron's buffers, padding included."""
    shards: list[ShardedTensor]
    """On the meta device."""

    def __str__(self) -> str:
        return f"rank {self.rank} (tensor {self.tensor}, pipeline stage {self.stage})"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Whose modules are built."""

    layers: TransformerImpl
    attention: AttentionBackend
    stands_in_because: str = ""
    """Why these stand in for those of Transformer Engine that are asked for; empty where they do not."""

    @classmethod
    def of(cls, config: TrainConfig) -> Kind:
        """What a configuration means on this machine.

        Raises:
            ValueError: Transformer Engine's attention is asked for, and would change the result.
        """
        model, precision = config.model, config.training.precision
        reason = accelerations.why_no_transformer_engine()
        if reason:
            asked = precision == "fp8" or "transformer_engine" in (model.transformer_impl, model.attention_backend)
            return cls(layers="local", attention="local", stands_in_because=reason if asked else "")
        # Whether this machine computes in FP8 does not matter: layers that would are built like those in bf16.
        layers = "transformer_engine" if precision == "fp8" else config.resolved_transformer_impl()
        return cls(layers=layers, attention=config.resolved_attention())

    def __str__(self) -> str:
        built = f"layers: {self.layers}, attention: {self.attention}"
        if self.stands_in_because:
            built += f", in place of Transformer Engine's, which cannot be built here ({self.stands_in_because})"
        return built


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was built and found to agree."""

    kind: Kind
    world_size: int
    ranks: int
    """That were built."""
    roles: int
    """Tensor-parallel ranks x pipeline stages."""
    tensors: int
    """Canonical names."""
    parameters: int
    """Elements of all of them."""

    def __str__(self) -> str:
        return (
            f"built {self.ranks} of {self.world_size} ranks without memory, the first and the last copy of "
            f"{self.roles} role(s) (tensor x pipeline): {self.tensors} tensors of {self.parameters:,} elements are "
            f"tiled once, and parameters and buffers of each rank are those of this plan\n  {self.kind}"
        )


def dry_run(config: TrainConfig, world_size: int, vocab_size: int) -> DryRun:
    """Build a job's modules, rank by rank, and check them.

    Raises:
        ValueError: the configuration does not fit in a job of `world_size` processes, or what was built is not what
            was counted.
    """
    kind = Kind.of(config)
    fuses_norms = kind.layers == "transformer_engine"
    planned = plan_memory(config, world_size, vocab_size, fuses_norms=fuses_norms)
    built = [_build(config, kind, world_size, rank, vocab_size) for rank in ranks_to_build(config.parallel, world_size)]
    for rank in built:
        check_sizes(rank, config, planned[rank.stage], vocab_size, fuses_norms=fuses_norms)
    roles = check_copies(built)
    shards = [shard for rank in built for shard in rank.shards]
    tensors, parameters = check_tiling(shards)
    expected = accounting.total_parameters(config.model, vocab_size)
    if parameters != expected:
        raise ValueError(
            f"all ranks together hold {parameters:,} parameters, but the model has {expected:,}: report this layout"
        )
    return DryRun(
        kind=kind, world_size=world_size, ranks=len(built), roles=roles, tensors=tensors, parameters=parameters
    )


def ranks_to_build(parallel: ParallelConfig, world_size: int) -> list[int]:
    """The first and the last copy of each role.

    Tensor-parallel peers are neighbours and stages lie furthest apart, the copies between: Megatron's order. Were it
    another one, some role would not be built, and its tensors not be tiled.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    copies = world_size // (tensor * stages)
    places = itertools.product(range(stages), sorted({0, copies - 1}), range(tensor))
    return [peer + tensor * (copy + copies * stage) for stage, copy, peer in places]


def _build(config: TrainConfig, kind: Kind, world_size: int, rank: int, vocab_size: int) -> BuiltRank:
    fp8 = None if config.training.precision == "fp8" and kind.layers == "local" else config.used_fp8
    with imagined_rank(config.parallel, world_size, rank) as groups:
        denoisers = build_denoiser(
            config.model,
            groups,
            vocab_size=vocab_size,
            sequence_length=config.objective.model_length(config.data.sequence_length),
            seed=config.training.seed,
            dtype=DTYPES[config.training.parameter_precision],
            attention=kind.attention,
            transformer_impl=kind.layers,
            fp8=fp8 and dataclasses.replace(fp8, param_gather=False),
        )
        parameters = [[parameter.numel() for parameter in denoiser.parameters()] for denoiser in denoisers]
        shards = [shard for denoiser in denoisers for shard in canonical_shards(denoiser)]
        chunks = wrap_chunks(denoisers, config.parallel, before_reduction=lambda: None)
        return BuiltRank(
            rank=rank,
            tensor=groups.tp.rank(),
            stage=groups.pp.rank(),
            parameters=parameters,
            buffer_elements=sum(buffer.numel for chunk in chunks for buffer in chunk.buffers),
            shards=shards,
        )


def check_sizes(
    built: BuiltRank, config: TrainConfig, planned: StageMemory, vocab_size: int, *, fuses_norms: bool = False
) -> None:
    """Compare parameters and buffers of one rank with those that are counted.

    Raises:
        ValueError: they differ.
    """
    tensor_parallel_size = config.parallel.tensor_model_parallel_size
    counted = [
        accounting.chunk_parameters(config.model, vocab_size, tensor_parallel_size, fuses_norms=fuses_norms, **place)
        for place in chunk_places(config, built.stage)
    ]
    if built.parameters != counted:
        found, expected = (sum(map(sum, sizes)) for sizes in (built.parameters, counted))
        raise ValueError(
            f"{built} holds {found:,} parameters, but {expected:,} (or the same in another order) are counted by "
            "megadiff.models.accounting: report this layout"
        )
    planned_elements = planned.weights // ELEMENT_BYTES[config.training.parameter_precision]
    if built.buffer_elements != planned_elements:
        raise ValueError(
            f"{built} has buffers of {built.buffer_elements:,} elements, but the plan says {planned_elements:,}: "
            "report this layout"
        )


def check_copies(built: Iterable[BuiltRank]) -> int:
    """Compare the ranks of each role with each other, and return the number of roles.

    Raises:
        ValueError: two of one role hold different shards.
    """
    first: dict[tuple[int, int], BuiltRank] = {}
    for rank in built:
        other = first.setdefault((rank.tensor, rank.stage), rank)
        if [_place(shard) for shard in rank.shards] != [_place(shard) for shard in other.shards]:
            raise ValueError(f"{rank} holds other shards than {other}, of which it is a copy: report this layout")
    return len(first)


def check_tiling(shards: Iterable[ShardedTensor]) -> tuple[int, int]:
    """Check that the shards of each name, copies left out, fill the whole tensor without overlap.

    Returns:
        Number of names, and elements of all whole tensors.

    Raises:
        ValueError: an element is missing or held twice, or shards do not agree on the whole.
    """
    by_name: dict[str, list[ShardedTensor]] = defaultdict(list)
    whole: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        shape = whole.setdefault(shard.key, shard.global_shape)
        if shard.global_shape != shape:
            raise ValueError(
                f"a shard of {shard.key} says that the whole is {shard.global_shape}, another one {shape}: report this "
                "layout"
            )
        if is_main_replica(shard.replica_id):
            by_name[shard.key].append(shard)
    for name, shape in whole.items():
        held = sum(math.prod(shard.local_shape) for shard in by_name[name])
        if held != math.prod(shape) or any(itertools.starmap(_overlap, itertools.combinations(by_name[name], 2))):
            boxes = ", ".join(_box(shard) for shard in by_name[name]) or "nothing"
            raise ValueError(
                f"the shards of {name} do not tile {shape} exactly once, but hold {boxes}: report this layout"
            )
    return len(whole), sum(map(math.prod, whole.values()))


def _place(shard: ShardedTensor) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return shard.key, shard.global_shape, shard.global_offset, shard.local_shape


def _ranges(shard: ShardedTensor) -> Iterator[tuple[int, int]]:
    """Start and end on each axis."""
    return ((start, start + size) for start, size in zip(shard.global_offset, shard.local_shape, strict=True))


def _box(shard: ShardedTensor) -> str:
    return "[" + ", ".join(f"{start}:{end}" for start, end in _ranges(shard)) + "]"


def _overlap(one: ShardedTensor, other: ShardedTensor) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(_ranges(one), _ranges(other), strict=True))
