"""The place of one rank in a job that is not there: groups in which nothing is sent, modules without elements.

Process groups are those of torch's fake backend, which knows sizes and ranks and returns from every collective at once;
they are divided by the code that divides real ones. Whatever is built meanwhile lies on the meta device, so a rank of a
model of any size takes a fraction of a second and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megadiff.parallel import cpu
from megadiff.parallel.groups import Groups, ParallelConfig, divide, groups_of_this_rank, shutdown

META = torch.device("meta")


class OnMeta(TorchFunctionMode):
    """Whatever names a device gets the meta device: Megatron-Core names the current CUDA device in every factory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)


@contextmanager
def imagined_rank(config: ParallelConfig, world_size: int, rank: int) -> Iterator[Groups]:
    """Be rank `rank` of an imagined job of `world_size` processes, in a process that belongs to no real one.

    Raises:
        ValueError: the layout does not fit, or this process is part of a job.
    """
    # Importing it makes the backend known to torch; only who imagines ranks needs it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config.data_parallel_size(world_size)
    if dist.is_initialized():
        raise ValueError("this process is part of a job, but ranks can be imagined only outside of one: start it alone")
    cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        divide(config, with_host_groups=False)
        with OnMeta():
            yield groups_of_this_rank(config, META, control=dist.distributed_c10d._get_default_group())
    finally:
        shutdown()
