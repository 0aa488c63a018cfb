"""Noising as one operator: from clean tokens and log-SNR to noised tokens and the numbers of their rows.

There is no eager twin in this room: `megadiff.diffusion.noise_rows` is it, and training chooses between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.ops import _library


def is_native(device: torch.device) -> bool:
    """Whether `noise_rows` serves tensors on this device."""
    return _library.is_live(device.type)


def noise_rows(
    tokens_BL: Tensor,
    log_snr_BL: Tensor,
    log_snr_pdf_BL: Tensor,
    ordinal_B: Tensor,
    counted_BL: Tensor,
    *,
    seed: int,
    purpose: int,
    scale: float,
    shift: float,
    num_uniform_states: int,
    mask_id: int,
    mask_is_uniform_state: bool,
    position_L: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw noised tokens and compute the numbers of their rows, bit for bit the same on CPU and CUDA.

    Args:
        tokens_BL: clean ids, int32 or int64 [B, L].
        log_snr_BL: λ per token, float64 [B, L], or per sequence, [B, 1].
        log_snr_pdf_BL: the schedule's density at `log_snr_BL`, float64 [B, L] or [B, 1].
        ordinal_B: places in the training stream, int64 [B].
        counted_BL: which tokens have weights, bool [B, L].
        seed: in [0, 2**64).
        purpose: first quarter of the Philox counter's second word, in [0, 256).
        scale, shift: log-odds scale·λ + shift of uniform against masked noise; shift may be ±inf.
        num_uniform_states: K, ids that uniform noise draws, in [1, 2**31].
        mask_id: id of the mask.
        mask_is_uniform_state: whether uniform noise draws the mask too.
        position_L: places inside the sample, int64 [L]; 0 … L − 1 when None.

    Returns:
        Noised tokens of the tokens' type, and α, uniform mass, w and w/p(λ) in float32; each [B, L]. The weights are
        0 where a token does not count.

    Raises:
        ValueError: the seed is out of range.
        RuntimeError: shapes, types or devices do not fit together.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}; choose a non-negative 64-bit integer.")
    noised_BL, numbers_4BL = torch.ops.megadiff.noise_rows(
        tokens_BL,
        log_snr_BL,
        log_snr_pdf_BL,
        ordinal_B,
        position_L,
        counted_BL,
        seed - (1 << 64) if seed >> 63 else seed,
        purpose,
        scale,
        shift,
        num_uniform_states,
        mask_id,
        mask_is_uniform_state,
    )
    return (noised_BL, *numbers_4BL.unbind())
