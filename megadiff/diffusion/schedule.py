"""The noise schedule: which log-SNR belongs to which time, and how densely times visit it.

Everything else in this room is a function of the log-SNR λ = log(α / (1 − α)) alone; time appears here only.
The schedule is the linear one, α = 1 − t, cut to a finite range of λ, so that no weight diverges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@dataclass(frozen=True)
class NoiseSchedule:
    """The linear schedule restricted to a range of log-SNR.

    Time 0 is the clean end, time 1 the noisy one, and α falls linearly between them.

    Source: von Rütte et al., "Scaling behavior of discrete diffusion language models" (arXiv 2512.10858),
    §2.3.

    Raises:
        ValueError: If the bounds are not finite or not in increasing order.
    """

    min_log_snr: float = -9.0
    """log-SNR of pure noise, reached at time 1."""
    max_log_snr: float = 9.0
    """log-SNR of nearly clean data, reached at time 0."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_log_snr) and math.isfinite(self.max_log_snr)):
            raise ValueError(
                f"min_log_snr and max_log_snr must be finite, got {self.min_log_snr} and {self.max_log_snr}; "
                "the published range is -9 to 9."
            )
        if self.min_log_snr >= self.max_log_snr:
            raise ValueError(
                f"min_log_snr must be below max_log_snr, got {self.min_log_snr} and {self.max_log_snr}; "
                "the noisy end comes first."
            )

    @cached_property
    def mass(self) -> float:
        """σ(max_log_snr) − σ(min_log_snr), free of cancellation: `log_snr_pdf` integrated over the range."""
        span = -math.expm1(self.min_log_snr - self.max_log_snr)
        return span * _sigmoid(self.max_log_snr) * _sigmoid(-self.min_log_snr)

    def log_snr(self, time: Tensor) -> Tensor:
        """Return the log-SNR at `time`; same shape and dtype.

        Times lie in [0, 1]; the result is clamped to the schedule's range. α and 1 − α are built separately,
        so both ends keep their relative precision.
        """
        alpha = _sigmoid(self.min_log_snr) + (1.0 - time) * self.mass
        one_minus_alpha = _sigmoid(-self.max_log_snr) + time * self.mass
        return (alpha.log() - one_minus_alpha.log()).clamp(self.min_log_snr, self.max_log_snr)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the schedule passes `log_snr` (inside the range); same shape and dtype."""
        alpha_gap = -torch.expm1(log_snr - self.max_log_snr) * torch.sigmoid(-log_snr)
        return alpha_gap * (_sigmoid(self.max_log_snr) / self.mass)

    def log_snr_pdf(self, log_snr: Tensor) -> Tensor:
        """Return p(λ) = σ(λ)·σ(−λ) = dα/dλ, un-normalised as published; its integral is `mass`."""
        return torch.sigmoid(log_snr) * torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class LogLinearSchedule(NoiseSchedule):
    """α = 1 − (1 − ε)·t for times t in [ε, 1]: the linear schedule between other ends, as MDLM and Duo publish it.

    Its density is that of t over [0, 1], so that α/p is exactly −α'/(1 − α) = 1/t.

    Source: Sahoo et al. (arXiv 2406.07524; arXiv 2602.15014).

    Raises:
        ValueError: If epsilon does not lie in (0, 0.5).
    """

    min_log_snr: float = field(init=False, repr=False)
    max_log_snr: float = field(init=False, repr=False)
    epsilon: float = 1e-3
    """ε, the smallest time, and the keep probability at time 1."""

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must lie in (0, 0.5), got {self.epsilon}; published is 1e-3.")
        noisiest = self.epsilon
        cleanest_rest = (1.0 - self.epsilon) * self.epsilon
        object.__setattr__(self, "min_log_snr", math.log(noisiest / (1.0 - noisiest)))
        object.__setattr__(self, "max_log_snr", math.log((1.0 - cleanest_rest) / cleanest_rest))
        super().__post_init__()

    def log_snr_pdf(self, log_snr: Tensor) -> Tensor:
        """Return p(λ) = σ(λ)·σ(−λ)/(1 − ε) = −dt/dλ, un-normalised: t is drawn from [ε, 1]."""
        return super().log_snr_pdf(log_snr) / (1.0 - self.epsilon)
