"""See what a noise process does: one real sample at several noise levels, in colour.

Kept tokens are plain, masks are dim blocks, tokens replaced by uniform noise are red. What training will do to its
data is better seen than imagined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.data.tokenizer import Tokenizer
from megadiff.diffusion import DiffusionProcess, corrupt

_PLAIN, _DIM, _RED, _BOLD, _RESET = "", "\033[2m", "\033[31m", "\033[1m", "\033[0m"


def _paint(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_RESET}" if colour and style else text


def render(tokens: list[int], noised: list[int], tokenizer: Tokenizer, *, colour: bool) -> str:
    """One noised sample as text; a mask is `░`, a replaced token stands in red or, without colour, in «»."""
    parts = []
    for token, noise in zip(tokens, noised, strict=True):
        if noise == tokenizer.mask_id:
            parts.append(_paint("░", _DIM, colour))
        elif noise == token:
            parts.append(tokenizer.decode([noise]))
        else:
            text = tokenizer.decode([noise])
            parts.append(_paint(text, _RED, colour) if colour else f"«{text}»")
    return "".join(parts)


def preview(
    tokens_L: Tensor,
    ordinal: int,
    process: DiffusionProcess,
    tokenizer: Tokenizer,
    *,
    seed: int,
    colour: bool,
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
) -> str:
    """Noise one sample at several times with the noise that training would draw for it.

    Args:
        tokens_L: clean ids, int64 [L].
        ordinal: the sample's place in the training stream.
        times: in [0, 1]; 0 is clean.
    """
    sections = []
    for time in times:
        log_snr = process.schedule.log_snr(torch.tensor([[time]], dtype=torch.float64))
        noised_1L = corrupt(tokens_L[None], log_snr, torch.tensor([ordinal]), seed, process)
        noised = noised_1L[0]
        num_masked = int((noised == tokenizer.mask_id).sum())
        num_replaced = int((noised != tokens_L).sum()) - num_masked
        title = (
            f"time {time:.1f}   log-SNR {log_snr.item():+.2f}   kept {process.alpha(log_snr).item():.0%}   "
            f"masked {num_masked}   replaced {num_replaced}   of {len(tokens_L)} tokens"
        )
        sections.append(_paint(title, _BOLD, colour))
        sections.append(render(tokens_L.tolist(), noised.tolist(), tokenizer, colour=colour))
    return "\n\n".join(sections)
