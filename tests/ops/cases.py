"""Rows as a noise process makes them, and how far an implementation of the row loss is from the dense bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    UniformMixing,
    nelbo_terms,
)
from megadiff.ops import RowSums, RowTargets, eager, merge_statistics

MASK = 3
NOISES = ("masked", "uniform", "hybrid -2", "hybrid 0", "hybrid 2", "hybrid 0 flat")
LARGEST_LOG_SNR = 9.21  # α from 1e-4 to 1 - 1e-4


def mixing(noise: str, vocab_size: int) -> MixingDistribution:
    if noise == "masked":
        return MaskedMixing(vocab_size, MASK)
    if noise == "uniform":
        return UniformMixing(vocab_size, MASK)
    return HybridMixing(vocab_size, MASK, float(noise.split()[1]), 0.5 if noise.endswith("flat") else 1.0)


@dataclass
class Case:
    """T rows that a process can produce, a third each kept, replaced and masked, over its whole range of log-SNR."""

    process: DiffusionProcess
    targets: RowTargets
    log_snr_T: Tensor

    @property
    def vocab_size(self) -> int:
        return self.process.mixing.vocab_size

    def in_fp64(self) -> RowTargets:
        """The targets as the kernels see them, in fp64: their own rounding to fp32 is not under test."""
        return RowTargets(*self.targets[:2], *(field.double() for field in self.targets[2:]))


def make_case(noise: str, num_rows: int, vocab_size: int, *, seed: int = 0) -> Case:
    process = DiffusionProcess(NoiseSchedule(-LARGEST_LOG_SNR, LARGEST_LOG_SNR), mixing(noise, vocab_size))
    generator = torch.Generator().manual_seed(seed)
    tokens, other = torch.randint(4, vocab_size, (2, num_rows), generator=generator)
    kind = torch.arange(num_rows) % 3
    noised = torch.where(kind == 0, tokens, torch.where(kind == 1, other, MASK))
    log_snr = torch.linspace(-LARGEST_LOG_SNR, LARGEST_LOG_SNR, num_rows, dtype=torch.float64)
    log_snr = log_snr if num_rows > 1 else torch.zeros(num_rows, dtype=torch.float64)
    noised = torch.where(process.marginal_at(log_snr, tokens, noised) > 0, noised, tokens)
    weight = process.loss_weight(log_snr, tokens, noised).float()
    targets = RowTargets(
        tokens, noised, process.alpha(log_snr).float(), process.uniform_mass(log_snr).float(), weight, 1.25 * weight
    )
    return Case(process, targets, log_snr)


def make_logits(num_rows: int, num_columns: int, *, scale: float = 3.0, seed: int = 1) -> Tensor:
    """fp32 [T, W]."""
    return scale * torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def dense(case: Case, logits_TW: Tensor) -> tuple[Tensor, Tensor]:
    """Terms [3, T] and gradient [T, W] of the dense reference in fp64; divergences are 0 where weights are."""
    logits = logits_TW.double().requires_grad_()
    numbers = case.in_fp64()
    active = numbers.active
    # Rows that do not count may be infinite or broken, which autograd would multiply by their zero weights.
    counted = torch.where(active[:, None], logits[:, : case.vocab_size], 0.0)
    terms = nelbo_terms(counted, *numbers[:2], case.log_snr_T, case.process)
    kl_div, is_div = (torch.where(active, term, 0.0) for term in (terms.kl_div, terms.is_div))
    loss = numbers.kl_weight * kl_div + numbers.is_weight * is_div
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return torch.stack([loss, kl_div, is_div]).detach(), gradient


def in_shards(ops, case: Case, logits_TW: Tensor, num_shards: int) -> tuple[Tensor, Tensor]:
    """Terms and gradient as `num_shards` tensor-parallel ranks compute them, one after another, by `ops`."""
    targets = case.targets
    pieces = logits_TW.chunk(num_shards, dim=1)
    width = pieces[0].shape[1]
    columns = [
        {"vocab_start": rank * width, "vocab_size": case.vocab_size, "mask_id": MASK} for rank in range(num_shards)
    ]
    shards = list(zip(pieces, columns, strict=True))
    statistics = [ops.row_statistics(piece, targets.target, targets.noised, **c) for piece, c in shards]
    log_sum_exp, target_logit, noised_logit = merge_statistics(torch.stack(statistics))
    partial_sums = sum(ops.row_partial_sums(piece, log_sum_exp, targets, **c) for piece, c in shards)
    sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial_sums)
    terms = ops.row_loss(sums, targets, mask_id=MASK)
    return terms, torch.cat([ops.row_gradient(piece, sums, targets, **c) for piece, c in shards], dim=1)


def assert_within_twice_eager(case: Case, logits_TW: Tensor, terms_3T: Tensor, gradient_TW: Tensor) -> None:
    """Errors against the dense fp64 reference on the same logits are at most twice those of the eager operators.

    Both are root mean squares over rows, of errors relative to the row's own largest value (rows of small numbers count
    like rows of large ones) and of errors as they are (large rows count most). One unit in the last place is granted
    beside it, for cases in which the eager version happens to hit the numbers exactly.
    """
    expected_terms, expected_gradient = dense(case, logits_TW)
    eager_terms, eager_gradient = in_shards(eager, case, logits_TW, 1)
    for value, twin, expected in (
        (terms_3T.t(), eager_terms.t(), expected_terms.t()),
        (gradient_TW, eager_gradient, expected_gradient),
    ):
        assert value.isfinite().all()
        precision = torch.finfo(value.dtype).eps
        error, budget = ((tensor.double() - expected).abs().amax(dim=1) for tensor in (value, twin))
        scale = expected.abs().amax(dim=1).clamp(min=1e-30)
        for unit in (scale, scale.square().mean().sqrt()):
            assert _rms(error / unit) <= 2 * _rms(budget / unit) + precision


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
