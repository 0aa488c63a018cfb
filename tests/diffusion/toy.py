"""A vocabulary so small that everything can be enumerated: exact expectations over noised sequences and levels.

A denoiser is a table with one row of logits per sequence, so it may depend on all tokens in any way. Estimators are
then held against sums over every noised sequence and a quadrature over levels: no sampling on that side.

Shapes: L tokens, V ids, M = V**L sequences, N levels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion import NoiseSchedule

V, L, MASK = 4, 3, 3
TOKENS_L = torch.tensor([0, 2, 1])
"""A clean sequence."""


def all_sequences(vocab_size: int = V, length: int = L) -> Tensor:
    """Every sequence once, int64 [M, L]; the last token runs fastest."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)


def sequence_index(sequence_BL: Tensor, vocab_size: int = V) -> Tensor:
    """Places of sequences in `all_sequences`, int64 [B]."""
    return (sequence_BL * vocab_size ** torch.arange(sequence_BL.shape[1]).flip(0)).sum(-1)


def random_table(seed: int = 0, vocab_size: int = V, length: int = L) -> Tensor:
    """Logits of a denoiser for every sequence, float64 [M, L, V]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size**length, length, vocab_size, dtype=torch.float64, generator=generator)


def sequence_probabilities(marginal_LV: Tensor) -> Tensor:
    """Probability of every sequence of independent tokens, [..., M].

    Args:
        marginal_LV: Distribution of each token, [..., L, V].
    """
    length, vocab_size = marginal_LV.shape[-2:]
    sequences_ML = all_sequences(vocab_size, length)
    return marginal_LV[..., torch.arange(length), sequences_ML].prod(-1)


def gauss_legendre(edges: Tensor, num_nodes: int = 20) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a quadrature, float64 [N] each, from one Gauss-Legendre rule between each pair of edges."""
    node, weight = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(num_nodes))
    half, middle = edges.diff()[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * node).flatten(), (half * weight).flatten()


def levels(schedule: NoiseSchedule, breaks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A quadrature for averages over the schedule's uniform times: log-SNR and weights of sum 1, float64 [N] each.

    Args:
        schedule: Turns times into log-SNR.
        breaks: Further times between which alone the integrand is smooth.
    """
    num_pieces = 2 * int(schedule.max_log_snr - schedule.min_log_snr)
    log_snr = torch.linspace(schedule.max_log_snr, schedule.min_log_snr, num_pieces + 1, dtype=torch.float64)
    times = [torch.tensor([0.0, 1.0], dtype=torch.float64), schedule.time(log_snr[1:-1])]
    edges = torch.cat(times if breaks is None else [*times, breaks.double()]).unique()
    time, weight = gauss_legendre(edges)
    return schedule.log_snr(time), weight
