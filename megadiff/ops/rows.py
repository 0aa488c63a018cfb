"""What the row loss is made of: the numbers of each row, and what is reduced over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

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
