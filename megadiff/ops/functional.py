"""The row loss in four operations, cut exactly where tensor parallelism communicates.

For a row with target x, noised token z, keep probability α and uniform mass c, with p = softmax over the vocabulary
without the mask and k = α/c, the two divergences of the bound are

    KL = (α + c)·log1p(k) - α·log1p(k·p_x) - c·Σ_v log1p(k·p_v)             (c = 0: -α·log p_x)
    IS = expm1(log r) - log r,   log r = 0                                  z = mask
                                         log1p(k) - log1p(k·p_x)            z = x
                                         -log1p(k·p_z)                      otherwise

so a row needs two reductions over the vocabulary (log-sum-exp; Σ log1p(k·p_v), with Σ k·p_v/(1 + k·p_v) beside it
for the gradient) and two of its logits, and one exponential per element gives them all. A rank that holds W of the V
columns computes them in this order:

    row_statistics    local max, Σ exp, logit of x, logit of z      -> gathered over tp, merged by `merge_statistics`
    row_partial_sums  local Σ softplus, Σ sigmoid of log(k·p_v)      -> all-reduced over tp; only where c > 0
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


_LEAST_MASS = 1e-30
"""Uniform mass below this counts as none: it changes no digit of the loss, and α/c would overflow."""


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _live_columns(num_columns: int, vocab_start: int, vocab_size: int, mask_id: int) -> list[slice]:
    """Local columns that take part: neither padding nor the mask. The mask cuts at most one shard in two."""
    end = max(0, min(num_columns, vocab_size - vocab_start))
    mask = min(max(0, mask_id - vocab_start), end)
    after_mask = mask + 1 if vocab_start <= mask_id else mask
    return [piece for piece in (slice(0, mask), slice(after_mask, end)) if piece.start < piece.stop]


def _probabilities(logits_TW: Tensor, log_sum_exp_T: Tensor, live: list[slice]) -> Tensor:
    """exp(logit - lse) in loss precision, 0 in columns that take no part; a new tensor [T, W]."""
    probs = torch.sub(logits_TW.to(_loss_dtype(logits_TW)), log_sum_exp_T[:, None]).exp_()
    start = 0
    for piece in [*live, slice(probs.shape[1], probs.shape[1])]:
        probs[:, start : piece.start] = 0.0
        start = piece.stop
    return probs


def _local_logit(logits_TW: Tensor, ids_T: Tensor, vocab_start: int, mask_id: int) -> Tensor:
    """Logit of one id per row; -inf for the mask and where another rank holds it."""
    local = ids_T - vocab_start
    held = (local >= 0) & (local < logits_TW.shape[1]) & (ids_T != mask_id)
    logit = logits_TW.gather(1, local.clamp(0, logits_TW.shape[1] - 1)[:, None])[:, 0]
    return logit.to(_loss_dtype(logits_TW)).masked_fill(~held, -torch.inf)


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
    live = _live_columns(logits_TW.shape[1], vocab_start, vocab_size, mask_id)
    maximum = logits_TW.new_full((logits_TW.shape[0],), -torch.inf, dtype=_loss_dtype(logits_TW))
    for piece in live:
        maximum = torch.maximum(maximum, logits_TW[:, piece].amax(dim=1))
    # A shard of nothing but padding has maximum -inf and no probability: its sum is 0.
    sum_exp = _probabilities(logits_TW, maximum, live).sum(dim=1)
    return torch.stack(
        [
            maximum,
            sum_exp,
            _local_logit(logits_TW, target_T, vocab_start, mask_id),
            _local_logit(logits_TW, noised_T, vocab_start, mask_id),
        ]
    )


def merge_statistics(statistics_P4T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of P vocabulary shards into log-sum-exp, target logit and noised logit, each [T]."""
    maxima, sums, target_logits, noised_logits = statistics_P4T.unbind(dim=1)
    maximum = maxima.amax(dim=0)
    log_sum_exp = maximum + (sums * (maxima - maximum).exp()).sum(dim=0).log()
    return log_sum_exp, target_logits.amax(dim=0), noised_logits.amax(dim=0)


