"""Which tokens the mask hides, and what guessing each of them is worth in the bound.

Masked diffusion, on whole samples or block by block, only ever hides tokens and asks for them. So all of it is a choice
of positions, made for every group of `group_size` neighbours on its own, and one weight per hidden token: with n tokens
that may be hidden, any choice whose sets of k tokens have (probability · weight) = 1/(k·C(n, k)) averages to the same
bound, that of an autoregressive model over a random order. Two such choices:

    levels         a time t per group; each token hides with probability 1 − α(t), at the weight −α'/(1 − α)
    exact count    a number k of 1 … n per group; exactly k tokens hide, at the weight n/k: less variance

Times and numbers walk through their range by the golden rotation of the group's ordinal (`sequence_time`), so that
every window of samples is stratified. As rows of the loss, hidden tokens are plain cross-entropy, and all others have
no weight: clean tokens are carried over.

Times end at ε, which costs the bound a share of ε; numbers have no ends. So whatever a model is trained by, `exact` is
what it is validated by.

Shapes: B samples, L tokens, G = L / group_size groups of a sample, S places whose rows are meant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megadiff.diffusion.mixing import MaskedMixing
from megadiff.diffusion.noising import NoiseRows, noise_rows, sequence_time
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.rows import Rows, cross_entropy_rows
from megadiff.diffusion.samples import Samples
from megadiff.diffusion.schedule import NoiseSchedule
from megadiff.philox import VALIDATION_OFFSET, WORD_RANGE, Purpose, random_words


@dataclass(frozen=True, kw_only=True)
class MaskedTokens:
    """Samples with hidden tokens, [B, L] each."""

    noised_BL: Tensor
    """Ids, of the tokens' dtype."""
    elbo_weight_BL: Tensor
    """Weight of −log x_θ(x) in the bound, float32; 0 where a token is not hidden, or does not count."""
    log_snr_BL: Tensor
    """λ, float64, the schedule's cleanest one at given tokens."""


@dataclass(frozen=True, kw_only=True)
class Masking(ABC):
    """A way to choose hidden tokens.

    Raises:
        ValueError: If the weighting is unknown.
    """

    mixing: MaskedMixing
    """The vocabulary and its mask."""
    schedule: NoiseSchedule
    """Which levels there are, and, where they decide, how often."""
    loss_weighting: Literal["nelbo", "simple"] = "nelbo"
    """Weight of hidden tokens in the training loss: that of the bound, or 1."""

    def __post_init__(self) -> None:
        if self.loss_weighting not in ("nelbo", "simple"):
            raise ValueError(
                f"loss_weighting must be 'nelbo' or 'simple', got {self.loss_weighting!r}; pick one of the two."
            )

    @property
    def exact(self) -> ExactCountMasking:
        """The exact counts of the same process, with the same training weights."""
        return ExactCountMasking(mixing=self.mixing, schedule=self.schedule, loss_weighting=self.loss_weighting)

    @abstractmethod
    def masked(self, samples: Samples, group_size: int, seed: int, *, validation: bool) -> MaskedTokens:
        """Hide tokens that are not given.

        Args:
            samples: Clean samples.
            group_size: Neighbours that share a level or a count; divides L.
            seed: The run's seed, in [0, 2**64).
            validation: Draw from the validation streams.
        """

    @abstractmethod
    def count(
        self,
        ordinal_B: Tensor,
        length_B: Tensor,
        num_tokens: int,
        group_size: int,
        seed: int,
        *,
        validation: bool,
        index_S: Tensor | None,
    ) -> int:
        """Bound the hidden tokens that count; see `Objective.count_active_rows`.

        Args:
            ordinal_B: Places in the training stream, int64, on the CPU.
            length_B: Tokens of each sample that may count, int64, on the CPU.
            num_tokens: L.
            group_size: Neighbours that share a level or a count.
            seed: The run's seed, in [0, 2**64).
            validation: Draw from the validation streams.
            index_S: Places in the sample, int64 on the CPU; None: all.
        """

    def rows(self, target_BS: Tensor, elbo_weight_BS: Tensor, counted_BS: Tensor) -> Rows:
        """Return cross-entropy rows under the bound's weights and the training weights that follow from them."""
        weight_BS = elbo_weight_BS
        if self.loss_weighting == "simple":
            weight_BS = (elbo_weight_BS > 0).to(elbo_weight_BS.dtype)
        return cross_entropy_rows(
            target_BS, counted_BS, self.mixing.mask_id, weight_BS=weight_BS, elbo_weight_BS=elbo_weight_BS
        )


