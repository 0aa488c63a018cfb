"""What is watched of a step beside its loss: the parts of the bound, and what every noise level adds to it.

All of it rides on the one reduction that the loss needs anyway: a micro-batch logs one vector of sums, vectors of
micro-batches, ranks and steps are added, and only sums are ever divided.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion import Rows

LEVEL_EDGES = (-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0)
"""log-SNRs between which noise levels are told apart; the first and the last bucket have no other end."""
NUM_LEVELS = len(LEVEL_EDGES) + 1
NUM_SUMS = 5 + 2 * NUM_LEVELS


def observed_sums(loss: Tensor, rows: Rows, kl_T: Tensor, is_T: Tensor, log_snr_T: Tensor | None) -> Tensor:
    """Return the sums of a micro-batch, fp64 [NUM_SUMS], in the order of `Observed`.

    Args:
        loss: Σ loss of its counted rows.
        rows: its rows, flat.
        kl_T: KL divergence of each row, nats.
        is_T: Itakura-Saito divergence of each row, nats.
        log_snr_T: noise level of each row; None where there is none.
    """
    parts_2T = torch.where(rows.counted, rows.elbo_weight * torch.stack([kl_T, is_T]), 0.0).double()
    counted_T = rows.counted.double()
    by_level = torch.zeros(2, NUM_LEVELS, dtype=torch.float64, device=loss.device)
    if log_snr_T is not None:
        edges = torch.tensor(LEVEL_EDGES, dtype=log_snr_T.dtype, device=log_snr_T.device)
        level_T = torch.bucketize(log_snr_T, edges)
        by_level.index_add_(1, level_T, torch.stack([parts_2T.sum(dim=0), counted_T]))
    nelbo, num_tokens = parts_2T.sum(), counted_T.sum()
    totals = torch.stack([loss.detach().double(), nelbo, num_tokens, *parts_2T.sum(dim=1)])
    return torch.cat([totals, by_level.flatten()])


@dataclass(frozen=True)
class Observed:
    """Sums over any number of micro-batches, ranks and steps."""

    loss: float
    """Σ loss; means are per counted token."""
    nelbo: float
    """Σ of the bound's estimate, nats."""
    num_tokens: float
    """Counted tokens."""
    kl: float
    """KL's part of `nelbo`, nats."""
    is_: float
    """Itakura-Saito's part."""
    level_nelbo: tuple[float, ...]
    """`nelbo` by noise level, noisy to clean."""
    level_tokens: tuple[float, ...]
    """`num_tokens` by noise level."""

    @classmethod
    def of(cls, sums: Sequence[float]) -> Observed:
        """Name the numbers of `observed_sums`."""
        loss, nelbo, num_tokens, kl, is_, *by_level = sums
        return cls(loss, nelbo, num_tokens, kl, is_, tuple(by_level[:NUM_LEVELS]), tuple(by_level[NUM_LEVELS:]))

    def __add__(self, other: Observed) -> Observed:
        return Observed.of([a + b for a, b in zip(self._sums, other._sums, strict=True)])

    @property
    def _sums(self) -> list[float]:
        return [self.loss, self.nelbo, self.num_tokens, self.kl, self.is_, *self.level_nelbo, *self.level_tokens]

    @property
    def scalars(self) -> dict[str, float]:
        """Means for curves, nats per token; levels that no token had are left out."""
        found = {"bound/kl": self.kl / self.num_tokens, "bound/is": self.is_ / self.num_tokens}
        for name, nelbo, num_tokens in zip(LEVEL_NAMES, self.level_nelbo, self.level_tokens, strict=True):
            if num_tokens:
                found[f"bound_by_log_snr/{name}"] = nelbo / num_tokens
        return found


def _level_names() -> tuple[str, ...]:
    inner = [f"{low:+g} to {high:+g}" for low, high in itertools.pairwise(LEVEL_EDGES)]
    names = [f"below {LEVEL_EDGES[0]:+g}", *inner, f"above {LEVEL_EDGES[-1]:+g}"]
    return tuple(f"{index} {name}" for index, name in enumerate(names))  # numbered, for pages that sort by name


LEVEL_NAMES = _level_names()
