"""A world small enough to enumerate: predictions for every partly hidden text, and the exact bounds of their model.

Three tokens and the mask; a text is L tokens. The model is a table that holds a distribution for every input, place by
place, in float64. What an objective's estimators should average to is then a finite sum over what may be hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megadiff.diffusion import NoisedBatch

V, MASK = 4, 3


def random_table(num_tokens: int) -> Tensor:
    """Log-probabilities of an arbitrary model, float64 [V**L, L, V]; the mask has none."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = 1.5 * torch.randn(V**num_tokens, num_tokens, V, dtype=torch.float64, generator=generator)
    return logits.masked_fill(torch.arange(V) == MASK, -torch.inf).log_softmax(-1)


def all_texts(num_tokens: int) -> Tensor:
    """Every text without masks, [(V − 1)**L, L]."""
    return torch.tensor(list(itertools.product(range(V - 1), repeat=num_tokens)))


def predicted_nll(table: Tensor, inputs: Tensor, position: Tensor | int, tokens: Tensor) -> Tensor:
    """−log p(token at a position | an input), of the shape of `tokens`; inputs have L more."""
    index = (inputs * V ** torch.arange(inputs.shape[-1])).sum(-1)
    return -table[index, position, tokens]


def losses_of(table: Tensor, batch: NoisedBatch) -> Tensor:
    """What the table loses on each token of a batch, [B, L], shown exactly what the layout lets each query see."""
    num_tokens = table.shape[1]
    noised_BL, target_BL = batch.noised_BS[:, :num_tokens], batch.rows.target[:, :num_tokens]
    if batch.layout.is_plain:
        inputs_BQL = noised_BL[:, None, :].expand(-1, num_tokens, -1)
    else:
        assert torch.equal(batch.noised_BS[:, num_tokens:], target_BL)
        seen_BQK = batch.layout.visible_BQK[:, :num_tokens]
        hidden_BQL = torch.where(seen_BQK[..., :num_tokens], noised_BL[:, None], MASK)
        inputs_BQL = torch.where(seen_BQK[..., num_tokens:], target_BL[:, None], hidden_BQL)
    return predicted_nll(table, inputs_BQL, torch.arange(num_tokens), target_BL)


def random_order_nll(table: Tensor, block_size: int) -> float:
    """Nats per text of the autoregressive model that writes block after block, each in a random order of its own."""
    texts = all_texts(table.shape[1])
    total = torch.zeros(len(texts), dtype=torch.float64)
    for start in range(0, table.shape[1], block_size):
        for order in itertools.permutations(range(start, start + block_size)):
            inputs = torch.full_like(texts, MASK)
            inputs[:, :start] = texts[:, :start]
            for position in order:
                total += predicted_nll(table, inputs, position, texts[:, position]) / math.factorial(block_size)
                inputs[:, position] = texts[:, position]
    return total.mean().item()


def hidden_sets_nll(table: Tensor, block_size: int, weight: Callable[[int], float]) -> float:
    """Nats per text, averaged over texts: the losses on every set of k tokens of a block, times weight(k)."""
    texts = all_texts(table.shape[1])
    total = torch.zeros(len(texts), dtype=torch.float64)
    for start in range(0, table.shape[1], block_size):
        block = range(start, start + block_size)
        for k in range(1, block_size + 1):
            for hidden in itertools.combinations(block, k):
                inputs = texts.clone()
                inputs[:, start + block_size :] = MASK
                inputs[:, list(hidden)] = MASK
                for position in hidden:
                    total += weight(k) * predicted_nll(table, inputs, position, texts[:, position])
    return total.mean().item()
