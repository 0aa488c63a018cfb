"""Drawing noise: the levels of the sequences, the noised tokens and the numbers of their rows, as pure functions of
(seed, ordinal, position).

No state and no generator: the words of `megadiff.philox` decide everything, so any slice of a batch, on any
rank and after any restart, is noised as it would be inside the whole. Validation draws from streams of its
own. `noise_rows` is all that an objective asks for; a fused kernel may take its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.schedule import NoiseSchedule
from megadiff.philox import VALIDATION_OFFSET, Purpose, multiply_high, random_words, threshold, uniform_from_words

# floor(2**64 / φ), which is odd, as a signed 64-bit integer: multiplying by it modulo 2**64 permutes all
# ordinals.
_GOLDEN_STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def sequence_time(seed: int, ordinal: Tensor, purpose_offset: int = 0) -> Tensor:
    """Choose one time in [0, 1) per sequence, spread evenly over any window of consecutive samples.

    The time of sample n is frac(n/φ + u), φ the golden ratio and u drawn once per seed and purpose. The
    rotation by 1/φ has the lowest discrepancy of all rotations (the times of any N consecutive samples leave
    gaps of three lengths at most), so a batch is stratified without knowing its size or its split over ranks.
    Over seeds each time is uniform, so averages over a batch are unbiased. It is computed in 64-bit integers
    that wrap around, hence exact for every ordinal.

    Args:
        seed: The run's seed, in [0, 2**64).
        ordinal: int64 places in the training stream, of any shape.
        purpose_offset: 0 for training, `VALIDATION_OFFSET` for validation.

    Returns:
        float64 multiples of 2**-53, of the ordinals' shape.
    """
    # One word, the same for all: drawn on the host, so that a GPU adds a constant and launches nothing for it.
    origin = torch.zeros((), dtype=torch.int64, device="cpu")
    level_word = random_words(seed, origin, origin, Purpose.SEQUENCE + purpose_offset)[0]
    phase = ordinal * _GOLDEN_STEP + (level_word << 32)
    return ((phase >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def sequence_log_snr(schedule: NoiseSchedule, seed: int, ordinal_B: Tensor, purpose_offset: int = 0) -> Tensor:
    """Return the log-SNR of each sequence's `sequence_time`, float64 [B]."""
    return schedule.log_snr(sequence_time(seed, ordinal_B, purpose_offset))


def token_log_snr(schedule: NoiseSchedule, seed: int, ordinal_B: Tensor, position_L: Tensor) -> Tensor:
    """Choose one log-SNR per token, each on its own, from the first of its TOKEN words; training only.

    Args:
        schedule: Turns times into log-SNR.
        seed: The run's seed, in [0, 2**64).
        ordinal_B: int64 places in the training stream, [B].
        position_L: int64 places inside the whole sample, [L].

    Returns:
        float64 log-SNR, [B, L].
    """
    words_BL4 = random_words(seed, ordinal_B[:, None], position_L, token_purpose(False))
    return schedule.log_snr(uniform_from_words(words_BL4[..., 0]))


def token_purpose(validation: bool) -> int:
    """Return the purpose of the words that noise tokens, in training or in validation."""
    return Purpose.TOKEN + (VALIDATION_OFFSET if validation else 0)