def _signal_to_mass(targets: RowTargets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k = α/c (0 where there is no uniform mass) and whether there is any; each [T]."""
    has_mass = targets.uniform_mass > _LEAST_MASS
    ratio = targets.alpha.to(dtype) / torch.where(has_mass, targets.uniform_mass.to(dtype), 1.0)
    return torch.where(has_mass, ratio, 0.0), has_mass


def row_partial_sums(
    logits_TW: Tensor, log_sum_exp_T: Tensor, targets: RowTargets, *, vocab_start: int, vocab_size: int, mask_id: int
) -> Tensor:
    """Local part of Σ log1p(k·p_v) and Σ k·p_v / (1 + k·p_v); 0 for rows that do not count or have no uniform mass.

    Returns:
        [2, T].
    """
    live = _live_columns(logits_TW.shape[1], vocab_start, vocab_size, mask_id)
    signal_to_mass, has_mass = _signal_to_mass(targets, _loss_dtype(logits_TW))
    odds = _probabilities(logits_TW, log_sum_exp_T, live).mul_(signal_to_mass[:, None])
    sums = torch.stack([odds.log1p().sum(dim=1), odds.div_(odds + 1.0).sum(dim=1)])
    return torch.where(targets.active & has_mass, sums, 0.0)


def _row_terms(sums: RowSums, targets: RowTargets, mask_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What value and gradient share: KL, log r, and the odds k·p over 1 + k·p of x and z (1 without mass), each [T]."""
    dtype = sums.log_sum_exp.dtype
    alpha, mass = targets.alpha.to(dtype), targets.uniform_mass.to(dtype)
    signal_to_mass, has_mass = _signal_to_mass(targets, dtype)
    is_mask, is_target = targets.noised == mask_id, targets.noised == targets.target
    target_log_prob = sums.target_logit - sums.log_sum_exp

    target_odds = signal_to_mass * target_log_prob.exp()
    noised_odds = signal_to_mass * (sums.noised_logit - sums.log_sum_exp).exp()
    sp_signal, sp_target = signal_to_mass.log1p(), target_odds.log1p()
    kl_div = torch.where(
        has_mass,
        (alpha + mass) * sp_signal - alpha * sp_target - mass * sums.softplus_sum,
        -alpha * target_log_prob,
    )
    # Without uniform mass a token is either kept or masked, and a kept one has likelihood ratio 1 / x_θ(x).
    log_ratio = torch.where(
        is_target, torch.where(has_mass, sp_signal - sp_target, -target_log_prob), -noised_odds.log1p()
    )
    log_ratio = torch.where(is_mask, 0.0, log_ratio)
    target_share = torch.where(has_mass, target_odds / (1.0 + target_odds), 1.0)
    noised_share = torch.where(has_mass, noised_odds / (1.0 + noised_odds), 1.0)
    return kl_div, log_ratio, target_share, torch.where(is_mask, 0.0, noised_share)


def row_loss(sums: RowSums, targets: RowTargets, *, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss and the two unweighted divergences of every row.

    Returns:
        (loss, KL, IS), each [T] in nats; 0 for rows whose weights are both zero.
    """
    kl_div, log_ratio, _, _ = _row_terms(sums, targets, mask_id)
    is_div = log_ratio.expm1() - log_ratio
    kl_div, is_div = torch.where(targets.active, kl_div, 0.0), torch.where(targets.active, is_div, 0.0)
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

    With g_v = ∂loss/∂log p_v the logits receive g_v - p_v·Σg. The part of g that every column has is
    -kl_weight·α·p_v/(1 + k·p_v); x and z have one term more; Σg needs only what the forward pass has reduced.

    Returns:
        [T, W] in the dtype of the logits; exactly 0 in padded columns, the mask's column and rows that do not count.
    """
    dtype = _loss_dtype(logits_TW)
    alpha = targets.alpha.to(dtype)
    signal_to_mass, has_mass = _signal_to_mass(targets, dtype)
    _, log_ratio, target_share, noised_share = _row_terms(sums, targets, mask_id)

    kl_scale = torch.where(targets.kl_weight != 0, grad_loss_T * targets.kl_weight, 0.0).to(dtype)
    is_scale = torch.where(targets.is_weight != 0, grad_loss_T * targets.is_weight, 0.0).to(dtype)
    target_term = torch.where(kl_scale != 0, -kl_scale * alpha * target_share, 0.0)
    noised_term = torch.where(is_scale != 0, -is_scale * log_ratio.expm1() * noised_share, 0.0)
    total = target_term + noised_term - kl_scale * targets.uniform_mass.to(dtype) * sums.sigmoid_sum
    everywhere = torch.where(has_mass, -kl_scale * alpha, 0.0)

    live = _live_columns(logits_TW.shape[1], vocab_start, vocab_size, mask_id)
    probs = _probabilities(logits_TW, sums.log_sum_exp, live)
    grad = (probs * signal_to_mass[:, None]).add_(1.0)
    torch.div(everywhere[:, None], grad, out=grad)
    grad.sub_(total[:, None]).mul_(probs)
    for ids, term in ((targets.target, target_term), (targets.noised, noised_term)):
        local = ids - vocab_start
        held = (local >= 0) & (local < grad.shape[1])
        grad.scatter_add_(1, local.clamp(0, grad.shape[1] - 1)[:, None], torch.where(held, term, 0.0)[:, None])
    return grad.masked_fill_(~targets.active[:, None], 0.0).to(logits_TW.dtype)
