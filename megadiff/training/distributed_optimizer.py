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
from torch import Tensor

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
    """Saves and restores its state by boxes, and restores torch's Adam."""

    def _local_parameters(self) -> Iterator[tuple[str, Tensor, int, int]]:
        """The parameters of which this rank holds state: a name for the state, and which of their elements."""
        for buffer, of_dtypes in enumerate(self.gbuf_ranges):
            for buckets in of_dtypes.values():
                for bucket, ranges in enumerate(buckets):
                    for index, (parameter, range_map) in enumerate(ranges["param_map"].items()):
                        yield f"{buffer}_{bucket}_{index}", parameter, range_map["param"].start, range_map["param"].end

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """This rank's boxes of every parameter's moments and fp32 copy: {parameter: {quantity: [box, …]}}.

        Names are those of Megatron's other optimizers. Parameters that are fp32 themselves have no copy.
        """
        whole = {sharded.data: sharded for sharded in nested_values(model_sharded_state_dict)}
        state: dict[str, Any] = {}
        for name, parameter, start, end in self._local_parameters():
            model_part = whole[parameter]
            assert isinstance(model_part, ShardedTensor) and not model_part.prepend_axis_num, model_part.key
            # Data-parallel ranks hold different boxes; copies of the optimizer hold the same.
            replica_id = (*model_part.replica_id[:2], self.distributed_optimizer_instance_id)
            tensors = self._get_main_param_and_optimizer_states(parameter)
            quantities = {"exp_avg": tensors["exp_avg"], "exp_avg_sq": tensors["exp_avg_sq"]}
            if parameter.dtype != torch.float32:
                quantities["fp32_param"] = tensors["param"]
            state[name] = {
                quantity: [
                    dataclasses.replace(
                        model_part,
                        key=f"optimizer.state.{quantity}.{model_part.key}",
                        data=None if is_loading else tensor[at:][: torch.Size(size).numel()].view(size),
                        dtype=tensor.dtype,
                        local_shape=size,
                        global_offset=tuple(map(sum, zip(model_part.global_offset, first, strict=True))),
                        axis_fragmentations=None,
                        replica_id=replica_id,
                    )
                    for at, first, size in boxes(start, end, model_part.local_shape)
                ]
                for quantity, tensor in quantities.items()
            }
        return state

    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[str, Any]) -> None:
        """Put loaded boxes together again."""
        for name, parameter, _, _ in self._local_parameters():
            loaded = {
                quantity: torch.cat([box.flatten() for box in parts]) for quantity, parts in state_dict[name].items()
            }
            if "fp32_param" in loaded:
                loaded["param"] = loaded.pop("fp32_param")
            self._set_main_param_and_optimizer_states(parameter, loaded)

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        # Megatron expects a saved tensor for everything that the optimizer has. What is not saved, because it is the
        # model's own parameter or torch's count of steps, is handed over as it is.
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        not_saved = {"param": main_param, "step": self.optimizer.state[main_param]["step"]}
        super()._set_main_param_and_optimizer_states(model_param, not_saved | tensors)
