"""The row loss over a vocabulary that is spread across tensor-parallel ranks.

One `autograd.Function`: were autograd to pass through the collectives, every gradient would be multiplied by the
number of ranks. Forward makes at most two collectives of T rows,

    all-gather [4, T]   maximum, Σ exp, logit of the target, logit of the noised token
    all-reduce [2, T]   Σ softplus, Σ sigmoid        only where some row has uniform mass

and backward none, because what the gradient needs is reduced beside what the value needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff import ops
from megadiff.ops.functional import RowSums, RowTargets, merge_statistics

if TYPE_CHECKING:
    from megadiff.diffusion.rows import Rows


class RowLoss(NamedTuple):
    """Loss of each row in nats, and the two unweighted divergences (not differentiable); each [T] in fp32."""

    loss_T: Tensor
    kl_T: Tensor
    is_T: Tensor


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TW: Tensor,
        targets: RowTargets,
        any_uniform_mass: bool,
        vocab_size: int,
        mask_id: int,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tp_rank, tp_size = (tp_group.rank(), tp_group.size()) if tp_group is not None else (0, 1)
        columns = {
            "vocab_start": tp_rank * logits_TW.shape[1],
            "vocab_size": vocab_size,
            "mask_id": mask_id,
        }
        statistics = ops.row_statistics(logits_TW, targets.target, targets.noised, **columns)
        gathered = statistics[None]
        if tp_size > 1:
            gathered = statistics.new_empty(tp_size, *statistics.shape)
            # all-gather over tp, [4, T]
            dist.all_gather(list(gathered.unbind()), statistics, group=tp_group)
        log_sum_exp, target_logit, noised_logit = merge_statistics(gathered)

        if any_uniform_mass:
            partial_sums = ops.row_partial_sums(logits_TW, log_sum_exp, targets, **columns)
            if tp_size > 1:
                # all-reduce SUM over tp, [2, T]
                dist.all_reduce(partial_sums, group=tp_group)
        else:
            partial_sums = log_sum_exp.new_zeros(2, log_sum_exp.shape[0])

        sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial_sums.unbind())
        loss, kl_div, is_div = ops.row_loss(sums, targets, mask_id=mask_id)
        ctx.save_for_backward(logits_TW, *sums, *targets)
        ctx.columns = columns
        ctx.mark_non_differentiable(kl_div, is_div)
        return loss, kl_div, is_div

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TW, *rest = ctx.saved_tensors
        sums, targets = RowSums(*rest[: len(RowSums._fields)]), RowTargets(*rest[len(RowSums._fields) :])
        return ops.row_gradient(logits_TW, sums, targets, grads[0], **ctx.columns), None, None, None, None, None


def vocab_loss(
    logits_TW: Tensor, rows: Rows, *, vocab_size: int, mask_id: int, tp_group: dist.ProcessGroup | None = None
) -> RowLoss:
    """Loss of every row against logits whose columns are divided over `tp_group`.

    Args:
        logits_TW: [T, W] local columns, bf16, fp16, fp32 or fp64; rank r holds columns [r·W, (r+1)·W). Columns from
            `vocab_size` on are padding.
        rows: fields [B, S], or flat [T] with T = s·B + b.
        vocab_size: number of real ids, the mask's among them.
        mask_id: id of the mask, which never gets probability.
        tp_group: ranks that share the vocabulary; None where one rank holds it all.

    Returns:
        Loss, KL and IS per row in nats, fp32 (fp64 for fp64 logits); 0 for rows of zero weight.

    Raises:
        ValueError: the number of rows differs from the number of logit rows, or the shards hold fewer columns than
            the vocabulary has.

    Source: arXiv 2512.10858, proposition 1, in the stable form of `megadiff.ops.functional`.
    """
    rows = rows.flat()
    if rows.target.shape[0] != logits_TW.shape[0]:
        raise ValueError(
            f"rows describe {rows.target.shape[0]} tokens but the logits have {logits_TW.shape[0]} rows: "
            "both must be of one micro-batch"
        )
    tp_size = tp_group.size() if tp_group is not None else 1
    if tp_size * logits_TW.shape[1] < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size} but {tp_size} shard(s) of {logits_TW.shape[1]} columns hold only "
            f"{tp_size * logits_TW.shape[1]}: pad the output layer to at least the vocabulary"
        )
    targets = RowTargets(rows.target, rows.noised, rows.alpha, rows.uniform_mass, rows.kl_weight, rows.is_weight)
    return RowLoss(*_VocabLoss.apply(logits_TW, targets, rows.any_uniform_mass, vocab_size, mask_id, tp_group))
