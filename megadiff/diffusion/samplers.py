"""Samplers: from pure noise to text by reversing the diffusion process.

A sampler asks a `denoise` callable for logits and needs nothing else of the model. Draws are pure functions
of (seed, ordinal, position, step), so ranks that hold the same logits write the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from megadiff.diffusion.drawing import barred_ids, check_canvas, clean_probs, draw
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.schedule import NoiseSchedule
from megadiff.philox import Purpose, random_words, uniform_from_words


@torch.no_grad()
def ancestral_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    process: DiffusionProcess,
    canvas_BL: Tensor,
    fixed_BL: Tensor,
    seed: int,
    num_denoising_steps: int,
    *,
    ordinal_B: Tensor | None = None,
    position_L: Tensor | None = None,
    temperature: float = 1.0,
    grid: Literal["cosine", "linear"] = "cosine",
    renewal: float = 0.0,
    excluded_ids: Iterable[int] = (),
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Write the free positions of a canvas by ancestral sampling.

    The free positions start as pure noise at the lowest log-SNR. Every step asks for x̂ once and draws from
    q(z_s | z_t, x̂) at the next level of the grid; the last one draws from p(x | z_t, x̂), clean tokens. All
    arithmetic after the logits is in float64.

    A written token of masked noise stays as it is, right or wrong, and one of uniform noise hardly moves at the end.
    `renewal` draws a share of every step from `DiffusionProcess.renewal` instead, which may write any token anew and
    has the same marginals: what the model saw too early it can mend later. It costs steps, and an exact denoiser, which
    has nothing to mend, is better off without.

    Args:
        denoise: Maps noised ids [B, L] and their log-SNR, float64 of shape [], to logits [B, L, V].
        process: The process that the denoiser was trained for.
        canvas_BL: int64 ids; only those at fixed positions are read, [B, L].
        fixed_BL: bool; True where the canvas is kept (a prompt), [B, L].
        seed: In [0, 2**64).
        num_denoising_steps: Number of calls of `denoise`, at least 1 and below 2**24 - 1.
        ordinal_B: int64 [B], which samples of the seed to draw; 0 … B − 1 when None.
        position_L: int64 places inside the whole sample, [L], for a canvas that is a slice of it; 0 … L − 1 when None.
        temperature: Divides the logits; positive.
        grid: How α runs from noise to data: `cosine` (slow at both ends) or `linear`. Whichever schedule training had
            weighs levels; it is not a grid.
        renewal: Share of every step, in [0, 1], that guesses tokens and noises them anew; 1 − κ of a Ψ-sampler.
        excluded_ids: Ids never written, besides the mask, which never is. Uniform noise may still pass
            through them.
        progress: Called after each step with the number of finished steps and the present ids [B, L].

    Returns:
        int64 ids, [B, L], equal to the canvas at fixed positions.

    Raises:
        ValueError: If an argument is out of range, shapes do not fit, or the denoiser's logits have another
            shape.

    Source: ancestral sampler and cosine grid of von Rütte et al. (arXiv 2512.10858); Ψ-samplers of Deschenaux et al.
    (arXiv 2602.21185).
    """
    mixing = process.mixing
    check_canvas(canvas_BL, fixed_BL, ordinal_B, temperature)
    if not 1 <= num_denoising_steps < (1 << 24) - 1:
        raise ValueError(f"num_denoising_steps must lie in [1, 2**24 - 1), got {num_denoising_steps}; 128 is usual.")
    if grid not in ("cosine", "linear"):
        raise ValueError(f"grid must be 'cosine' or 'linear', got {grid!r}; pick one of the two.")
    if not 0.0 <= renewal <= 1.0:
        raise ValueError(f"renewal must lie in [0, 1], got {renewal}; 0 is ancestral sampling.")
    batch_size, num_tokens = canvas_BL.shape
    device = canvas_BL.device
    barred_V = barred_ids(mixing.vocab_size, mixing.mask_id, excluded_ids).to(device)
    if ordinal_B is None:
        ordinal_B = torch.arange(batch_size, device=device)
    if position_L is None:
        position_L = torch.arange(num_tokens, device=device)

    def uniform_BL(step: int) -> Tensor:
        words = random_words(seed, ordinal_B[:, None], position_L[None, :], Purpose.SAMPLER, step)
        return uniform_from_words(words[..., 0])

    in_alpha = NoiseSchedule(process.schedule.min_log_snr, process.schedule.max_log_snr)
    log_snr_grid = in_alpha.log_snr(_times(num_denoising_steps, grid)).to(device)
    prior_BLV = process.prior(device=device).expand(batch_size, num_tokens, mixing.vocab_size)
    noised_BL = torch.where(fixed_BL, canvas_BL, draw(prior_BLV, uniform_BL(0)))
    for step in range(num_denoising_steps):
        log_snr_t = log_snr_grid[step]
        logits_BLV = denoise(noised_BL, log_snr_t)
        if logits_BLV.shape != prior_BLV.shape:
            raise ValueError(
                f"denoise must return logits of shape {tuple(prior_BLV.shape)}, got "
                f"{tuple(logits_BLV.shape)}; cut padded vocabulary columns first."
            )
        xhat_BLV = clean_probs(logits_BLV, temperature, barred_V)
        if step + 1 < num_denoising_steps:
            log_snr_s = log_snr_grid[step + 1]
            probs_BLV = process.posterior(log_snr_t, log_snr_s, noised_BL, xhat_BLV)
            if renewal > 0:
                probs_BLV = probs_BLV.lerp(process.renewal(log_snr_t, log_snr_s, noised_BL, xhat_BLV), renewal)
        else:
            probs_BLV = process.clean_posterior(log_snr_t, noised_BL, xhat_BLV)
        noised_BL = torch.where(fixed_BL, canvas_BL, draw(probs_BLV, uniform_BL(step + 1)))
        if progress is not None:
            progress(step + 1, noised_BL)
    return noised_BL


def _times(num_denoising_steps: int, grid: str) -> Tensor:
    """Return the times at which x̂ is asked for, float64, falling from 1 towards 0, which is left out."""
    time = torch.linspace(1.0, 0.0, num_denoising_steps + 1, dtype=torch.float64)[:-1]
    return time if grid == "linear" else (1.0 - torch.cos(math.pi * time)) / 2.0
