"""The row loss in four operations, cut exactly where tensor parallelism communicates.

For a row with target x, noised token z, keep probability α and uniform mass c, with ℓ = logit - lse over the
vocabulary without the mask, a_v = log α + ℓ_v - log c and sp = softplus, the two divergences of the bound are

    KL = (α + c)·sp(log α - log c) - α·sp(a_x) - c·Σ_v sp(a_v)               (c = 0: -α·ℓ_x)
    IS = expm1(log r) - log r,   log r = 0                                   z = mask
                                         sp(log α - log c) - sp(a_x)         z = x
                                         -sp(a_z)                            otherwise

so a row needs two reductions over the vocabulary (log-sum-exp; Σ sp(a_v) with Σ σ(a_v) beside it for the gradient)
and two of its logits. A rank that holds W of the V columns computes them in this order:

    row_statistics    local max, Σ exp, logit of x, logit of z      -> gathered over tp, merged by `merge_statistics`
    row_partial_sums  local Σ softplus(a_v), Σ sigmoid(a_v)          -> all-reduced over tp; only where c > 0
    row_loss          loss, KL, IS of each row                          replicated, T numbers
    row_gradient      gradient of the local logits                      local: backward needs no communication

These are the eager twins: the reference that native kernels of the same signatures are held against. Arithmetic is
fp32 (fp64 for fp64 logits). Padded columns and the mask never get probability. A row whose weights are both zero
returns exactly 0 and receives a zero gradient, whatever its logits are.

Source: arXiv 2512.10858, proposition 1; the stable form is derived in docs/notation.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class RowTargets(NamedTuple):
    """What the loss of each row is made of; every field has shape [T]."""

    target: Tensor
    """Clean token x, int64."""
    noised: Tensor
    """Noised token z, int64."""
    alpha: Tensor
    """Keep probability α, float."""
    uniform_mass: Tensor
    """Uniform mass per token c, float."""
    kl_weight: Tensor
    is_weight: Tensor

    @property
    def active(self) -> Tensor:
        """Rows that count, bool [T]."""
        return (self.kl_weight != 0) | (self.is_weight != 0)


class RowSums(NamedTuple):
    """Vocabulary-wide quantities of each row after the collectives; every field has shape [T]."""

    log_sum_exp: Tensor
    target_logit: Tensor
    noised_logit: Tensor
    softplus_sum: Tensor
    sigmoid_sum: Tensor


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _without_mask(logits_TW: Tensor, vocab_start: int, vocab_size: int, mask_id: int) -> Tensor:
    """Local columns in loss precision; the mask and padded columns at -inf."""
    columns = torch.arange(vocab_start, vocab_start + logits_TW.shape[1], device=logits_TW.device)
    excluded = (columns >= vocab_size) | (columns == mask_id)
    return logits_TW.to(_loss_dtype(logits_TW)).masked_fill(excluded, -torch.inf)


def _local_logit(logits_TW: Tensor, ids_T: Tensor, vocab_start: int) -> Tensor:
    """Logit of one id per row, -inf where another rank holds it."""
    local = ids_T - vocab_start
    held = (local >= 0) & (local < logits_TW.shape[1])
    logit = logits_TW.gather(1, local.clamp(0, logits_TW.shape[1] - 1)[:, None])[:, 0]
    return logit.masked_fill(~held, -torch.inf)


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
    logits = _without_mask(logits_TW, vocab_start, vocab_size, mask_id)
    maximum = logits.amax(dim=1)
    # A shard of nothing but padding has maximum -inf: subtract 0 there, so that its sum is 0 and not NaN.
    finite_maximum = torch.where(maximum == -torch.inf, 0.0, maximum)
    sum_exp = (logits - finite_maximum[:, None]).exp().sum(dim=1)
    return torch.stack(
        [maximum, sum_exp, _local_logit(logits, target_T, vocab_start), _local_logit(logits, noised_T, vocab_start)]
    )


def merge_statistics(statistics_P4T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of P vocabulary shards into log-sum-exp, target logit and noised logit, each [T]."""
    maxima, sums, target_logits, noised_logits = statistics_P4T.unbind(dim=1)
    maximum = maxima.amax(dim=0)
    log_sum_exp = maximum + (sums * (maxima - maximum).exp()).sum(dim=0).log()
    return log_sum_exp, target_logits.amax(dim=0), noised_logits.amax(dim=0)


def _log_ratio_TW(logits: Tensor, log_sum_exp: Tensor, targets: RowTargets) -> Tensor:
    """a_v = log α + ℓ_v - log c for every local column; +inf where c = 0."""
    offset = targets.alpha.to(logits.dtype).log() - targets.uniform_mass.to(logits.dtype).log()
    return logits + (offset - log_sum_exp)[:, None]


def row_partial_sums(
    logits_TW: Tensor, log_sum_exp_T: Tensor, targets: RowTargets, *, vocab_start: int, vocab_size: int, mask_id: int
) -> Tensor:
    """Local part of Σ softplus(a_v) and Σ sigmoid(a_v); 0 for rows that do not count or have no uniform mass.

    Returns:
        [2, T].
    """
    logits = _without_mask(logits_TW, vocab_start, vocab_size, mask_id)
    needed = targets.active & (targets.uniform_mass > 0)
    log_ratio = _log_ratio_TW(logits, log_sum_exp_T, targets)
    # softplus(-inf) and sigmoid(-inf) are 0: the mask and padded columns add nothing.
    sums = torch.stack([softplus(log_ratio).sum(dim=1), log_ratio.sigmoid().sum(dim=1)])
    return torch.where(needed, sums, 0.0)


