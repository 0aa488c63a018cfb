"""The row loss as operators, cut exactly where tensor parallelism communicates; native, or else eager.

A rank that holds W of the V columns computes them in this order:

    row_statistics    local max, Σ exp, logit of x, logit of z      -> gathered over tp, merged by `merge_statistics`
    row_partial_sums  local Σ log1p(k·p_v), Σ k·p_v/(1 + k·p_v)     -> all-reduced over tp; only where c > 0
    row_loss          loss, KL, IS of each row                          replicated, T numbers
    row_gradient      gradient of the local logits                      local: backward needs no communication

and a rank that holds them all has the same in one operator, which reads each logit once: `whole_row_loss`, or
`whole_row_gradient` where a gradient is wanted too. Formulas are in `megadiff.ops.eager`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.ops import _library, eager
from megadiff.ops.rows import RowSums, RowTargets

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _is_native(tensor: Tensor) -> bool:
    return tensor.dtype in _NATIVE_DTYPES and _library.is_live(tensor.device.type)


def _in_fp32(targets: RowTargets) -> tuple[Tensor, ...]:
    """The fields in the order and types of the native operators."""
    return (targets.target, targets.noised, *(field.float() for field in targets[2:]))


def row_statistics(
    logits_TW: Tensor, target_T: Tensor, noised_T: Tensor, *, vocab_start: int, vocab_size: int, mask_id: int
) -> Tensor:
    """Local part of the log-sum-exp and of the two logits that each row needs.

    Args:
        logits_TW: columns [vocab_start, vocab_start + W) of the logits.
        target_T, noised_T: ids in [0, vocab_size).

    Returns:
        [4, T]: maximum, Σ exp(logit - maximum), logit of the target, logit of the noised token; -inf where the
        shard holds no such column.
    """
    if _is_native(logits_TW):
        return torch.ops.megadiff.row_statistics(logits_TW, target_T, noised_T, vocab_start, vocab_size, mask_id)
    return eager.row_statistics(
        logits_TW, target_T, noised_T, vocab_start=vocab_start, vocab_size=vocab_size, mask_id=mask_id
    )


def row_partial_sums(
    logits_TW: Tensor, log_sum_exp_T: Tensor, targets: RowTargets, *, vocab_start: int, vocab_size: int, mask_id: int
) -> Tensor:
    """Local part of Σ log1p(k·p_v) and Σ k·p_v / (1 + k·p_v); 0 for rows that do not count or have no uniform mass.

    Returns:
        [2, T].
    """
    if _is_native(logits_TW):
        return torch.ops.megadiff.row_partial_sums(
            logits_TW, log_sum_exp_T, *_in_fp32(targets), vocab_start, vocab_size, mask_id
        )
    return eager.row_partial_sums(
        logits_TW, log_sum_exp_T, targets, vocab_start=vocab_start, vocab_size=vocab_size, mask_id=mask_id
    )


def row_loss(sums: RowSums, targets: RowTargets, *, mask_id: int) -> Tensor:
    """Weighted loss and the two unweighted divergences of every row.

    Returns:
        [3, T]: loss, KL, IS in nats; 0 for rows whose weights are both zero.
    """
    if _is_native(sums.log_sum_exp):
        return torch.ops.megadiff.row_loss(*sums, *_in_fp32(targets), mask_id)
    return eager.row_loss(sums, targets, mask_id=mask_id)


def row_gradient(
    logits_TW: Tensor,
    sums: RowSums,
    targets: RowTargets,
    *,
    vocab_start: int,
    vocab_size: int,
    mask_id: int,
    overwrite: bool = False,
) -> Tensor:
    """Gradient of Σ loss with respect to the local logits.

    Args:
        overwrite: write it over the logits, which saves a tensor of their size.

    Returns:
        [T, W] in the dtype of the logits; exactly 0 in padded columns, the mask's column and rows that do not count.
    """
    if _is_native(logits_TW):
        numbers = (*sums, *_in_fp32(targets), vocab_start, vocab_size, mask_id)
        if not overwrite:
            return torch.ops.megadiff.row_gradient(logits_TW, *numbers)
        torch.ops.megadiff.row_gradient_(logits_TW, *numbers)
        return _overwritten(logits_TW)
    gradient = eager.row_gradient(
        logits_TW, sums, targets, vocab_start=vocab_start, vocab_size=vocab_size, mask_id=mask_id
    )
    return logits_TW.copy_(gradient) if overwrite else gradient


def whole_row_loss(logits_TV: Tensor, targets: RowTargets, *, vocab_size: int, mask_id: int) -> Tensor:
    """Loss and divergences of rows whose columns are all here.

    Returns:
        [3, T]: loss, KL, IS in nats; 0 for rows whose weights are both zero.
    """
    if _is_native(logits_TV):
        return torch.ops.megadiff.whole_row_loss(logits_TV, *_in_fp32(targets), vocab_size, mask_id)
    return eager.whole_row_loss(logits_TV, targets, vocab_size=vocab_size, mask_id=mask_id)[0]


def whole_row_gradient(
    logits_TV: Tensor, targets: RowTargets, *, vocab_size: int, mask_id: int, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss and divergences of rows whose columns are all here, and the gradient of Σ loss.

    Args:
        overwrite: write the gradient over the logits, which saves a tensor of their size.

    Returns:
        As `whole_row_loss` and `row_gradient`.
    """
    if _is_native(logits_TV):
        numbers = (*_in_fp32(targets), vocab_size, mask_id)
        if not overwrite:
            return torch.ops.megadiff.whole_row_gradient(logits_TV, *numbers)
        return torch.ops.megadiff.whole_row_gradient_(logits_TV, *numbers), _overwritten(logits_TV)
    terms, gradient = eager.whole_row_gradient(logits_TV, targets, vocab_size=vocab_size, mask_id=mask_id)
    return terms, logits_TV.copy_(gradient) if overwrite else gradient


def scale_rows_(matrix_TW: Tensor, factor_T: Tensor) -> Tensor:
    """Multiply each row by its factor, in place; the native operator does not touch rows whose factor is 1.

    The gradients above are those of Σ loss. This makes them those of Σ factor·loss, at no cost where all rows are
    simply summed, and without asking the device whether they are.
    """
    if _is_native(matrix_TW):
        torch.ops.megadiff.scale_rows_(matrix_TW, factor_T.float())
        return _overwritten(matrix_TW)
    return matrix_TW.mul_(factor_T[:, None])


def _overwritten(tensor: Tensor) -> Tensor:
    """The tensor, with autograd told that its values changed: a native operator cannot tell by itself."""
    torch.autograd.graph.increment_version(tensor)
    return tensor
