"""What objectives that change another one have in common: all that they do not change is the other's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megadiff.diffusion.objectives.base import Objective


@dataclass(frozen=True)
class ObjectiveWrapper:
    """An objective that changes what `inner`'s model reads or sees, and none of its rows.

    `inner` has one position per token, attends in both directions, and predicts in place.
    """

    inner: Objective

    def sequence_length(self, num_tokens: int) -> int:
        """Return the inner objective's S; see `Objective.sequence_length`."""
        return self.inner.sequence_length(num_tokens)

    def count_active_rows(
        self,
        ordinal_B: Tensor,
        num_tokens: int,
        seed: int,
        *,
        validation: bool = False,
        index_S: Tensor | None = None,
    ) -> int | None:
        """Count the inner objective's rows; see `Objective.count_active_rows`."""
        return self.inner.count_active_rows(ordinal_B, num_tokens, seed, validation=validation, index_S=index_S)
