"""What objective tests share: samples, and the row loss written out in float64 from a row's numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.diffusion import Rows, Samples


def make_samples(tokens: Tensor, first_ordinal: int = 1000, **fields: Tensor | None) -> Samples:
    """Samples of consecutive ordinals, all of whose tokens count unless `fields` say otherwise."""
    fields.setdefault("counted_BL", torch.ones_like(tokens, dtype=torch.bool))
    fields.setdefault("ordinal_B", torch.arange(len(tokens)) + first_ordinal)
    return Samples(tokens_BL=tokens, **fields)  # type: ignore[arg-type]


def row_divergences(logits: Tensor, rows: Rows, mask_id: int) -> tuple[Tensor, Tensor]:
    """KL and IS of every row, float64 [B, S], with q(v|·) = α·(·)_v + c over ordinary v; logits [B, S, V]."""
    ordinary = torch.arange(logits.shape[-1]) != mask_id
    xhat = logits.double().masked_fill(~ordinary, -torch.inf).softmax(-1)
    alpha, mass = rows.alpha.double()[..., None], rows.uniform_mass.double()[..., None]
    target = torch.nn.functional.one_hot(rows.target, logits.shape[-1]).double()
    q, p = (alpha * target + mass)[..., ordinary], (alpha * xhat + mass)[..., ordinary]
    kl_div = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
    ratio = ((alpha * target + mass) / (alpha * xhat + mass)).gather(-1, rows.noised[..., None]).squeeze(-1)
    is_div = torch.where(rows.noised == mask_id, 0.0, ratio - ratio.log() - 1)
    return kl_div, is_div


def row_losses(logits: Tensor, rows: Rows, mask_id: int) -> tuple[Tensor, Tensor]:
    """Training loss and NELBO of every row, float64 [B, S]; rows of zero weight are zero, as the kernels have it."""
    kl_div, is_div = row_divergences(logits, rows, mask_id)
    loss = _weighted(rows.kl_weight, kl_div) + _weighted(rows.is_weight, is_div)
    return loss, _weighted(rows.elbo_weight, kl_div + is_div)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight.double() * value)