def corrupt(
    tokens_BL: Tensor,
    log_snr_BL: Tensor,
    ordinal_B: Tensor,
    seed: int,
    process: DiffusionProcess,
    *,
    validation: bool = False,
    position_L: Tensor | None = None,
) -> Tensor:
    """Draw noised tokens from the process' `marginal`.

    Each token uses its four TOKEN words in the contract's order (level, keep, kind, id): it is kept with
    probability α; otherwise it becomes a uniform token with probability s, and the mask if not. A uniform
    token may coincide with the clean one and never is the mask, unless the mixing counts the mask among its
    uniform states.

    Args:
        tokens_BL: Clean ids, [B, L].
        log_snr_BL: λ per token, [B, L], or per sequence, [B, 1]; probabilities are computed in float64.
        ordinal_B: int64 places in the training stream, [B].
        seed: The run's seed, in [0, 2**64).
        process: The diffusion process.
        validation: Draw from the validation stream.
        position_L: int64 places inside the whole sample, [L], for a slice of it; 0 … L − 1 when None.

    Returns:
        Noised ids, [B, L], of the tokens' dtype.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    batch_size, num_tokens = tokens_BL.shape
    if position_L is None:
        position_L = torch.arange(num_tokens, device=tokens_BL.device)
    if (
        log_snr_BL.shape not in ((batch_size, num_tokens), (batch_size, 1))
        or ordinal_B.shape != (batch_size,)
        or position_L.shape != (num_tokens,)
    ):
        raise ValueError(
            "log_snr_BL, ordinal_B and position_L must have shapes [B, L] or [B, 1], [B] and [L] for tokens "
            f"of shape {tuple(tokens_BL.shape)}, got {tuple(log_snr_BL.shape)}, {tuple(ordinal_B.shape)} and "
            f"{tuple(position_L.shape)}; cut all of them alike."
        )
    mixing = process.mixing
    words_BL4 = random_words(seed, ordinal_B[:, None], position_L[None, :], token_purpose(validation))
    _, keep_word, kind_word, id_word = words_BL4.unbind(-1)

    log_snr_BL = log_snr_BL.double()
    keep_BL = keep_word < threshold(process.alpha(log_snr_BL))
    uniform_BL = kind_word < threshold(mixing.uniform_share(log_snr_BL))

    drawn_BL = multiply_high(id_word, mixing.num_uniform_states)
    if not mixing.mask_is_uniform_state:
        drawn_BL = drawn_BL + (drawn_BL >= mixing.mask_id)
    noise_BL = torch.where(uniform_BL, drawn_BL, mixing.mask_id)
    return torch.where(keep_BL, tokens_BL, noise_BL.to(tokens_BL.dtype))


@dataclass(frozen=True, kw_only=True)
class NoisedRows:
    """Noised tokens and what the noise process says about each of them, [B, L]."""

    noised: Tensor
    """z, of the tokens' dtype."""
    alpha: Tensor
    """Keep probability, float32."""
    uniform_mass: Tensor
    """c, the probability of each single uniform state, float32."""
    loss_weight: Tensor
    """w, float32; 0 where the token does not count."""
    elbo_weight: Tensor
    """w/p(λ), float32; 0 where the token does not count."""


class NoiseRows(Protocol):
    """`noise_rows`, or what computes the same in another way."""

    def __call__(
        self,
        tokens_BL: Tensor,
        log_snr_BL: Tensor,
        ordinal_B: Tensor,
        counted_BL: Tensor,
        seed: int,
        process: DiffusionProcess,
        *,
        validation: bool = False,
        position_L: Tensor | None = None,
    ) -> NoisedRows:
        """See `noise_rows`."""
        ...


def noise_rows(
    tokens_BL: Tensor,
    log_snr_BL: Tensor,
    ordinal_B: Tensor,
    counted_BL: Tensor,
    seed: int,
    process: DiffusionProcess,
    *,
    validation: bool = False,
    position_L: Tensor | None = None,
) -> NoisedRows:
    """Draw noised tokens and compute the numbers of their rows, in float64 until the last rounding.

    Args:
        tokens_BL: Clean ids, [B, L].
        log_snr_BL: λ per token, [B, L], or per sequence, [B, 1].
        ordinal_B: int64 places in the training stream, [B].
        counted_BL: bool, [B, L]; chooses which tokens have weights, not which are noised.
        seed: The run's seed, in [0, 2**64).
        process: The diffusion process.
        validation: Draw from the validation stream.
        position_L: int64 places inside the whole sample, [L], for a slice of it; 0 … L − 1 when None.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if counted_BL.shape != tokens_BL.shape:
        raise ValueError(
            f"counted_BL must have the tokens' shape {tuple(tokens_BL.shape)}, got {tuple(counted_BL.shape)}; "
            "give one value per token."
        )
    noised_BL = corrupt(tokens_BL, log_snr_BL, ordinal_B, seed, process, validation=validation, position_L=position_L)
    log_snr_BL = log_snr_BL.double()
    loss_weight_BL = process.loss_weight(log_snr_BL, tokens_BL, noised_BL).where(counted_BL, 0.0)
    elbo_weight_BL = loss_weight_BL / process.schedule.log_snr_pdf(log_snr_BL)
    return NoisedRows(
        noised=noised_BL,
        alpha=process.alpha(log_snr_BL).float().expand_as(tokens_BL),
        uniform_mass=process.uniform_mass(log_snr_BL).float().expand_as(tokens_BL),
        loss_weight=loss_weight_BL.float(),
        elbo_weight=elbo_weight_BL.float(),
    )
