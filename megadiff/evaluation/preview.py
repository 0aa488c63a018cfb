"""See what a noise process does: a real batch at several noise levels, in colour.

Kept tokens are plain, masks are dim blocks, tokens replaced by uniform noise are red. What training will do to its
data is better seen than imagined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.data.tokenizer import Tokenizer
from megadiff.diffusion import DiffusionProcess, corrupt

_DIM, _RED, _BOLD, _RESET = "\033[2m", "\033[31m", "\033[1m", "\033[0m"


def _paint(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_RESET}" if colour else text


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
    tokens_BL: Tensor,
    given_BL: Tensor,
    ordinal_B: Tensor,
    process: DiffusionProcess,
    tokenizer: Tokenizer,
    seed: int,
    *,
    colour: bool,
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
) -> str:
    """Noise a batch at several times with the words that training would draw for it.

    Args:
        tokens_BL: clean ids, int64.
        given_BL: whether a token is never noised, bool.
        ordinal_B: the samples' places in the training stream, int64.
        times: in [0, 1]; 0 is clean.
    """
    sections = []
    for time in times:
        log_snr = process.schedule.log_snr(torch.tensor(time, dtype=torch.float64))
        noised_BL = corrupt(tokens_BL, log_snr.expand(len(tokens_BL), 1), ordinal_B, seed, process)
        noised_BL = torch.where(given_BL, tokens_BL, noised_BL)
        masked_BL = noised_BL == tokenizer.mask_id
        replaced_BL = (noised_BL != tokens_BL) & ~masked_BL
        for ordinal, tokens, noised, masked, replaced in zip(
            ordinal_B.tolist(), tokens_BL, noised_BL, masked_BL, replaced_BL, strict=True
        ):
            title = (
                f"time {time:.1f}   log-SNR {log_snr.item():+.2f}   sample {ordinal}   masked {int(masked.sum())}   "
                f"replaced {int(replaced.sum())}   of {len(tokens)} tokens"
            )
            sections.append(_paint(title, _BOLD, colour))
            sections.append(render(tokens.tolist(), noised.tolist(), tokenizer, colour=colour))
    return "\n\n".join(sections)
