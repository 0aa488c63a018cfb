"""The interface of training objectives."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megadiff.diffusion.rows import NoisedBatch
from megadiff.diffusion.samples import Samples


class Objective(Protocol):
    """Turns clean tokens into what the model reads and what the row loss needs; holds no state."""

    def sequence_length(self, num_tokens: int) -> int:
        """Return S, the model's sequence length for samples of L = `num_tokens` tokens."""
        ...

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Noise a batch and build its rows, as a pure function of the arguments.

        Args:
            samples: Clean samples.
            seed: The run's seed, in [0, 2**64).
            validation: Use the noise of the validation streams, and none of what only training does.

        Returns:
            The batch, of model length S = `sequence_length(L)`.
        """
        ...

    def count_active_rows(
        self,
        ordinal_B: Tensor,
        num_tokens: int,
        seed: int,
        *,
        validation: bool = False,
        index_S: Tensor | None = None,
    ) -> int | None:
        """Bound the number of a batch's rows of nonzero weight, from its noise alone: no tokens, no device.

        Args:
            ordinal_B: Places in the training stream, int64 [B], on the CPU.
            num_tokens: L, tokens per sample.
            seed: The run's seed, in [0, 2**64).
            validation: Use the noise of the validation streams.
            index_S: Places in the model's sequence whose rows are meant, int64 on the CPU; None: all.

        Returns:
            A bound for every batch with these ordinals whose clean tokens contain no mask, on any device; as good as
            reached where all tokens count. None where any row can weigh something.
        """
        ...
