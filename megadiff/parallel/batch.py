"""One micro-batch on every rank that needs it, and the positions of it that each rank holds.

One tensor-parallel peer reads, the others receive: file systems see 1/tp of the requests and peers cannot disagree.
Pipeline stages read for themselves, because every stage needs the tokens to rebuild the same noise. Noise itself is
never sent: it is a function of what is. Context-parallel ranks read and noise whole sequences too, then keep their own
positions of everything: the noise of a position cannot depend on who holds it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.parallel.groups import Groups


def broadcast_batch(
    batch: tuple[Tensor, Tensor, Tensor] | None, *, batch_size: int, sequence_length: int, groups: Groups
) -> tuple[Tensor, Tensor, Tensor]:
    """Share what was read over the tensor-parallel group: one broadcast of 2·B·L int64.

    Ordinals are not among it: every rank has them, on the host.

    Args:
        batch: (tokens_BL int64, loss_mask_BL bool, given_BL bool) on the reading rank; None elsewhere.

    Returns:
        The same three tensors on this rank's device.
    """
    if batch is not None:
        tokens_BL, loss_mask_BL, given_BL = batch
        packed = torch.stack([tokens_BL, loss_mask_BL + 2 * given_BL]).to(groups.device)
    else:
        packed = torch.empty((2, batch_size, sequence_length), dtype=torch.int64, device=groups.device)
    if groups.tp.size() > 1:
        # broadcast over tp, [2, B, L]
        dist.broadcast(packed, src=groups.tp_source_rank, group=groups.tp)
    tokens_BL, role_BL = packed
    return tokens_BL, role_BL % 2 == 1, role_BL >= 2


def context_parallel_index(sequence_length: int, rank: int, size: int) -> Tensor:
    """Places in a sequence of the positions that one context-parallel rank holds, int64 [S / size], on the CPU.

    The sequence is cut into 2·size chunks; rank r holds the chunks r and 2·size − 1 − r. Under causal attention all
    ranks so have equal work. Bidirectional attention would not need it, but Transformer Engine's kernels expect it.
    """
    chunk = sequence_length // (2 * size)
    first, last = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(last, last + chunk)])


def context_parallel_order(sequence_length: int, size: int) -> Tensor:
    """Places in a sequence of all positions, rank after rank: the order of what is gathered; int64 [S], on the CPU."""
    return torch.cat([context_parallel_index(sequence_length, rank, size) for rank in range(size)])