@dataclass(frozen=True, kw_only=True)
class LevelMasking(Masking):
    """One noise level per group, every token hidden on its own.

    The weight is α/p(λ) = −α'/(1 − α): 1/t under the log-linear schedule. The bound does not depend on the schedule.

    Source: Sahoo et al., "Simple and effective masked diffusion language models" (arXiv 2406.07524).
    """

    noise: NoiseRows = noise_rows
    """What draws the noise: `noise_rows` or a fused version of it."""

    @property
    def process(self) -> DiffusionProcess:
        """The noise process of one token."""
        return DiffusionProcess(self.schedule, self.mixing)

    def weight(self, log_snr: Tensor) -> Tensor:
        """Return the bound's weight of a hidden token's −log x_θ(x) at a level; shape and dtype of `log_snr`."""
        return self.process.alpha(log_snr) / self.schedule.log_snr_pdf(log_snr)

    def masked(self, samples: Samples, group_size: int, seed: int, *, validation: bool) -> MaskedTokens:
        """Hide tokens by level; see `Masking.masked`. Tokens that do not count are hidden like others."""
        tokens_BL, counted_BL = samples.tokens_BL, samples.counted_BL
        num_groups = samples.length // group_size
        log_snr_BG = self._log_snr_BG(samples.ordinal_B, num_groups, seed, validation)
        weight_BG = self.weight(log_snr_BG)
        # One level per sample stays [B, 1], which broadcasts.
        repeats = group_size if num_groups > 1 else 1
        log_snr_BL, weight_BL = (
            level.to(samples.device).repeat_interleave(repeats, dim=1) for level in (log_snr_BG, weight_BG)
        )
        noised_BL = self.noise(
            tokens_BL,
            log_snr_BL,
            samples.ordinal_B.to(samples.device),
            counted_BL,
            seed,
            self.process,
            validation=validation,
        ).noised
        noised_BL = samples.with_given_clean(noised_BL)
        asked_BL = counted_BL & (noised_BL == self.mixing.mask_id)
        return MaskedTokens(
            noised_BL=noised_BL,
            elbo_weight_BL=torch.where(asked_BL, weight_BL, 0.0).float(),
            log_snr_BL=samples.with_given_levels(log_snr_BL, self.schedule.max_log_snr),
        )

    def count(
        self,
        ordinal_B: Tensor,
        length_B: Tensor,
        num_tokens: int,
        group_size: int,
        seed: int,
        *,
        validation: bool,
        index_S: Tensor | None,
    ) -> int:
        """Count the tokens that these levels hide; see `Masking.count`.

        Levels are taken a hair noisier, one token in 4e9 more, so that the bound holds on a device whose exponential
        differs from the CPU's in the last bits.
        """
        position_S = torch.arange(num_tokens) if index_S is None else index_S
        log_snr_BG = self._log_snr_BG(ordinal_B, num_tokens // group_size, seed, validation)
        noised_BS = self.noise(
            torch.full((len(ordinal_B), len(position_S)), 0 if self.mixing.mask_id != 0 else 1),
            log_snr_BG[:, position_S // group_size] - 1e-9,
            ordinal_B,
            torch.ones(len(ordinal_B), len(position_S), dtype=torch.bool),
            seed,
            self.process,
            validation=validation,
            position_L=position_S,
        ).noised
        return int(((noised_BS == self.mixing.mask_id) & (position_S < length_B[:, None])).sum())

    def _log_snr_BG(self, ordinal_B: Tensor, num_groups: int, seed: int, validation: bool) -> Tensor:
        return self.schedule.log_snr(_group_time(ordinal_B, num_groups, seed, validation))


@dataclass(frozen=True, kw_only=True)
class ExactCountMasking(Masking):
    """A number of hidden tokens per group, uniform in 1 … n, and a random choice of that many.

    n is the number of the group's tokens that count: others are never hidden. The weight is n/k. Nothing forces k to
    at least 1 after the fact, which would bias the bound. A model that is told levels is told the one that the group
    itself shows, the empirical logit log((n − k + ½)/(k + ½)) within the schedule's range: it depends on the noised
    tokens alone, so the bound stays one.

    Source: Nie et al., "Large language diffusion models" (arXiv 2502.09992).
    """

    def masked(self, samples: Samples, group_size: int, seed: int, *, validation: bool) -> MaskedTokens:
        """Hide a number of tokens, the first ones in a random order of the counted; see `Masking.masked`."""
        shape = (len(samples.ordinal_B), -1, group_size)
        counted_BGN = samples.counted_BL.view(shape)
        num_BG = counted_BGN.sum(-1)
        time_BG = _group_time(samples.ordinal_B, counted_BGN.shape[1], seed, validation).to(samples.device)
        hidden_BG = _hidden_tokens(time_BG, num_BG)

        ordinal_B = samples.ordinal_B.to(samples.device)
        position_L = torch.arange(samples.length, device=samples.device)
        purpose = Purpose.ORDER + (VALIDATION_OFFSET if validation else 0)
        key_BGN = random_words(seed, ordinal_B[:, None], position_L, purpose)[..., 0].view(shape)
        order_BGN = torch.where(counted_BGN, key_BGN, WORD_RANGE).argsort(dim=-1, stable=True)
        is_early_BGN = torch.arange(group_size, device=samples.device) < hidden_BG[..., None]
        is_hidden_BGN = torch.zeros_like(counted_BGN).scatter(-1, order_BGN, is_early_BGN)

        weight_BG = num_BG / hidden_BG.clamp(min=1).double()
        log_snr_BG = torch.logit((num_BG - hidden_BG + 0.5).double() / (num_BG + 1))
        log_snr_BG = log_snr_BG.clamp(self.schedule.min_log_snr, self.schedule.max_log_snr)
        log_snr_BL = log_snr_BG.repeat_interleave(group_size, dim=1)
        return MaskedTokens(
            noised_BL=samples.tokens_BL.masked_fill(is_hidden_BGN.view_as(samples.tokens_BL), self.mixing.mask_id),
            elbo_weight_BL=torch.where(is_hidden_BGN, weight_BG[..., None], 0.0).float().view_as(samples.tokens_BL),
            log_snr_BL=samples.with_given_levels(log_snr_BL, self.schedule.max_log_snr),
        )

    def count(
        self,
        ordinal_B: Tensor,
        length_B: Tensor,
        num_tokens: int,
        group_size: int,
        seed: int,
        *,
        validation: bool,
        index_S: Tensor | None,
    ) -> int:
        """Count the tokens that these numbers hide; see `Masking.count`.

        Which tokens hide depends on which count. So of a group that is partly in `index_S` all hidden tokens may be.
        """
        num_groups = num_tokens // group_size
        in_sample_BL = torch.arange(num_tokens) < length_B[:, None]
        is_meant_L = torch.ones(num_tokens, dtype=torch.bool)
        if index_S is not None:
            is_meant_L = torch.zeros_like(is_meant_L).index_fill(0, index_S, True)
        num_BG, meant_BG = (
            tokens_BL.view(len(ordinal_B), num_groups, group_size).sum(-1)
            for tokens_BL in (in_sample_BL, in_sample_BL & is_meant_L)
        )
        hidden_BG = _hidden_tokens(_group_time(ordinal_B, num_groups, seed, validation), num_BG)
        return int(torch.minimum(hidden_BG, meant_BG).sum())


def _group_time(ordinal_B: Tensor, num_groups: int, seed: int, validation: bool) -> Tensor:
    """Return the place of each group in the golden rotation, float64 [B, G] in [0, 1), on the host."""
    group_ordinal_BG = ordinal_B[:, None] * num_groups + torch.arange(num_groups)
    return sequence_time(seed, group_ordinal_BG, VALIDATION_OFFSET if validation else 0)


def _hidden_tokens(time_BG: Tensor, num_BG: Tensor) -> Tensor:
    """Turn a place in [0, 1) into a number of 1 … n, uniformly; 0 where n is 0; int64 [B, G]."""
    return torch.minimum((time_BG * num_BG).long() + 1, num_BG)
