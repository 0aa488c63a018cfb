"""The row loss over a vocabulary that is spread across tensor-parallel ranks.

One `autograd.Function`: were autograd to pass through the collectives, every gradient would be multiplied by the
number of ranks. Forward computes the losses and, where a gradient is wanted, that of their sum beside them, because
a row that is being read is cheap to differentiate and expensive to read again. So only the gradient is kept, which
may take the place of the logits, and backward scales its rows by what comes in: nothing to do where losses are
simply summed. Where the vocabulary is divided, forward makes at most two collectives of T rows,

    all-gather [4, T]   maximum, Σ exp, logit of the target, logit of the noised token
    all-reduce [2, T]   Σ log1p(k·p), Σ k·p/(1 + k·p)     only where some row has uniform mass

and backward none, because what the gradient needs is reduced beside what the value needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadiff import ops
from megadiff.ops import RowSums, RowTargets

if TYPE_CHECKING:
    from megadiff.diffusion.rows import Rows


class RowLoss(NamedTuple):
    """Loss of each row in nats, and the two unweighted divergences (not differentiable); each [T] in fp32."""

    loss_T: Tensor
    kl_T: Tensor
    is_T: Tensor


def sharded_row_loss(
    logits_TW: Tensor,
    targets: RowTargets,
    *,
    any_uniform_mass: bool,
    vocab_size: int,
    mask_id: int,
    tp_group: dist.ProcessGroup | None,
    gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Losses of every row over the whole vocabulary, and this rank's part of the gradient of their sum.

    Args:
        any_uniform_mass: false if no row has uniform mass, which saves the second collective.
        gradient: whether it is wanted.
        overwrite: write it over the logits.

    Returns:
        [3, T]: loss, KL, IS in nats, the same on all of `tp_group`; the gradient [T, W] or None.
    """
    if tp_group is None or tp_group.size() == 1:
        if gradient:
            return ops.whole_row_gradient(
                logits_TW, targets, vocab_size=vocab_size, mask_id=mask_id, overwrite=overwrite
            )
        return ops.whole_row_loss(logits_TW, targets, vocab_size=vocab_size, mask_id=mask_id), None

    vocab_start = tp_group.rank() * logits_TW.shape[1]
    statistics = ops.row_statistics(
        logits_TW, targets.target, targets.noised, vocab_start=vocab_start, vocab_size=vocab_size, mask_id=mask_id
    )
    gathered = statistics.new_empty(tp_group.size() * 4, statistics.shape[1])
    # all-gather over tp, [4, T]
    dist.all_gather_into_tensor(gathered, statistics, group=tp_group)
    log_sum_exp, target_logit, noised_logit = ops.merge_statistics(gathered.unflatten(0, (tp_group.size(), 4)))

    if any_uniform_mass:
        partial_sums = ops.row_partial_sums(
            logits_TW, log_sum_exp, targets, vocab_start=vocab_start, vocab_size=vocab_size, mask_id=mask_id
        )
        # all-reduce SUM over tp, [2, T]
        dist.all_reduce(partial_sums, group=tp_group)
    else:
        partial_sums = log_sum_exp.new_zeros(2, log_sum_exp.shape[0])

    sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial_sums.unbind())
    terms_3T = ops.row_loss(sums, targets, mask_id=mask_id)
    if not gradient:
        return terms_3T, None
    return terms_3T, ops.row_gradient(
        logits_TW,
        sums,
        targets,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        mask_id=mask_id,
        overwrite=overwrite,
    )


def refuse_second_backward(ctx: Any) -> None:
    """Raise where backward comes a second time: it has scaled what it would scale again.

    Autograd's version check sees that too, but not where hooks keep saved tensors elsewhere.
    """
    if getattr(ctx, "is_spent", False):
        raise RuntimeError(
            "backward passed a second time through a loss whose gradient is scaled in place: run it anew"
        )
    ctx.is_spent = True


class _VocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TW: Tensor, losses_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        terms_3T, gradient_TW = losses_and_gradient(logits_TW)
        # Detached: where it has replaced the logits it must not drag their graph along. Versions stay shared.
        ctx.save_for_backward(gradient_TW.detach())
        loss, kl_div, is_div = terms_3T.unbind()
        ctx.mark_non_differentiable(kl_div, is_div)
        return loss, kl_div, is_div

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient_TW,) = ctx.saved_tensors
        refuse_second_backward(ctx)
        return ops.scale_rows_(gradient_TW, grads[0].contiguous()), None


def row_targets(rows: Rows) -> RowTargets:
    """The fields of flat rows that their loss is made of; numbers that a sequence shares are written out."""
    fields = (rows.target, rows.noised, rows.alpha, rows.uniform_mass, rows.kl_weight, rows.is_weight)
    return RowTargets(*(field.contiguous() for field in fields))


def check_shards(vocab_size: int, num_columns: int, tp_group: dist.ProcessGroup | None) -> None:
    """Check that the shards of an output layer hold the vocabulary.

    Raises:
        ValueError: they have fewer columns than it has ids.
    """
    tp_size = tp_group.size() if tp_group is not None else 1
    if tp_size * num_columns < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size} but {tp_size} shard(s) of {num_columns} columns hold only "
            f"{tp_size * num_columns}: pad the output layer to at least the vocabulary"
        )


def vocab_loss(
    logits_TW: Tensor,
    rows: Rows,
    *,
    vocab_size: int,
    mask_id: int,
    tp_group: dist.ProcessGroup | None = None,
    overwrite_logits: bool = False,
) -> RowLoss:
    """Loss of every row against logits whose columns are divided over `tp_group`.

    Backward may pass through the result once: the gradient is scaled in place. It has the type of the logits before
    that, so a loss scale does not keep gradients of fp16 logits from underflow; bf16 has the range of fp32.

    Args:
        logits_TW: [T, W] local columns, bf16, fp16, fp32 or fp64; rank r holds columns [r·W, (r+1)·W). Columns from
            `vocab_size` on are padding.
        rows: fields [B, S], or flat [T] with T = s·B + b.
        vocab_size: number of real ids, the mask's among them.
        mask_id: id of the mask, which never gets probability.
        tp_group: ranks that share the vocabulary; None where one rank holds it all.
        overwrite_logits: where a gradient is wanted, let it replace the logits, which must not be read afterwards:
            no memory of their size is taken. Should autograd need their values elsewhere, it refuses in backward.

    Returns:
        Loss, KL and IS per row in nats, fp32 (fp64 for fp64 logits); 0 for rows of zero weight.

    Raises:
        ValueError: the number of rows differs from the number of logit rows, or the shards hold fewer columns than
            the vocabulary has.

    Source: arXiv 2512.10858, proposition 1, in the stable form of `megadiff.ops.eager`.
    """
    rows = rows.flat()
    if rows.target.shape[0] != logits_TW.shape[0]:
        raise ValueError(
            f"rows describe {rows.target.shape[0]} tokens but the logits have {logits_TW.shape[0]} rows: "
            "both must be of one micro-batch"
        )
    check_shards(vocab_size, logits_TW.shape[1], tp_group)
    losses = partial(
        sharded_row_loss,
        targets=row_targets(rows),
        any_uniform_mass=rows.any_uniform_mass,
        vocab_size=vocab_size,
        mask_id=mask_id,
        tp_group=tp_group,
    )
    if torch.is_grad_enabled() and logits_TW.requires_grad:
        return RowLoss(*_VocabLoss.apply(logits_TW, partial(losses, gradient=True, overwrite=overwrite_logits)))
    terms_3T, _ = losses(logits_TW, gradient=False)
    return RowLoss(*terms_3T)
