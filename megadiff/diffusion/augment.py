"""What only training does to clean samples, for every objective: empty tokens, random lengths, random prompts.

Each maps samples to samples of the same shape, as a pure function of (seed, ordinal, position). What a whole sequence
decides - how many empty tokens, which length, which prompt - comes from SEQUENCE words on the host; which places are
empty, from INSERT words where the tokens are.

Shapes: B samples, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megadiff.diffusion.samples import Samples, random_lengths
from megadiff.philox import WORD_RANGE, Purpose, random_words, threshold, uniform_from_words


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which of them a run has; by default none.

    Raises:
        ValueError: If a share does not lie in [0, 1].
    """

    max_empty_token_fraction: float = 0.0
    """Up to which share of a sample empty tokens take: uniform in 0 to this."""
    empty_id: int = 0
    """Id of the empty token."""
    random_length_fraction: float = 0.0
    """Share of samples that are cut to a random length."""
    prompt_fraction: float = 0.0
    """Share of samples with a random prompt."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_fraction") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{field.name} must lie in [0, 1], got {value}; 0 leaves the samples as they are.")

    def augmented(self, samples: Samples, seed: int) -> Samples:
        """Return the samples as training sees them: filled with empty tokens, then cut, then prompted."""
        if self.max_empty_token_fraction > 0:
            share_B = empty_token_shares(samples.ordinal_B, self.max_empty_token_fraction, seed)
            samples = with_empty_tokens(samples, share_B, self.empty_id, seed)
        length_B = random_lengths(samples.ordinal_B, samples.length, self.random_length_fraction, seed)
        if self.random_length_fraction > 0:
            samples = samples.shortened(length_B)
        if self.prompt_fraction > 0:
            samples = with_prompts(
                samples, random_prompt_lengths(samples.ordinal_B, length_B, self.prompt_fraction, seed)
            )
        return samples


def empty_token_shares(ordinal_B: Tensor, maximum: float, seed: int) -> Tensor:
    """Draw the share of empty tokens in each sample, uniform in 0 to `maximum`; float64 [B], on the host."""
    words_B4 = random_words(seed, ordinal_B, 0, Purpose.SEQUENCE, block=1)
    return maximum * uniform_from_words(words_B4[:, 2])


def with_empty_tokens(samples: Samples, share_B: Tensor, empty_id: int, seed: int) -> Samples:
    """Return the samples with empty tokens between theirs, cut to the length they had.

    Each place is empty with its sample's probability, on its own. The clean tokens keep their order and what is known
    of them; those that no longer fit are lost. An empty token is a token like others: it counts, is given or belongs to
    a document as the token before it does (in front of the first, as that one).

    Args:
        samples: Clean samples.
        share_B: Probability that a place is empty, float64 [B].
        empty_id: Id of the empty token.
        seed: The run's seed, in [0, 2**64).

    Source: von Rütte et al. (arXiv 2512.10858), who take 0 to 20 % of PAD; their released code leaves it out.
    """
    position_L = torch.arange(samples.length, device=samples.device)
    ordinal_B1 = samples.ordinal_B.to(samples.device)[:, None]
    word_BL = random_words(seed, ordinal_B1, position_L, Purpose.INSERT)[..., 0]
    is_empty_BL = word_BL < threshold(share_B).to(samples.device)[:, None]
    source_BL = ((~is_empty_BL).cumsum(dim=1) - 1).clamp(min=0)

    def moved(values_BL: Tensor | None) -> Tensor | None:
        return None if values_BL is None else values_BL.gather(1, source_BL)

    return replace(
        samples,
        tokens_BL=torch.where(is_empty_BL, empty_id, samples.tokens_BL.gather(1, source_BL)),
        counted_BL=samples.counted_BL.gather(1, source_BL),
        given_BL=moved(samples.given_BL),
        document_BL=moved(samples.document_BL),
    )


def random_prompt_lengths(ordinal_B: Tensor, length_B: Tensor, fraction: float, seed: int) -> Tensor:
    """Draw the length of a prompt for a fraction of the samples, 0 for the others; int64 [B], on the host.

    With f = arccos(1 − 2r)/π, r uniform, the prompt is the positions ≤ f·(N − 1) of a sample of N tokens: half of it
    on average, seldom nearly nothing or nearly all, and never all but for N = 1.

    Args:
        ordinal_B: Places in the training stream, int64.
        length_B: N, int64.
        fraction: Share of samples with a prompt, in [0, 1].
        seed: The run's seed, in [0, 2**64).

    Source: the released code of von Rütte et al. (arXiv 2512.10858), with fraction 0.2.
    """
    words_B4 = random_words(seed, ordinal_B, 0, Purpose.SEQUENCE)
    share_B = torch.arccos(1.0 - 2.0 * uniform_from_words(words_B4[:, 3])) / math.pi
    drawn_B = (share_B * (length_B - 1)).floor().long() + 1
    return torch.where(words_B4[:, 2] < round(fraction * WORD_RANGE), drawn_B, 0)


def with_prompts(samples: Samples, prompt_B: Tensor) -> Samples:
    """Return the samples with their first tokens given, as far as these count; more may be given already.

    Args:
        samples: Clean samples.
        prompt_B: Length of the prompts, int64.
    """
    is_prompt_BL = torch.arange(samples.length, device=samples.device) < prompt_B.to(samples.device)[:, None]
    is_given_BL = is_prompt_BL & samples.counted_BL
    return replace(
        samples,
        counted_BL=samples.counted_BL & ~is_prompt_BL,
        given_BL=is_given_BL if samples.given_BL is None else samples.given_BL | is_given_BL,
    )
