"""Megatron's distributed optimizer, with state that is saved as it lies and opens on any layout.

The optimizer's state is one flat buffer per model chunk, cut into equal ranges over data-parallel ranks without regard
to where a parameter begins. A range of a flattened matrix is at most three boxes of it: the end of a row, whole rows,
the beginning of a row. Each rank saves its boxes under the parameter's name, with their place in the whole, and asks
for its boxes on loading. Nothing is gathered, and every rank reads and writes its share alone.

Megatron 0.16.1 gathers every buffer on every rank instead, 12 bytes per parameter of the model-parallel share, and
loses track where a buffer has several buckets with padding between them, as with overlapped gradient reduction: it
saves the moments of one parameter under the name of its neighbour. Files are the same otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

from megadiff.training.adam import MOMENTS
from megadiff.training.offload import OffloadedAdam

Box = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Of a range: where the box begins in it; of the matrix: the first element, and the shape."""


def boxes(start: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut elements `start` to `end` (exclusive) of a flattened vector or matrix into boxes of it, in order."""
    if len(shape) == 1:
        yield 0, (start,), (end - start,)
        return
    _, width = shape
    at = start
    while at < end:
        row, column = divmod(at, width)
        if column or end - at < width:
            length = min(end - at, width - column)
            yield at - start, (row, column), (1, length)
            at += length
        else:
            rows = (end - at) // width
            yield at - start, (row, 0), (rows, width)
            at += rows * width


class ReshardableDistributedOptimizer(DistributedOptimizer):
    """Saves and restores fp32 weights and moments by boxes, whatever Adam computes with them.

    Megatron's own versions of these methods also read and write step counts, in places that depend on which libraries
    can be imported, so that a checkpoint from one machine could not be opened on another.
    """

    def main_weights(self) -> dict[Tensor, Tensor]:
        """Model parameter -> this rank's part of the flattened fp32 weight that is updated in its place."""
        weights = {}
        for parameter, (group, order) in self.model_param_group_index_map.items():
            weight = self.param_groups[group]["params"][order]
            is_offloaded = isinstance(self.optimizer, OffloadedAdam)
            weights[parameter] = self.optimizer.main_weight(weight) if is_offloaded else weight
        return weights

    def sharded_parts(
        self, model_state: dict[str, Any], prefix: str, parts: dict[Tensor, Tensor], *, is_loading: bool
    ) -> dict[str, list[ShardedTensor]]:
        """This rank's boxes of one quantity of every parameter, to be saved or loaded.

        Args:
            model_state: the sharded state of all model chunks of this rank.
            prefix: before the parameters' names in the checkpoint.
            parts: model parameter -> this rank's part of the flattened quantity.
        """
        whole = {sharded.data: sharded for sharded in nested_values(model_state)}
        state = {}
        for name, parameter, start, end in self._local_parameters():
            model_part, part = whole[parameter], parts[parameter].detach()
            assert isinstance(model_part, ShardedTensor) and not model_part.prepend_axis_num, model_part.key
            state[name] = [
                dataclasses.replace(
                    model_part,
                    key=f"{prefix}.{model_part.key}",
                    data=None if is_loading else part[at:][: torch.Size(size).numel()].view(size),
                    dtype=part.dtype,
                    local_shape=size,
                    global_offset=tuple(map(sum, zip(model_part.global_offset, first, strict=True))),
                    axis_fragmentations=None,
                    # Data-parallel ranks hold different boxes; copies of the optimizer hold the same.
                    replica_id=(*model_part.replica_id[:2], self.distributed_optimizer_instance_id),
                )
                for at, first, size in boxes(start, end, model_part.local_shape)
            ]
        return state

    @torch.no_grad()
    def load_parts(self, parts: dict[Tensor, Tensor], loaded: dict[str, list[Tensor]]) -> None:
        """Put loaded boxes together again, in `parts`."""
        for name, parameter, _, _ in self._local_parameters():
            parts[parameter].copy_(torch.cat([box.flatten() for box in loaded[name]]))

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """This rank's boxes of every parameter's moments and fp32 copy: {quantity: {parameter: [box, …]}}.

        Names are those of Megatron's other optimizers, so that a run may go on with either kind.
        """
        return {
            quantity: self.sharded_parts(
                model_sharded_state_dict, f"optimizer.state.{quantity}", parts, is_loading=is_loading
            )
            for quantity, parts in self._quantities().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """What tells the groups apart, and nothing of their settings: those are the run's."""
        groups = [{name: group[name] for name in param_group_identifier_keys} for group in self.param_groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and fp32 copies into the state that is there; the model is loaded before."""
        quantities, weights = self._quantities(), self.main_weights()
        for quantity, loaded in state_dict.get("param_state", {}).items():
            self.load_parts(quantities[quantity], loaded)
        for _, parameter, start, end in self._local_parameters():
            if parameter.dtype == torch.float32:
                weights[parameter].detach().copy_(parameter.detach().flatten()[start:end])

    def _quantities(self) -> dict[str, dict[Tensor, Tensor]]:
        """All that a checkpoint holds of this optimizer, by name and model parameter: tensors of this rank's state."""
        state = {
            parameter: self.optimizer.state[self.param_groups[group]["params"][order]]
            for parameter, (group, order) in self.model_param_group_index_map.items()
        }
        moments = {name: {parameter: of[name] for parameter, of in state.items()} for name in MOMENTS}
        # An fp32 parameter is saved with the model: what is updated in its place is itself, or its copy on the host.
        copies = {
            parameter: copy for parameter, copy in self.main_weights().items() if parameter.dtype != torch.float32
        }
        return {**moments, "fp32_param": copies} if copies else moments

    def _local_parameters(self) -> Iterator[tuple[str, Tensor, int, int]]:
        """The parameters of which this rank holds state: a name for the state, and which of their elements."""
        for buffer, of_dtypes in enumerate(self.gbuf_ranges):
            for buckets in of_dtypes.values():
                for bucket, ranges in enumerate(buckets):
                    for index, (parameter, range_map) in enumerate(ranges["param_map"].items()):
                        yield f"{buffer}_{bucket}_{index}", parameter, range_map["param"].start, range_map["param"].end
