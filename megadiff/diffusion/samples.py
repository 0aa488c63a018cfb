"""Clean samples as an objective receives them: ids, and what may be done to each of them.

A token is `counted` (noised, predicted, in the loss), `given` (context that is never noised: a prompt), or neither (it
fills up a sample). Augmentations map samples to samples, so every objective can have them. Whatever a whole sequence
decides is decided on the host, from its ordinal: hence equal on all devices, and known without asking one.

Shapes: B samples, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadiff.diffusion.layout import positions_in_documents
from megadiff.philox import WORD_RANGE, Purpose, random_words


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The clean samples of a micro-batch.

    Raises:
        ValueError: If the shapes do not fit together, or the ordinals are not on the host.
    """

    tokens_BL: Tensor
    """Clean ids, int64."""
    counted_BL: Tensor
    """Whether a token is predicted and counts, bool."""
    ordinal_B: Tensor
    """Places in the training stream, int64, on the CPU."""
    given_BL: Tensor | None = None
    """Whether a token is context that is never noised, bool; None: none is. Where it holds, `counted_BL` does not."""
    document_BL: Tensor | None = None
    """Document numbers, int64, to confine attention to documents and count positions in them; noise stays that of the
    place in the sample. None: a sample is one document."""

    def __post_init__(self) -> None:
        for name in ("counted_BL", "given_BL", "document_BL"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.tokens_BL.shape:
                raise ValueError(
                    f"{name} must have the tokens' shape {tuple(self.tokens_BL.shape)}, got {tuple(tensor.shape)}; "
                    "give one value per token."
                )
        if self.ordinal_B.shape != self.tokens_BL.shape[:1] or self.ordinal_B.device.type != "cpu":
            raise ValueError(
                f"ordinal_B must have shape {tuple(self.tokens_BL.shape[:1])} on the CPU, got "
                f"{tuple(self.ordinal_B.shape)} on {self.ordinal_B.device}; give one ordinal per sample."
            )

    @property
    def length(self) -> int:
        """L."""
        return self.tokens_BL.shape[1]

    @property
    def device(self) -> torch.device:
        return self.tokens_BL.device

    @property
    def position_BL(self) -> Tensor:
        """Places of the tokens in their documents, int64."""
        if self.document_BL is None:
            return torch.arange(self.length, device=self.device).expand(self.tokens_BL.shape)
        return positions_in_documents(self.document_BL)

    def with_given_clean(self, noised_BL: Tensor) -> Tensor:
        """Return noised ids with the given tokens as they are."""
        return noised_BL if self.given_BL is None else torch.where(self.given_BL, self.tokens_BL, noised_BL)

    def with_given_levels(self, log_snr_BL: Tensor, cleanest: float) -> Tensor:
        """Return levels as a model is told them, [B, L] of [B, L] or [B, 1]: the cleanest one at given tokens."""
        log_snr_BL = log_snr_BL.expand(self.tokens_BL.shape)
        return log_snr_BL if self.given_BL is None else log_snr_BL.masked_fill(self.given_BL, cleanest)

    def shortened(self, length_B: Tensor) -> Samples:
        """Return the samples with their tails out of sight: a document of its own that does not count.

        No shape changes, and the layout is one of documents, whatever the lengths are.

        Args:
            length_B: Tokens to keep, int64, at least 1.
        """
        is_tail_BL = torch.arange(self.length, device=self.device) >= length_B.to(self.device)[:, None]
        document_BL = torch.zeros_like(self.tokens_BL) if self.document_BL is None else self.document_BL
        return replace(
            self,
            counted_BL=self.counted_BL & ~is_tail_BL,
            given_BL=None if self.given_BL is None else self.given_BL & ~is_tail_BL,
            # Numbers never fall along a sample, and no document has the number of a tail.
            document_BL=torch.where(is_tail_BL, self.length, document_BL),
        )

    def shortened_at_random(self, fraction: float, seed: int) -> Samples:
        """Return the samples, a fraction of them `shortened` to `random_lengths`; themselves where that is 0."""
        if fraction == 0.0:
            return self
        return self.shortened(random_lengths(self.ordinal_B, self.length, fraction, seed))


def random_lengths(ordinal_B: Tensor, num_tokens: int, fraction: float, seed: int) -> Tensor:
    """Draw a length in [1, L] for a fraction of the sequences, L for the others; int64 [B], on the host.

    Args:
        ordinal_B: Places in the training stream, int64.
        num_tokens: L.
        fraction: Share of sequences that are shortened, in [0, 1].
        seed: The run's seed, in [0, 2**64).

    Source: Sahoo et al. (arXiv 2602.15014), where 1 % of the training batches are cut to a uniform length.
    """
    words_B4 = random_words(seed, ordinal_B, 0, Purpose.SEQUENCE, block=1)
    drawn_B = 1 + ((words_B4[:, 1] * num_tokens) >> 32)
    return torch.where(words_B4[:, 0] < round(fraction * WORD_RANGE), drawn_B, num_tokens)


def shifted_inputs(tokens_BL: Tensor, bos_id: int, document_BL: Tensor | None = None) -> Tensor:
    """Return [BOS, x_0 .. x_{L-2}]: at every place the token before it, BOS where a document starts; int64 [B, L].

    Args:
        tokens_BL: Ids, clean or noised, int64.
        bos_id: Id of the token that stands before a document.
        document_BL: Document numbers, int64; None: a sample is one document.
    """
    return tokens_BL.roll(1, dims=1).where(~document_starts(tokens_BL, document_BL), bos_id)


def document_starts(tokens_BL: Tensor, document_BL: Tensor | None = None) -> Tensor:
    """Tell where documents start, bool [B, L]; see `shifted_inputs`."""
    starts_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    starts_BL[:, 1:] = False if document_BL is None else document_BL[:, 1:] != document_BL[:, :-1]
    return starts_BL
