"""Uniform-state noise as the argmax of Gaussians, and the soft inputs of Duo's curriculum.

Give every one of V ids a standard normal number, and the clean one μ more: the largest is distributed as uniform-state
noise (K = V) of keep probability T(μ). A softmax of the same numbers is a soft version of the noised token that still
tells which ids came close: the lower the temperature, the nearer to the token itself.

V numbers per position are never drawn. Beside the clean token's own number only the k largest of the V − 1 others
matter; they are drawn as order statistics from k uniform words, and their ids as a uniform choice without repetition.
What lies below them has its expected share of the softmax, in closed form.

In the paper's letters μ = α̃/σ̃ = exp(−γ/2), with α̃² = sigmoid(−γ) and σ̃² = sigmoid(γ).

Source: Sahoo et al., "The diffusion duality" (arXiv 2506.10892), §3 and §4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff.philox import Purpose, multiply_high, random_words, uniform_from_words

PUBLISHED_ALPHA = (0.06, 0.95)
"""Keep probabilities between which the published curriculum moves, at the vocabulary for which it was tuned."""

_NODE = torch.arange(-320, 321, dtype=torch.float64, device="cpu") / 32
_DENSITY = torch.exp(-_NODE.square() / 2) / (32 * math.sqrt(2 * math.pi))
_LARGEST_GAMMA = 30.0


def keep_probability(gamma: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return T, the keep probability of the noise that is the argmax at γ, and its derivative dT/dγ.

        T = (V·∫ φ(v)·Φ(v + μ)^(V−1) dv − 1) / (V − 1),    dT/dμ = V/(V − 1)·∫ v·φ(v)·Φ(v + μ)^(V−1) dv

    by the trapezoidal rule, which converges geometrically for such integrands: exact to rounding.

    Args:
        gamma: float64, any shape, on the host.
        vocab_size: V.

    Returns:
        Two tensors of the shape of `gamma`; the derivative is negative.

    Source: Sahoo et al. (arXiv 2506.10892), equation 10.
    """
    mean = torch.exp(-gamma / 2)
    others_below = torch.exp((vocab_size - 1) * torch.special.log_ndtr(_NODE + mean.unsqueeze(-1)))
    win_probability = others_below @ _DENSITY
    win_slope = others_below @ (_NODE * _DENSITY)
    alpha = (vocab_size * win_probability - 1) / (vocab_size - 1)
    return alpha, vocab_size / (vocab_size - 1) * win_slope * (-mean / 2)


def gamma_at(alpha: float, vocab_size: int) -> float:
    """Return the γ at which `keep_probability` is `alpha`, by bisection to the last bits.

    Raises:
        ValueError: If alpha does not lie in [0.001, 0.999].
    """
    if not 0.001 <= alpha <= 0.999:
        raise ValueError(f"alpha must lie in [0.001, 0.999], got {alpha}; published ends are {PUBLISHED_ALPHA}.")
    low, high = -_LARGEST_GAMMA, _LARGEST_GAMMA
    for _ in range(60):
        middle = (low + high) / 2
        kept = keep_probability(torch.tensor(middle, dtype=torch.float64), vocab_size)[0].item()
        low, high = (middle, high) if kept > alpha else (low, middle)
    return (low + high) / 2


def gamma_range(vocab_size: int, alpha: tuple[float, float] = PUBLISHED_ALPHA) -> tuple[float, float]:
    """Return (γ_min, γ_max) between which the keep probability falls from `alpha[1]` to `alpha[0]`.

    The same γ means less signal the larger the vocabulary: more Gaussians compete with the clean token's.
    """
    return gamma_at(alpha[1], vocab_size), gamma_at(alpha[0], vocab_size)


class SoftTokens(NamedTuple):
    """Noised tokens and the k + 1 ids that came closest, the clean one first, [B, L, ...]."""

    noised_BL: Tensor
    """z, int64: the argmax."""
    ids_BLK: Tensor
    """int64."""
    weights_BLK: Tensor
    """Their shares of the softmax over the whole vocabulary, float32; they sum to at most 1."""


