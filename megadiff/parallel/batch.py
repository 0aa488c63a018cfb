"""One micro-batch on every rank that needs it.

One tensor-parallel peer reads, the others receive: file systems see 1/tp of the requests and peers cannot disagree.
Pipeline stages read for themselves, because every stage needs the tokens to rebuild the same noise. Noise itself is
never sent: it is a function of what is.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.parallel.groups import Groups


def broadcast_batch(
    batch: tuple[Tensor, Tensor, Tensor] | None, *, batch_size: int, sequence_length: int, groups: Groups
) -> tuple[Tensor, Tensor, Tensor]:
    """Share tokens, loss mask and ordinals over the tensor-parallel group: one broadcast of B·(2L + 1) int64.

    Args:
        batch: (tokens_BL int64, loss_mask_BL bool, ordinal_B int64) on the reading rank; None elsewhere.

    Returns:
        The same three tensors on this rank's device.
    """
    shape = (batch_size, 2 * sequence_length + 1)
    if batch is not None:
        tokens_BL, loss_mask_BL, ordinal_B = batch
        packed = torch.cat([tokens_BL, loss_mask_BL.long(), ordinal_B[:, None]], dim=1).to(groups.device)
    else:
        packed = torch.empty(shape, dtype=torch.int64, device=groups.device)
    if groups.tp.size() > 1:
        # broadcast over tp, [B, 2L + 1]
        dist.broadcast(packed, src=groups.tp_source_rank, group=groups.tp)
    tokens_BL, loss_mask_BL, ordinal_B1 = packed.split([sequence_length, sequence_length, 1], dim=1)
    return tokens_BL.contiguous(), loss_mask_BL.bool(), ordinal_B1[:, 0].contiguous()
