"""What noise looks like at each log-SNR: a mixture of uniform tokens and the mask.

    π_λ = s·u + (1 − s)·e_mask,    s = σ(g(λ)),    g(λ) = a·λ + b,    u = 1/K on each of K uniform states.

g is the log-odds of "uniform" against "mask". Masked and uniform diffusion are its limits b → −∞ and b → +∞, so
a mixing distribution is four numbers: a, b, K and the mask's id. Every derivative of π and every loss weight has
a closed form free of 0/0: the relative slopes of s and 1 − s are a·(1 − s) and −a·s.

Source: von Rütte et al. (arXiv 2512.10858), §2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixingDistribution:
    """Base of the mixing distributions; subclasses choose scale and shift.

    Raises:
        ValueError: If the vocabulary has fewer than two ids or the mask id lies outside it.
    """

    vocab_size: int
    """V: number of real ids, the mask among them."""
    mask_id: int
    """Id of the mask, in [0, V)."""
    shift: float
    """b: larger is more uniform; ±inf where only one kind of noise exists."""
    scale: float = 1.0
    """a: how fast the noise turns from masks to uniform tokens as the log-SNR grows."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(
                f"vocab_size must be at least 2 (the mask and one token), got {self.vocab_size}; "
                "pass the number of the tokenizer's ids."
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(
                f"mask_id must lie in [0, {self.vocab_size}), got {self.mask_id}; pass the tokenizer's own mask id."
            )

    def log_odds(self, log_snr: Tensor) -> Tensor:
        """Return g(λ), the log-odds of uniform noise against the mask; ±inf where only one of them exists."""
        if math.isinf(self.shift):  # at every level, infinite ones too
            return torch.full_like(log_snr, self.shift)
        return self.scale * log_snr + self.shift

    @property
    def mask_is_uniform_state(self) -> bool:
        """Whether uniform noise may draw the mask id (Duo's convention)."""
        return False

    @property
    def num_uniform_states(self) -> int:
        """K: number of ids that uniform noise can draw, V − 1 unless the mask is one of them."""
        return self.vocab_size if self.mask_is_uniform_state else self.vocab_size - 1

    def uniform_share(self, log_snr: Tensor) -> Tensor:
        """Return s, the probability that noise is uniform; shape of `log_snr`."""
        return torch.sigmoid(self.log_odds(log_snr))

    def mask_share(self, log_snr: Tensor) -> Tensor:
        """Return 1 − s without cancellation; shape of `log_snr`."""
        return torch.sigmoid(-self.log_odds(log_snr))

    def uniform_share_derivative(self, log_snr: Tensor) -> Tensor:
        """Return ds/dλ = a·s·(1 − s); shape of `log_snr`."""
        return self.scale * self.uniform_share(log_snr) * self.mask_share(log_snr)

    def probs(self, log_snr: Tensor) -> Tensor:
        """Return π_λ over the vocabulary; shape [..., V] for `log_snr` of shape [...]."""
        return self.probs_at(log_snr.unsqueeze(-1), torch.arange(self.vocab_size, device=log_snr.device))

    def probs_derivative(self, log_snr: Tensor) -> Tensor:
        """Return dπ_λ/dλ over the vocabulary, summing to 0; shape [..., V] for `log_snr` of shape [...]."""
        return self.probs_derivative_at(log_snr.unsqueeze(-1), torch.arange(self.vocab_size, device=log_snr.device))

    def probs_at(self, log_snr: Tensor, ids: Tensor) -> Tensor:
        """Return π_λ of `ids`; shape broadcast(log_snr, ids)."""
        return self._combine(self.uniform_share(log_snr), self.mask_share(log_snr), ids)

    def probs_derivative_at(self, log_snr: Tensor, ids: Tensor) -> Tensor:
        """Return dπ_λ/dλ of `ids`; shape broadcast(log_snr, ids)."""
        derivative = self.uniform_share_derivative(log_snr)
        return self._combine(derivative, -derivative, ids)

    def _combine(self, uniform: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        """Return `uniform`·u + `mask`·e_mask, evaluated at `ids`."""
        per_state = uniform / self.num_uniform_states
        on_mask = mask + per_state if self.mask_is_uniform_state else mask
        return torch.where(ids == self.mask_id, on_mask, per_state)


@dataclass(frozen=True)
class MaskedMixing(MixingDistribution):
    """All noise is the mask: s = 0.

    Any scale gives this process; the hybrid's own makes even impossible tokens' weights its limits.

    Source: Sahoo et al., "Simple and effective masked diffusion language models" (arXiv 2406.07524).
    """

    shift: float = field(default=-math.inf, init=False, repr=False)
    scale: float = field(default=1.0, init=False, repr=False)


@dataclass(frozen=True)
class UniformMixing(MixingDistribution):
    """All noise is uniform: s = 1; the scale as in `MaskedMixing`.

    Source: Schiff et al., "Simple guidance mechanisms for discrete diffusion models" (arXiv 2412.10193).
    """

    shift: float = field(default=math.inf, init=False, repr=False)
    scale: float = field(default=1.0, init=False, repr=False)
    include_mask: bool = False
    """Let uniform noise draw the mask too (K = V), as Duo (arXiv 2506.10892) does; the model never can."""

    @property
    def mask_is_uniform_state(self) -> bool:
        return self.include_mask


@dataclass(frozen=True)
class HybridMixing(MixingDistribution):
    """Masks at low log-SNR, uniform noise at high: s = σ(scale·λ + shift), even at λ = −shift/scale.

    Shifts of ±1000 are masked and uniform diffusion to machine precision. A scale outside [−1, 1] makes some
    loss weights negative: as the log-SNR falls, noise of one kind would be lost faster than masking or
    re-drawing tokens can account for, so no forward process has these marginals.

    Source: von Rütte et al. (arXiv 2512.10858), §2.4, with scale 1 and shifts −1000, −2, 0, 2, 1000.

    Raises:
        ValueError: As the base class, or if shift or scale is not finite.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.shift) and math.isfinite(self.scale)):
            raise ValueError(
                f"shift and scale must be finite, got {self.shift} and {self.scale}; "
                "for purely masked or uniform noise use MaskedMixing or UniformMixing."
            )