@dataclass(frozen=True, kw_only=True)
class GaussianCurriculum:
    """Soft inputs for the first samples of the training stream, ever harder ones.

    Everything is a function of the ordinal. What the weights lack to 1 is the expected share of all ids below the k
    largest, whose embeddings are left out of the mixture.

    Raises:
        ValueError: If a range is empty or too wide, or top_k ids are not there.
    """

    vocab_size: int
    """V, the mask among the ids."""
    gamma: tuple[float, float]
    """γ_min and γ_max: γ runs from one to the other as time does from 0 to 1."""
    end_sample: int
    """First ordinal of discrete noise."""
    start_sample: int = 0
    """First ordinal at which the temperature moves."""
    log10_temperature: tuple[float, float] = (-3.0, -3.0)
    """log₁₀ τ up to `start_sample` and at `end_sample`, linear between them."""
    top_k: int = 8
    """k: ids beside the clean one in a soft input."""

    def __post_init__(self) -> None:
        (cleanest, noisiest), _ = keep_probability(torch.tensor(self.gamma, dtype=torch.float64), self.vocab_size)
        if not 0.999 >= cleanest > noisiest >= 0.001:
            raise ValueError(
                f"gamma must rise, and keep tokens with probabilities in [0.001, 0.999], got {self.gamma}, which keep "
                f"{cleanest:.6f} and {noisiest:.6f} of {self.vocab_size} ids; gamma_range finds what does."
            )
        if not 0 <= self.start_sample < self.end_sample:
            raise ValueError(
                f"start_sample must be at least 0 and below end_sample {self.end_sample}, got {self.start_sample}; "
                "begin before the end."
            )
        if not all(-6 <= value <= 2 for value in self.log10_temperature):
            raise ValueError(f"log10_temperature must lie in [-6, 2], got {self.log10_temperature}; published is -3.")
        if not 1 <= self.top_k < self.vocab_size:
            raise ValueError(
                f"top_k must be at least 1 and below the vocabulary's {self.vocab_size} ids, got {self.top_k}; "
                "8 is enough at the published temperature."
            )

    def covers(self, ordinal_B: Tensor) -> Tensor:
        """Tell which samples the curriculum noises, bool [B], on the ordinals' device."""
        return ordinal_B < self.end_sample

    def temperature(self, ordinal_B: Tensor) -> Tensor:
        """Return τ of each sample that is covered, float64 [B]."""
        progress_B = (ordinal_B.double() - self.start_sample) / (self.end_sample - self.start_sample)
        start, end = self.log10_temperature
        return 10 ** (start + progress_B.clamp(0, 1) * (end - start))

    def level(self, time_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return γ, α = T(γ) and α' = dα/dt at times in [0, 1), float64 [B] each, on the host."""
        gamma_min, gamma_max = self.gamma
        gamma_B = gamma_min + time_B * (gamma_max - gamma_min)
        alpha_B, slope_B = keep_probability(gamma_B, self.vocab_size)
        return gamma_B, alpha_B, slope_B * (gamma_max - gamma_min)

    def draw(self, tokens_BL: Tensor, gamma_B: Tensor, ordinal_B: Tensor, seed: int) -> SoftTokens:
        """Draw Gaussians for every token, as far as they matter.

        Blocks 0 … k − 1 of the GAUSSIAN words each give one of the k largest numbers, its id, and the place of that id
        in their order; the fourth word of block 0 gives the clean token's own number. All arithmetic is in float64.

        Args:
            tokens_BL: Clean ids, int64.
            gamma_B: γ of each sample, float64, on the tokens' device.
            ordinal_B: Places in the training stream, int64, on the tokens' device.
            seed: The run's seed, in [0, 2**64).
        """
        device, num_others = tokens_BL.device, self.vocab_size - 1
        words_BLK4 = random_words(
            seed,
            ordinal_B[:, None, None],
            torch.arange(tokens_BL.shape[1], device=device)[:, None],
            Purpose.GAUSSIAN,
            block=torch.arange(self.top_k, device=device),
        )
        size_word, id_word, order_word, own_word = words_BLK4.unbind(-1)
        log_cdf_BLK = _largest_log_uniforms(size_word, num_others)
        other_BLK = _normal_quantile(log_cdf_BLK)
        ids_BLK = _distinct_ids(id_word, order_word, num_others)
        ids_BLK = ids_BLK + (ids_BLK >= tokens_BL[..., None])  # the clean id is not among the others
        own_BL = torch.special.ndtri(uniform_from_words(own_word[..., 0])) + torch.exp(-gamma_B / 2)[:, None]

        value_BLK = torch.cat([own_BL[..., None], other_BLK], dim=-1)
        ids_BLK = torch.cat([tokens_BL[..., None], ids_BLK], dim=-1)
        winner_BL1 = value_BLK.argmax(dim=-1, keepdim=True)
        # softmax(w/τ) with w = σ̃·value.
        scale_B11 = (torch.sigmoid(gamma_B).sqrt() / self.temperature(ordinal_B))[:, None, None]
        log_tail_BL1 = _log_mass_below(scale_B11, other_BLK[..., -1:], log_cdf_BLK[..., -1:], num_others - self.top_k)
        log_share_BLK = scale_B11 * value_BLK
        log_total_BL1 = torch.logaddexp(log_share_BLK.logsumexp(dim=-1, keepdim=True), log_tail_BL1)
        return SoftTokens(
            noised_BL=ids_BLK.gather(-1, winner_BL1).squeeze(-1),
            ids_BLK=ids_BLK,
            weights_BLK=(log_share_BLK - log_total_BL1).exp().float(),
        )


def _largest_log_uniforms(word_K: Tensor, count: int) -> Tensor:
    """Return the logarithms of the K largest of `count` independent uniform numbers, falling; [..., K].

    The largest of n is distributed as U^(1/n), and given it the others are uniform below it.
    """
    remaining_K = count - torch.arange(word_K.shape[-1], device=word_K.device)
    return (uniform_from_words(word_K).log() / remaining_K).cumsum(dim=-1)


def _normal_quantile(log_probability: Tensor) -> Tensor:
    """Return Φ⁻¹(exp(log_probability)), exact in both tails."""
    upper = -torch.special.ndtri(-torch.expm1(log_probability))
    return torch.where(log_probability < -math.log(2), torch.special.ndtri(log_probability.exp()), upper)


def _distinct_ids(id_word_K: Tensor, order_word_K: Tensor, count: int) -> Tensor:
    """Draw K different integers below `count`, every sequence of them as likely as any other; int64 [..., K].

    The set is Floyd's; its order is that of further words (Bentley and Floyd, CACM 30, 1987).
    """
    size = id_word_K.shape[-1]
    ids_K = torch.empty_like(id_word_K)
    for place in range(size):
        largest = count - size + place
        drawn = multiply_high(id_word_K[..., place], largest + 1)
        taken = (ids_K[..., :place] == drawn[..., None]).any(dim=-1)
        ids_K[..., place] = torch.where(taken, largest, drawn)
    return ids_K.gather(-1, order_word_K.argsort(dim=-1))


def _log_mass_below(scale: Tensor, bound: Tensor, log_cdf: Tensor, count: int) -> Tensor:
    """Return log(count·E[exp(scale·ε) | ε < bound]) of a standard normal ε; the broadcast shape.

    The mean of a truncated log-normal is exp(s²/2)·Φ(b − s)/Φ(b). Written with erfcx no squares of s are left that
    would have to cancel.

    Args:
        log_cdf: log Φ(bound).
    """
    if count == 0:
        return torch.full_like(bound * scale, -math.inf)
    scaled_tail = torch.special.erfcx((scale - bound) / math.sqrt(2)) / 2
    return math.log(count) + scale * bound - bound.square() / 2 + scaled_tail.log() - log_cdf
