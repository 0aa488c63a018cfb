"""Initial weights as a function of (seed, parameter name, global element index).

Megatron draws initial weights from per-rank generators, so another layout starts another model. Here every element
is a pure function of its canonical name (layer number inside) and its index in the unsharded tensor, and each rank
fills just the shard it holds: any layout starts from the same model, bit for bit, without communication.

Megatron's own initialisation must still run, because it also sets the tensor-parallel attributes by which gradient
norms count replicated parameters once; it runs with `draw_nothing` as its init method.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from megadiff.models.parametrization import HEAD, RESIDUAL_MATRICES, Scales
from megadiff.philox import Purpose, random_words, standard_normal

_CHUNK = 1 << 20
"""Elements drawn at once; bounds the temporary memory of the eager generator."""


def draw_nothing(tensor: Tensor) -> None:
    """Init method for Megatron modules whose values are filled afterwards: zeros.

    Transformer Engine rounds to FP8 right after it, and with recipe delayed remembers the maximum of what it has
    rounded. That must not be the maximum of whatever was in memory before.
    """
    nn.init.zeros_(tensor)


def canonical_shards(model: nn.Module) -> Iterator[ShardedTensor]:
    """The model's parameters on this rank, each with its layout-free name, global shape and offset."""
    return (shard for _, shard in named_shards(model))


def named_shards(model: nn.Module) -> Iterator[tuple[str, ShardedTensor]]:
    """The same, each after its name as a key of this rank's state: that of its module, where no names are mapped."""
    for name, value in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():  # type: ignore[operator]
        if isinstance(value, ShardedTensor):
            yield name, value


def name_ordinal(name: str) -> int:
    """A parameter's ordinal in the random stream: the first 63 bits of its name's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def global_indices(shard: ShardedTensor, start: int, stop: int) -> Tensor:
    """Row-major index, in the unsharded tensor, of the shard's own elements [start, stop); int64, on its device."""
    local = torch.arange(start, stop, device=shard.data.device)
    index, stride = torch.zeros_like(local), 1
    axes = list(zip(shard.local_shape, shard.global_offset, shard.global_shape, strict=True))
    for size, offset, extent in reversed(axes):
        index += (local % size + offset) * stride
        local, stride = local // size, stride * extent
    return index


def normal_at(seed: int, name: str, index: Tensor) -> Tensor:
    """Standard normal deviates, fp64, of the elements `index` (int64, any shape) of parameter `name`."""
    words = random_words(
        seed,
        torch.tensor(name_ordinal(name)),
        index & 0xFFFFFFFF,
        Purpose.WEIGHT,
        block=index >> 32,
    )
    return standard_normal(words[..., :2])


def standard_deviation(name: str, *, init_std: float, scales: Scales) -> float:
    """Standard deviation of a matrix's initial elements.

    Matrices that write into the residual stream have a scale of their own, for its variance must not grow with depth.
    What embeds tokens and noise levels has `init_std` itself. The head starts at zero: the first prediction is uniform
    and the first bound is log(V - 1) exactly. So does the last matrix of conditioning: at first the model is one
    without.
    """
    if name in (HEAD, "embedding.level_embedding.linear_2.weight"):
        return 0.0
    if name.endswith(RESIDUAL_MATRICES):
        return init_std * scales.residual_std
    return init_std if name.startswith("embedding.") else init_std * scales.inner_std


@torch.no_grad()
def initialize_weights(model: nn.Module, *, seed: int, init_std: float, scales: Scales) -> None:
    """Fill every parameter that this rank holds.

    Matrices are normal with `standard_deviation`; of vectors, gains are one and biases zero. On the meta device there
    is nothing to fill.
    """
    for shard in canonical_shards(model):
        if shard.data.is_meta:
            continue
        if hasattr(shard.data, "get_high_precision_init_val"):
            # A parameter in FP8 keeps what it was rounded from, which becomes the optimizer's fp32 weight: on the host,
            # where drawing billions of elements would take most of an hour.
            unrounded = shard.data.get_high_precision_init_val()
            drawn = dataclasses.replace(shard, data=torch.empty_like(unrounded, device=shard.data.device))
            _fill(drawn, seed=seed, init_std=init_std, scales=scales)
            unrounded.copy_(drawn.data)
            shard.data.copy_(drawn.data)
        else:
            _fill(shard, seed=seed, init_std=init_std, scales=scales)


def _fill(shard: ShardedTensor, *, seed: int, init_std: float, scales: Scales) -> None:
    """Fill one shard, wherever its data lies."""
    if len(shard.global_shape) == 1:
        shard.data.fill_(0.0 if shard.key.endswith(".bias") else 1.0)
        return
    std = standard_deviation(shard.key, init_std=init_std, scales=scales)
    if std == 0.0:
        shard.data.zero_()
        return
    flat = shard.data.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        stop = min(start + _CHUNK, flat.numel())
        flat[start:stop] = (std * normal_at(seed, shard.key, global_indices(shard, start, stop))).to(flat.dtype)
