"""The NELBO of held-out text, estimated without bias.

Each validation sequence is noised once, at a level of its own, by noise that is keyed apart from training: the same
for every evaluation, run and layout, so two numbers differ only by the model. Levels are stratified over the
sequences, which makes the estimate tighter than its standard error says; the error is that of independent sequences,
of any number of counted tokens each.

Which bound it is, and what is left out of it at the ends of the noise, docs/objectives.md says of every objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadiff.data.loader import BatchLoader
from megadiff.fields import require
from megadiff.training.step import DenoisingStep


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """When and on how much text the bound is estimated."""

    interval: int = 1000
    """Steps between validations; one more always follows the last step. 0 validates only then."""
    num_sequences: int = 512
    """Held-out sequences, each noised once."""

    def __post_init__(self) -> None:
        require(self.interval >= 0, "validation.interval", self.interval, "be at least 0 (0: only at the end)")
        require(
            self.num_sequences >= 2,
            "validation.num_sequences",
            self.num_sequences,
            "be at least 2 for a standard error",
        )


@dataclass(frozen=True, kw_only=True)
class NelboEstimate:
    """An estimate of the bound on -log p(x)."""

    nelbo: float
    """Nats per token."""
    stderr: float
    """Standard error of `nelbo` over sequences, nats per token."""
    bits_per_byte: float
    num_sequences: int

    @property
    def ppl_bound(self) -> float:
        """Upper bound on the perplexity per token."""
        return math.exp(self.nelbo)

    def __str__(self) -> str:
        return (
            f"NELBO {self.nelbo:.4f} ± {self.stderr:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte "
            f"({self.num_sequences} sequences)"
        )


def summarize(bounds_3N: Tensor, step: DenoisingStep) -> NelboEstimate:
    """Turn this rank's per-sequence sums into the job's estimate.

    Args:
        bounds_3N: fp64, each sequence's Σ NELBO, counted tokens and bytes, over the positions that this rank holds;
            sequences without tokens are padding.
    """
    nelbo_N, tokens_N, bytes_N = step.sum_over_context(bounds_3N)
    sums_3N = torch.stack([nelbo_N, tokens_N, bytes_N])
    squares_3N = torch.stack([nelbo_N.square(), nelbo_N * tokens_N, tokens_N.square()])
    local = torch.cat([(tokens_N > 0).double()[None], sums_3N, squares_3N]).sum(dim=1)
    count, nelbo, tokens, num_bytes, nelbo_2, nelbo_tokens, tokens_2 = step.reduce_over_job(local).tolist()
    # The error of a ratio of sums: that of Σ (nats − mean · tokens), whose terms are the sequences' deviations.
    mean = nelbo / tokens
    deviations_2 = max(0.0, nelbo_2 - 2 * mean * nelbo_tokens + mean**2 * tokens_2)
    return NelboEstimate(
        nelbo=mean,
        stderr=math.sqrt(count / (count - 1) * deviations_2) / tokens,
        bits_per_byte=nelbo / max(num_bytes, 1.0) / math.log(2),
        num_sequences=int(count),
    )


@torch.no_grad()
def estimate_nelbo(
    step: DenoisingStep, chunks: Sequence[nn.Module], loader: BatchLoader, num_sequences: int
) -> NelboEstimate:
    """Estimate the bound of a model on the first sequences of a loader; a collective of the whole job.

    Args:
        chunks: this rank's part of the model, its virtual stages in order.
        loader: of held-out text, in the order of `VALIDATION_SEED`.
    """
    groups = step.groups
    batches, num_micro_batches = loader.validation_batches(
        num_sequences,
        step.micro_batch_size,
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
        read=groups.tp.rank() == 0,
        # The interleaved schedule hands micro-batches over in groups of one per pipeline stage.
        batches_multiple=groups.pp.size() if len(chunks) > 1 else 1,
    )
    were_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    logged = step.run_micro_batches(chunks, batches, num_micro_batches, evaluate=True)
    for chunk, was_training in zip(chunks, were_training, strict=True):
        chunk.train(was_training)
    bounds_3N = torch.cat(logged, dim=1) if logged else torch.zeros(3, 0, dtype=torch.float64, device=groups.device)
    return summarize(bounds_3N, step)
