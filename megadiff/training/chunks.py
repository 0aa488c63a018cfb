"""This rank's part of the model as Megatron's schedules and optimizers want it: wrapped chunks and their hooks.

A rank holds one chunk of layers, or one per virtual pipeline stage. Each is wrapped for data parallelism, which keeps
its gradients in one buffer and may reduce them, and gather updated parameters, while computation goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from megadiff.models.denoiser import Denoiser
from megadiff.parallel.groups import ParallelConfig


def wrap_chunks(
    denoisers: Sequence[Denoiser], parallel: ParallelConfig, *, before_reduction: Callable[[], None]
) -> list[DistributedDataParallel]:
    """Wrap the virtual stages of a rank for data parallelism and tell Megatron's schedules what to call when.

    Args:
        before_reduction: called when this rank's own forward and backward passes of a step are over.
    """

    def finalize(*args: Any, **kwargs: Any) -> None:
        before_reduction()
        finalize_model_grads(*args, **kwargs)

    chunks = [
        DistributedDataParallel(
            config=denoiser.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                fp8_param_gather=denoiser.config.fp8_param,
            ),
            module=denoiser,
            # Only the first chunk's backward ends a step: the others' reductions are hidden as a whole.
            disable_bucketing=index > 0,
        )
        for index, denoiser in enumerate(denoisers)
    ]
    for denoiser in denoisers:
        denoiser.config.finalize_model_grads_func = finalize
        if parallel.overlap_grad_reduce:
            # Until the last micro-batch, gradients are summed and not reduced.
            no_sync = [chunk.no_sync for chunk in chunks]
            denoiser.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return chunks


@contextmanager
def parameters_gathered(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Complete the parameters of every rank, and leave them so: for whoever reads them outside of training steps.

    With overlapped gathers, a step ends before its parameters have reached every rank: forward waits for them layer by
    layer. Nobody else does.
    """
    overlapped = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
