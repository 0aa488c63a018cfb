"""What an objective hands on: a noised batch for the model and one row of numbers per position for the loss.

One row loss serves every objective. For a row with target x, noised token z, keep probability α, mass c per
uniform state and two weights it is

    kl_weight·KL(q(·|x) ‖ q(·|x_θ)) + is_weight·IS(q(z|x), q(z|x_θ)),    q(v|·) = α·(·)_v + c for ordinary v,

with the remaining mass on the mask. c → 0 leaves −α·log x_θ(x), so that masked bounds and plain cross-entropy
(α = 1, c = 0, z = mask, is_weight = 0) are values of these numbers, not cases of the code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megadiff.diffusion.layout import AttentionLayout


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The numbers of the row loss, each [B, S], or [T] once flattened. Rows of zero weight cost nothing."""

    target: Tensor
    """x, int64."""
    noised: Tensor
    """z, int64."""
    alpha: Tensor
    """Keep probability, float32."""
    uniform_mass: Tensor
    """c, the probability of each single uniform state, float32."""
    kl_weight: Tensor
    """Weight of the KL divergence in the training loss, float32."""
    is_weight: Tensor
    """Weight of the Itakura-Saito divergence in the training loss, float32."""
    elbo_weight: Tensor
    """Weight of both divergences in the NELBO, float32."""
    counted: Tensor
    """Whether the row counts in the loss and its normaliser, bool."""
    any_uniform_mass: bool
    """False if `uniform_mass` is zero by construction: known on the host, so that nothing asks the device."""

    def flat(self) -> Rows:
        """Return the rows in Megatron's order, each field [T] with T = s·B + b; itself if already flat."""
        if self.target.dim() == 1:
            return self
        flat: dict[str, Any] = {
            field.name: getattr(self, field.name).t().reshape(-1)
            for field in fields(self)
            if field.name != "any_uniform_mass"
        }
        return replace(self, **flat)

    def select(self, index_S: Tensor) -> Rows:
        """Return the rows at these positions, [B, S'] each."""
        selected: dict[str, Any] = {
            field.name: getattr(self, field.name).index_select(1, index_S)
            for field in fields(self)
            if field.name != "any_uniform_mass"
        }
        return replace(self, **selected)


def cross_entropy_rows(
    target_BS: Tensor, counted_BS: Tensor, mask_id: int, *, weight_BS: Tensor, elbo_weight_BS: Tensor
) -> Rows:
    """Return the rows whose divergence is −log x_θ(x).

    Args:
        target_BS: x, int64.
        counted_BS: Whether a row counts in the loss and its normaliser, bool.
        mask_id: The mask, which is the noised token of every such row.
        weight_BS: Of the cross-entropy in the training loss, finite.
        elbo_weight_BS: Of the cross-entropy in the NELBO, finite.
    """
    one_BS = torch.ones_like(target_BS, dtype=torch.float32)
    zero_BS = torch.zeros_like(one_BS)
    return Rows(
        target=target_BS,
        noised=torch.full_like(target_BS, mask_id),
        alpha=one_BS,
        uniform_mass=zero_BS,
        kl_weight=weight_BS.float(),
        is_weight=zero_BS,
        elbo_weight=elbo_weight_BS.float(),
        counted=counted_BS,
        any_uniform_mass=False,
    )


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """One micro-batch as the model and the loss see it; S is the model's sequence length."""

    noised_BS: Tensor
    """Input ids, int64."""
    position_BS: Tensor
    """Rotary positions, int64."""
    layout: AttentionLayout
    """Who may attend to whom."""
    rows: Rows
    """One row per position, [B, S]."""
    log_snr_BS: Tensor | None = None
    """λ per position, float64, for objectives that have one."""
    soft_ids_BSK: Tensor | None = None
    """K candidate ids per position where inputs are mixtures of embeddings; None for plain ids."""
    soft_weights_BSK: Tensor | None = None
    """Weights of the candidates; None for plain ids."""

    def divided(self, index_S: Tensor, key_S: Tensor) -> NoisedBatch:
        """Return the part of one context-parallel rank.

        Args:
            index_S: Places of the rank's positions in the sequence, int64.
            key_S: Places of all positions in the order in which the group's ranks hold them, int64.
        """
        selected: dict[str, Any] = {
            field.name: getattr(self, field.name).index_select(1, index_S)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **selected, layout=self.layout.divided(index_S, key_S), rows=self.rows.select(index_S))
