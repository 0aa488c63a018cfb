"""Eager twins of the native row-loss operators: what kernels of the same signatures are held against.

For a row with target x, noised token z, keep probability α and uniform mass c, with p = softmax over the vocabulary
without the mask and k = α/c, the two divergences of the bound are

    KL = α·log((1 + k)/(1 + y_x)) + c·(log1p(k) - Σ_v log1p(y_v)),   y_v = k·p_v         (c = 0: -α·log p_x)
    IS = r - 1 - log r,    r = 1 | (1 + k)/(1 + y_x) | 1/(1 + y_z)    for z = mask | z = x | otherwise

so a row needs two reductions over the vocabulary (log-sum-exp; Σ log1p(y_v), with Σ y_v/(1 + y_v) beside it
for the gradient) and two of its logits. Arithmetic is fp32 (fp64 for fp64 logits). Padded columns and the mask never
get probability. A row whose weights are both zero returns exactly 0 and receives a zero gradient, whatever its logits
are. Gradients are those of Σ loss, whatever becomes of the losses: see `functional.scale_rows_`.

Source: arXiv 2512.10858, proposition 1; the stable form is derived in docs/notation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.ops.rows import RowSums, RowTargets

_LEAST_MASS = 1e-30
"""Uniform mass below this counts as none, so that α/c fits a float: KL keeps its digits while p_x > 1e-30."""


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


def _local_logit(logits_TW: Tensor, ids_T: Tensor, vocab_start: int, vocab_size: int, mask_id: int) -> Tensor:
    """Logit of one id per row; -inf for the mask and where another rank holds it."""
    local = ids_T - vocab_start
    held = (local >= 0) & (local < min(logits_TW.shape[1], vocab_size - vocab_start)) & (ids_T != mask_id)
    logit = logits_TW.gather(1, local.clamp(0, logits_TW.shape[1] - 1)[:, None])[:, 0]
    return logit.to(_loss_dtype(logits_TW)).masked_fill(~held, -torch.inf)


def row_statistics(
    logits_TW: Tensor, target_T: Tensor, noised_T: Tensor, *, vocab_start: int, vocab_size: int, mask_id: int
) -> Tensor:
    """Twin of `functional.row_statistics`: maximum, Σ exp(logit - maximum), the logits of x and z; [4, T]."""
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
            _local_logit(logits_TW, target_T, vocab_start, vocab_size, mask_id),
            _local_logit(logits_TW, noised_T, vocab_start, vocab_size, mask_id),
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
    """Twin of `functional.row_partial_sums`: Σ log1p(k·p_v) and Σ k·p_v / (1 + k·p_v); [2, T]."""
    live = _live_columns(logits_TW.shape[1], vocab_start, vocab_size, mask_id)
    signal_to_mass, has_mass = _signal_to_mass(targets, _loss_dtype(logits_TW))
    odds = _probabilities(logits_TW, log_sum_exp_T, live).mul_(signal_to_mass[:, None])
    sums = torch.stack([odds.log1p().sum(dim=1), odds.div_(odds + 1.0).sum(dim=1)])
    return torch.where(targets.active & has_mass, sums, 0.0)


def _row_terms(sums: RowSums, targets: RowTargets, mask_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What value and gradient share, each [T]: KL, r - 1, log r, and y/(1 + y) of x and z (1 without mass)."""
    dtype = sums.log_sum_exp.dtype
    alpha, mass = targets.alpha.to(dtype), targets.uniform_mass.to(dtype)
    signal_to_mass, has_mass = _signal_to_mass(targets, dtype)
    is_mask, is_target = targets.noised == mask_id, targets.noised == targets.target
    target_log_prob = sums.target_logit - sums.log_sum_exp

    target_odds = signal_to_mass * target_log_prob.exp()
    noised_odds = signal_to_mass * (sums.noised_logit - sums.log_sum_exp).exp()
    target_share = torch.where(has_mass, target_odds / (1.0 + target_odds), 1.0)
    noised_share = torch.where(has_mass, noised_odds / (1.0 + noised_odds), 1.0)

    # The likelihood ratio of a kept token, (1 + k)/(1 + y_x), less 1: no logarithms that cancel. Without uniform mass
    # a token is either kept or masked, and a kept one has the ratio 1/p_x.
    kept_ratio_minus_one = (signal_to_mass - target_odds) / (1.0 + target_odds)
    kept_log_ratio = kept_ratio_minus_one.log1p()
    kl_div = torch.where(
        has_mass,
        alpha * kept_log_ratio + mass * (signal_to_mass.log1p() - sums.softplus_sum),
        -alpha * target_log_prob,
    )
    kept_ratio_minus_one = torch.where(has_mass, kept_ratio_minus_one, torch.expm1(-target_log_prob))
    kept_log_ratio = torch.where(has_mass, kept_log_ratio, -target_log_prob)

    ratio_minus_one = torch.where(is_target, kept_ratio_minus_one, torch.where(is_mask, 0.0, -noised_share))
    log_ratio = torch.where(is_target, kept_log_ratio, torch.where(is_mask, 0.0, -noised_odds.log1p()))
    return kl_div, ratio_minus_one, log_ratio, target_share, noised_share


