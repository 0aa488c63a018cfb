"""The noise schedule: which log-SNR belongs to which time, and how densely times visit it.

Everything else in this room is a function of the log-SNR λ = log(α / (1 − α)) alone; time appears here only.
Schedules are cut to a finite range of λ, so that no weight diverges: time 0 is the cleanest level of the range, time 1
the noisiest, and training draws times uniformly. `NoiseSchedule` is the linear one; others share its interface:

    linear       α = 1 − t
    cosine       α = cos²(π·t/2) = ½ + ½·cos(π·t)
    tabulated    α linear between given values, hence any schedule that falls
    log-linear   the linear one on the range that MDLM and Duo publish

The bound is an integral over λ and does not know the schedule. Densities are scaled to the same integral, `mass`, that
of the published un-normalised one: so not even what is reported changes, only the variance of its estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property

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

    @property
    def mass(self) -> float:
        """`log_snr_pdf` integrated over the range: σ(max_log_snr) − σ(min_log_snr), just below 1."""
        return self._alpha_span

    @cached_property
    def _alpha_span(self) -> float:
        """σ(max_log_snr) − σ(min_log_snr), free of cancellation."""
        span = -math.expm1(self.min_log_snr - self.max_log_snr)
        return span * _sigmoid(self.max_log_snr) * _sigmoid(-self.min_log_snr)

    def log_snr(self, time: Tensor) -> Tensor:
        """Return the log-SNR at `time`; same shape and dtype.

        Times lie in [0, 1]; the result is clamped to the schedule's range. α and 1 − α are built separately,
        so both ends keep their relative precision.
        """
        alpha = _sigmoid(self.min_log_snr) + (1.0 - time) * self._alpha_span
        one_minus_alpha = _sigmoid(-self.max_log_snr) + time * self._alpha_span
        return (alpha.log() - one_minus_alpha.log()).clamp(self.min_log_snr, self.max_log_snr)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the schedule passes `log_snr` (inside the range); same shape and dtype."""
        alpha_gap = -torch.expm1(log_snr - self.max_log_snr) * torch.sigmoid(-log_snr)
        return alpha_gap * (_sigmoid(self.max_log_snr) / self._alpha_span)

    def log_snr_pdf(self, log_snr: Tensor) -> Tensor:
        """Return p(λ) = σ(λ)·σ(−λ) = dα/dλ, un-normalised as published; its integral is `mass`."""
        return torch.sigmoid(log_snr) * torch.sigmoid(-log_snr)


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """α = cos²(φ) with φ linear in time: levels near both ends of the range are visited more often.

    Over the whole line φ = π·t/2 and α = ½ + ½·cos(π·t); a range of λ cuts a piece out of that.

    Source: the sampling grid of von Rütte et al. (arXiv 2512.10858); Nichol and Dhariwal (arXiv 2102.09672).

    Raises:
        ValueError: As the linear schedule.
    """

    def log_snr(self, time: Tensor) -> Tensor:
        """Return λ = 2·log cot φ at `time` in [0, 1]; same shape and dtype.

        φ and π/2 − φ are built separately, so both ends keep their relative precision.
        """
        from_clean = math.atan(math.exp(-self.max_log_snr / 2)) + time * self._angle_span
        from_noise = math.atan(math.exp(self.min_log_snr / 2)) + (1.0 - time) * self._angle_span
        log_snr = 2.0 * (from_noise.sin().log() - from_clean.sin().log())
        return log_snr.clamp(self.min_log_snr, self.max_log_snr)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the schedule passes `log_snr` (inside the range); same shape and dtype."""
        # tan of the difference of two angles, which loses nothing where they nearly agree.
        gap = -torch.expm1((log_snr - self.max_log_snr) / 2)
        return torch.atan(gap / ((log_snr / 2).exp() + math.exp(-self.max_log_snr / 2))) / self._angle_span

    def log_snr_pdf(self, log_snr: Tensor) -> Tensor:
        """Return p(λ) ∝ √(σ(λ)·σ(−λ)); its integral is `mass`."""
        scale = self.mass / (2.0 * self._angle_span)
        return scale * (torch.sigmoid(log_snr) * torch.sigmoid(-log_snr)).sqrt()

    @cached_property
    def _angle_span(self) -> float:
        """φ at the noisy end minus φ at the clean end."""
        gap = -math.expm1((self.min_log_snr - self.max_log_snr) / 2)
        return math.atan(gap / (math.exp(self.min_log_snr / 2) + math.exp(-self.max_log_snr / 2)))


@dataclass(frozen=True)
class TabulatedSchedule(NoiseSchedule):
    """Any schedule: α falls linearly between given values at evenly spaced times.

    The table is the schedule. The density belongs to it exactly, however few values it has, so no estimate of the
    bound is biased; a table of a formula differs from the formula only in how often levels are visited. Two values, 1
    and 0, are the linear schedule.

    Raises:
        ValueError: As the linear schedule, or if the values do not fall from one end of the range to the other.
    """

    alphas: tuple[float, ...] = (1.0, 0.0)
    """α at evenly spaced times, the cleanest first, in [0, 1]; what is outside the range of λ is cut off."""

    @classmethod
    def of(
        cls,
        alpha: Callable[[Tensor], Tensor],
        min_log_snr: float = -9.0,
        max_log_snr: float = 9.0,
        *,
        num_values: int = 1025,
    ) -> TabulatedSchedule:
        """Tabulate a function of time.

        Args:
            alpha: Maps times in [0, 1], float64, to α, from (nearly) 1 down to (nearly) 0. Of a function that gives λ,
                take the sigmoid.
            min_log_snr, max_log_snr: The range.
            num_values: Values in the table.
        """
        time = torch.linspace(0, 1, num_values, dtype=torch.float64)
        return cls(min_log_snr, max_log_snr, tuple(alpha(time).tolist()))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.alphas) < 2 or not all(a > b for a, b in zip(self.alphas[:-1], self.alphas[1:], strict=True)):
            raise ValueError(
                f"alphas must be two or more values that fall strictly, got {len(self.alphas)} values from "
                f"{self.alphas[:1]} to {self.alphas[-1:]}; give α at evenly spaced times, the cleanest first."
            )
        cleanest, noisiest = _sigmoid(self.max_log_snr), _sigmoid(self.min_log_snr)
        if not (1.0 >= self.alphas[0] >= cleanest and noisiest >= self.alphas[-1] >= 0.0):
            raise ValueError(
                f"alphas must fall from [{cleanest:.7g}, 1] to [0, {noisiest:.7g}] to cover log-SNR "
                f"{self.max_log_snr:g} to {self.min_log_snr:g}, got {self.alphas[0]:.7g} to {self.alphas[-1]:.7g}; "
                "narrow the range, or go on to the ends."
            )

    def log_snr(self, time: Tensor) -> Tensor:
        """Return the log-SNR at `time` in [0, 1]; same shape and dtype, float64 in between."""
        alpha_N = self._alpha_N(time.device)
        clean, noisy = self._times_of_ends
        place = (clean + time.double() * (noisy - clean)) * (len(alpha_N) - 1)
        piece = place.long().clamp(0, len(alpha_N) - 2)
        alpha = torch.lerp(alpha_N[piece], alpha_N[piece + 1], place - piece)
        return torch.logit(alpha).clamp(self.min_log_snr, self.max_log_snr).to(time.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the schedule passes `log_snr` (inside the range); same shape and dtype."""
        clean, noisy = self._times_of_ends
        return ((self._time_in_table(log_snr) - clean) / (noisy - clean)).to(log_snr.dtype)

    def log_snr_pdf(self, log_snr: Tensor) -> Tensor:
        """Return p(λ) ∝ σ(λ)·σ(−λ)/|dα/dt|; its integral is `mass`."""
        alpha_N = self._alpha_N(log_snr.device)
        clean, noisy = self._times_of_ends
        piece = self._piece(log_snr)
        slope = (alpha_N[piece] - alpha_N[piece + 1]) * (len(alpha_N) - 1) * (noisy - clean)
        return (super().log_snr_pdf(log_snr.double()) * (self.mass / slope)).to(log_snr.dtype)

    def _time_in_table(self, log_snr: Tensor) -> Tensor:
        """Return where log-SNR lie in the whole table, between 0 and 1, float64."""
        alpha_N = self._alpha_N(log_snr.device)
        piece = self._piece(log_snr)
        above, below = alpha_N[piece], alpha_N[piece + 1]
        share = (above - torch.sigmoid(log_snr.double())) / (above - below)
        return (piece + share) / (len(alpha_N) - 1)

    def _piece(self, log_snr: Tensor) -> Tensor:
        """Return the number of the value before each log-SNR, int64."""
        alpha_N = self._alpha_N(log_snr.device)
        num_above = torch.searchsorted(-alpha_N, -torch.sigmoid(log_snr.double()).contiguous())
        return (num_above - 1).clamp(0, len(alpha_N) - 2)

    @cached_property
    def _times_of_ends(self) -> tuple[float, float]:
        """Times in the table of the range's clean and noisy ends."""
        ends = torch.tensor([self.max_log_snr, self.min_log_snr], dtype=torch.float64, device="cpu")
        clean, noisy = self._time_in_table(ends).tolist()
        return clean, noisy

    def _alpha_N(self, device: torch.device) -> Tensor:
        """Return the table, float64."""
        return _table_on(device, self.alphas)


@cache
def _table_on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    """Return values as float64; copied to a device once, because a step must not wait for one."""
    return torch.tensor(values, dtype=torch.float64, device=device)


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

    @property
    def mass(self) -> float:
        """`log_snr_pdf` integrated over the range: 1 − ε, the span of the times."""
        return 1.0 - self.epsilon

    def log_snr_pdf(self, log_snr: Tensor) -> Tensor:
        """Return p(λ) = σ(λ)·σ(−λ)/(1 − ε) = −dt/dλ, un-normalised: t is drawn from [ε, 1]."""
        return super().log_snr_pdf(log_snr) / (1.0 - self.epsilon)
