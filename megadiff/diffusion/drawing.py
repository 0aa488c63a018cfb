"""What samplers share: from logits to ids, and what they can work with.

All arithmetic after the logits is in float64: rounded draws write likely tokens too often, as if at a lower temperature
(Zheng et al., arXiv 2409.02908).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megadiff.philox import Purpose, random_words, uniform_from_words


def clean_probs(logits: Tensor, temperature: float, barred_V: Tensor) -> Tensor:
    """Return x̂, float64 distributions over the ids that may be written, [..., V]."""
    return (logits.double() / temperature).masked_fill(barred_V, -math.inf).softmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw ids by inverting the cumulative distribution, [..., V], [...] -> [...]; none of probability 0."""
    cumulative = probs.cumsum(-1)
    targets = uniform.unsqueeze(-1) * cumulative[..., -1:]  # the sum may miss 1 by rounding
    return torch.searchsorted(cumulative, targets).squeeze(-1)


def draw_once(probs_BQV: Tensor, position_BQ: Tensor, seed: int, ordinal_B: Tensor) -> Tensor:
    """Draw ids for places that are written only once, as a function of (seed, ordinal, position); int64 [B, Q]."""
    words_BQ4 = random_words(seed, ordinal_B[:, None], position_BQ, Purpose.SAMPLER)
    return draw(probs_BQV, uniform_from_words(words_BQ4[..., 0]))


def barred_ids(vocab_size: int, mask_id: int, excluded_ids: Iterable[int]) -> Tensor:
    """Return a bool tensor [V], True at ids that are never written.

    Raises:
        ValueError: If an id is none, or no id is left.
    """
    barred = {mask_id, *excluded_ids}
    if any(not 0 <= i < vocab_size for i in barred) or len(barred) == vocab_size:
        raise ValueError(
            f"excluded_ids must lie in [0, {vocab_size}) and leave some id to write, got {sorted(barred)} "
            f"with the mask {mask_id}; exclude fewer ids."
        )
    barred_V = torch.zeros(vocab_size, dtype=torch.bool)
    barred_V[sorted(barred)] = True
    return barred_V


def check_canvas(canvas_BL: Tensor, fixed_BL: Tensor, ordinal_B: Tensor | None, temperature: float) -> None:
    """Check what every sampler is given.

    Raises:
        ValueError: If a shape, a type or the temperature is not what samplers work with.
    """
    if canvas_BL.dim() != 2 or canvas_BL.dtype != torch.int64:
        raise ValueError(
            f"canvas_BL must be int64 of shape [B, L], got {canvas_BL.dtype} of shape "
            f"{tuple(canvas_BL.shape)}; pass one row of ids per sample."
        )
    if fixed_BL.shape != canvas_BL.shape or fixed_BL.dtype != torch.bool:
        raise ValueError(
            f"fixed_BL must be bool of the canvas' shape {tuple(canvas_BL.shape)}, got {fixed_BL.dtype} of "
            f"shape {tuple(fixed_BL.shape)}; mark each position that is to be kept."
        )
    if ordinal_B is not None and ordinal_B.shape != canvas_BL.shape[:1]:
        raise ValueError(
            f"ordinal_B must have shape {tuple(canvas_BL.shape[:1])}, got {tuple(ordinal_B.shape)}; "
            "give one ordinal per sample."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; use a small one for greedy draws."
        )