def _row_terms(sums: RowSums, targets: RowTargets, mask_id: int) -> tuple[Tensor, ...]:
    """Quantities that value and gradient share: KL, log r, and σ(a_x), σ(a_z) with their c = 0 limits, each [T]."""
    dtype = sums.log_sum_exp.dtype
    alpha, mass = targets.alpha.to(dtype), targets.uniform_mass.to(dtype)
    target_log_prob = sums.target_logit - sums.log_sum_exp
    noised_log_prob = sums.noised_logit - sums.log_sum_exp
    has_mass = mass > 0
    is_mask, is_target = targets.noised == mask_id, targets.noised == targets.target

    log_signal_to_mass = alpha.log() - torch.where(has_mass, mass, 1.0).log()
    sp_signal = softplus(log_signal_to_mass)
    sp_target = softplus(log_signal_to_mass + target_log_prob)
    sp_noised = softplus(log_signal_to_mass + noised_log_prob)

    kl_div = torch.where(
        has_mass,
        (alpha + mass) * sp_signal - alpha * sp_target - mass * sums.softplus_sum,
        -alpha * target_log_prob,
    )
    # Without uniform mass a token is either kept or masked, and a kept one has likelihood ratio 1 / x_θ(x).
    log_ratio = torch.where(is_target, torch.where(has_mass, sp_signal - sp_target, -target_log_prob), -sp_noised)
    log_ratio = torch.where(is_mask, 0.0, log_ratio)
    sigmoid_target = torch.where(has_mass, (log_signal_to_mass + target_log_prob).sigmoid(), 1.0)
    sigmoid_noised = torch.where(has_mass, (log_signal_to_mass + noised_log_prob).sigmoid(), 1.0)
    return kl_div, log_ratio, sigmoid_target, torch.where(is_mask, 0.0, sigmoid_noised)


def row_loss(sums: RowSums, targets: RowTargets, *, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss and the two unweighted divergences of every row.

    Returns:
        (loss, KL, IS), each [T] in nats; 0 for rows whose weights are both zero.
    """
    kl_div, log_ratio, _, _ = _row_terms(sums, targets, mask_id)
    is_div = log_ratio.expm1() - log_ratio
    active = targets.active
    kl_div, is_div = torch.where(active, kl_div, 0.0), torch.where(active, is_div, 0.0)
    # 0 * inf: a divergence may be infinite where its own weight is zero.
    weighted_kl = torch.where(targets.kl_weight != 0, targets.kl_weight * kl_div, 0.0)
    weighted_is = torch.where(targets.is_weight != 0, targets.is_weight * is_div, 0.0)
    return weighted_kl + weighted_is, kl_div, is_div


def row_gradient(
    logits_TW: Tensor,
    sums: RowSums,
    targets: RowTargets,
    grad_loss_T: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    mask_id: int,
) -> Tensor:
    """Gradient of Σ grad_loss·loss with respect to the local logits.

    With g = ∂loss/∂ℓ the logits receive g - softmax·Σg; Σg needs only what the forward pass has reduced.

    Returns:
        [T, W] in the dtype of the logits; exactly 0 in padded columns, the mask's column and rows that do not count.
    """
    logits = _without_mask(logits_TW, vocab_start, vocab_size, mask_id)
    dtype = logits.dtype
    alpha, mass = targets.alpha.to(dtype), targets.uniform_mass.to(dtype)
    _, log_ratio, sigmoid_target, sigmoid_noised = _row_terms(sums, targets, mask_id)

    active = targets.active
    kl_scale = torch.where(active, grad_loss_T * targets.kl_weight, 0.0).to(dtype)
    is_scale = torch.where(active & (targets.is_weight != 0), grad_loss_T * targets.is_weight, 0.0).to(dtype)
    target_term = torch.where(kl_scale != 0, -kl_scale * alpha * sigmoid_target, 0.0)
    noised_term = torch.where(is_scale != 0, -is_scale * log_ratio.expm1() * sigmoid_noised, 0.0)
    mass_scale = -kl_scale * mass
    total = target_term + noised_term + mass_scale * sums.sigmoid_sum

    softmax = (logits - sums.log_sum_exp[:, None]).exp()
    grad = -softmax * total[:, None]
    spread = mass_scale != 0
    grad += torch.where(
        spread[:, None], mass_scale[:, None] * _log_ratio_TW(logits, sums.log_sum_exp, targets).sigmoid(), 0.0
    )
    for ids, term in ((targets.target, target_term), (targets.noised, noised_term)):
        local = ids - vocab_start
        held = (local >= 0) & (local < grad.shape[1])
        grad.scatter_add_(1, local.clamp(0, grad.shape[1] - 1)[:, None], torch.where(held, term, 0.0)[:, None])
    return torch.where(active[:, None], grad, 0.0).to(logits_TW.dtype)