def row_loss(sums: RowSums, targets: RowTargets, *, mask_id: int) -> Tensor:
    """Twin of `functional.row_loss`: loss, KL, IS; [3, T]."""
    kl_div, ratio_minus_one, log_ratio, _, _ = _row_terms(sums, targets, mask_id)
    is_div = ratio_minus_one - log_ratio
    kl_div, is_div = torch.where(targets.active, kl_div, 0.0), torch.where(targets.active, is_div, 0.0)
    # 0 * inf: a divergence may be infinite where its own weight is zero.
    weighted_kl = torch.where(targets.kl_weight != 0, targets.kl_weight * kl_div, 0.0)
    weighted_is = torch.where(targets.is_weight != 0, targets.is_weight * is_div, 0.0)
    return torch.stack([weighted_kl + weighted_is, kl_div, is_div])


def row_gradient(
    logits_TW: Tensor, sums: RowSums, targets: RowTargets, *, vocab_start: int, vocab_size: int, mask_id: int
) -> Tensor:
    """Twin of `functional.row_gradient`: gradient of Σ loss with respect to the local logits; [T, W].

    With g_v = ∂loss/∂log p_v the logits receive g_v - p_v·Σg. The part of g that every column has is
    -kl_weight·α·p_v/(1 + k·p_v); x and z have one term more; Σg needs only what the forward pass has reduced.
    """
    dtype = _loss_dtype(logits_TW)
    alpha = targets.alpha.to(dtype)
    signal_to_mass, has_mass = _signal_to_mass(targets, dtype)
    _, ratio_minus_one, _, target_share, noised_share = _row_terms(sums, targets, mask_id)

    kl_weight, is_weight = targets.kl_weight.to(dtype), targets.is_weight.to(dtype)
    target_term = torch.where(kl_weight != 0, -kl_weight * alpha * target_share, 0.0)
    noised_term = torch.where(is_weight != 0, -is_weight * ratio_minus_one * noised_share, 0.0)
    total = target_term + noised_term - kl_weight * targets.uniform_mass.to(dtype) * sums.sigmoid_sum
    everywhere = torch.where(has_mass, -kl_weight * alpha, 0.0)

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


def whole_row_loss(logits_TV: Tensor, targets: RowTargets, *, vocab_size: int, mask_id: int) -> tuple[Tensor, RowSums]:
    """Twin of `functional.whole_row_loss`: loss, KL, IS, [3, T]; and the sums that a gradient is made of."""
    columns = {"vocab_start": 0, "vocab_size": vocab_size, "mask_id": mask_id}
    statistics = row_statistics(logits_TV, targets.target, targets.noised, **columns)
    log_sum_exp, target_logit, noised_logit = merge_statistics(statistics[None])
    partial_sums = row_partial_sums(logits_TV, log_sum_exp, targets, **columns)
    sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial_sums.unbind())
    return row_loss(sums, targets, mask_id=mask_id), sums


def whole_row_gradient(
    logits_TV: Tensor, targets: RowTargets, *, vocab_size: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Twin of `functional.whole_row_gradient`: loss, KL, IS, [3, T], and the gradient of Σ loss, [T, V]."""
    terms, sums = whole_row_loss(logits_TV, targets, vocab_size=vocab_size, mask_id=mask_id)
    return terms, row_gradient(logits_TV, sums, targets, vocab_start=0, vocab_size=vocab_size, mask_id=mask_id)
