"""Eso-LM: masked diffusion under causal attention in random order, finished by an autoregressive term.

A sequence is masked down to α₀ of its tokens by a sequential term and from there on by a diffusion term:

    NELBO = E_{z₀ ~ q_{α₀}} [−Σ_{z₀ masked} log x_θ(x | z₀, x before)]  +  ∫ −α'/(1 − α) Σ_{z_t masked} CE dt

Both attend causally over one order: first the clean tokens, at random, then the masked ones, at random where they are
denoised, from left to right where they are predicted one by one. Tokens keep the rotary phases of their places. A clean
token so never sees a mask nor what is clean only later, and decoding in any order can cache keys and values exactly.

At α₀ = 1 the model reads the permuted sequence. Below it reads [z | x] of length 2L, both permuted alike: a position of
the first half sees itself and the places before it in the second half, from where a masked token sees true tokens. The
diffusion term puts z into both halves: the second half is then causal attention over z, and a position of the first,
which reads the same input and sees the same places, repeats it exactly. So one layout serves both terms, and which of
them a sequence trains is drawn from its ordinal.

Source: Sahoo et al., "Esoteric language models" (arXiv 2506.01928); schedule and weights as in arXiv 2602.15014. The
sequential term is that of normalised probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.layout import AttentionLayout
from megadiff.diffusion.mixing import MaskedMixing
from megadiff.diffusion.noising import NoiseRows, noise_rows, sequence_log_snr
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.rows import NoisedBatch, cross_entropy_rows
from megadiff.diffusion.samples import Samples
from megadiff.diffusion.schedule import NoiseSchedule
from megadiff.philox import VALIDATION_OFFSET, WORD_RANGE, Purpose, random_words


class _Draws(NamedTuple):
    """What whole sequences decide, on the host."""

    is_sequential_B: Tensor
    log_snr_B: Tensor
    weight_B: Tensor
    elbo_weight_B: Tensor


@dataclass(frozen=True, kw_only=True)
class EsoLmObjective:
    """One of the two terms per sequence, weighted so that their sum is estimated without bias.

    Raises:
        ValueError: If a term would be left out.
    """

    vocab_size: int
    mask_id: int
    alpha_0: float
    """Share of the tokens that diffusion writes, in [0, 1]."""
    sequential_share: float
    """Share of the sequences that estimate the sequential term: 0 at `alpha_0` 1, 1 at 0, between them in between."""
    epsilon: float = 1e-3
    """ε of α = α₀·(1 − (1 − ε)·t) with t in [ε, 1]."""
    loss_weighting: Literal["nelbo", "simple"] = "nelbo"
    """Weight of the diffusion term in training: −α'/(1 − α), or 1."""
    random_length_fraction: float = 0.0
    """Share of the training samples that are cut to a random length."""
    noise: NoiseRows = noise_rows
    """What draws the noise: `noise_rows` or a fused version of it."""

    def __post_init__(self) -> None:
        """Check what would leave a term out."""
        share, least, most = self.sequential_share, float(self.alpha_0 == 0), float(self.alpha_0 < 1)
        fits = least <= share <= most and (share not in (0.0, 1.0) or self.alpha_0 in (0.0, 1.0))
        if not (0.0 <= self.alpha_0 <= 1.0 and fits):
            raise ValueError(
                "alpha_0 must lie in [0, 1], and sequential_share be 0 where it is 1, 1 where it is 0, and in between "
                f"elsewhere, got {self.alpha_0} and {share}; 1 - alpha_0 is a good share."
            )

    def sequence_length(self, num_tokens: int) -> int:
        """Return L where diffusion writes all tokens, 2L where there is a sequential term."""
        return 2 * num_tokens if self._is_doubled else num_tokens

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Mask, permute and, with a sequential term, double a batch; see `Objective.noised_batch`."""
        if not validation:
            samples = samples.shortened_at_random(self.random_length_fraction, seed)
        draws = self._draws(samples.ordinal_B, seed, validation)
        is_sequential_B1 = draws.is_sequential_B.to(samples.device)[:, None]
        noised_BL = self._noised(samples, draws.log_snr_B, seed, validation)
        order_BL = self._order(samples, noised_BL, is_sequential_B1, seed, validation)

        tokens_BL, noised_BL, counted_BL, position_BL = (
            x.gather(1, order_BL) for x in (samples.tokens_BL, noised_BL, samples.counted_BL, samples.position_BL)
        )
        document_BL = None if samples.document_BL is None else samples.document_BL.gather(1, order_BL)
        is_active_BL = counted_BL & (noised_BL == self.mask_id)
        weight_BL, elbo_weight_BL = (
            torch.where(is_active_BL, of_sequence_B.to(samples.device)[:, None], 0.0)
            for of_sequence_B in (draws.weight_B, draws.elbo_weight_B)
        )
        if not self._is_doubled:
            return NoisedBatch(
                noised_BS=noised_BL,
                position_BS=position_BL,
                layout=AttentionLayout("causal", document_BL),
                rows=cross_entropy_rows(
                    tokens_BL, counted_BL, self.mask_id, weight_BS=weight_BL, elbo_weight_BS=elbo_weight_BL
                ),
            )
        place_S = torch.arange(2 * samples.length, device=samples.device)
        return NoisedBatch(
            noised_BS=torch.cat([noised_BL, torch.where(is_sequential_B1, tokens_BL, noised_BL)], dim=1),
            position_BS=position_BL.repeat(1, 2),
            layout=AttentionLayout(
                "block_diffusion",
                None if document_BL is None else document_BL.repeat(1, 2),
                block_size=1,
                query_Q=place_S,
                key_K=place_S,
            ),
            rows=cross_entropy_rows(
                tokens_BL.repeat(1, 2),
                _before_zeros(counted_BL),
                self.mask_id,
                weight_BS=_before_zeros(weight_BL),
                elbo_weight_BS=_before_zeros(elbo_weight_BL),
            ),
        )

    def count_active_rows(
        self,
        ordinal_B: Tensor,
        num_tokens: int,
        seed: int,
        *,
        validation: bool = False,
        index_S: Tensor | None = None,
    ) -> int | None:
        """Count masked tokens, which stand at the end of the order; see `Objective.count_active_rows`.

        Given tokens are clean whatever is drawn, so that fewer are masked and still the last. The level is taken a
        hair noisier, for devices whose exponential differs from the CPU's in the last bits.
        """
        any_token = 0 if self.mask_id != 0 else 1
        samples = Samples(
            tokens_BL=torch.full((len(ordinal_B), num_tokens), any_token),
            counted_BL=torch.ones(len(ordinal_B), num_tokens, dtype=torch.bool),
            ordinal_B=ordinal_B,
        )
        log_snr_B = self._draws(ordinal_B, seed, validation).log_snr_B - 1e-9
        masked_B = (self._noised(samples, log_snr_B, seed, validation) == self.mask_id).sum(dim=1)
        index_S = torch.arange(num_tokens) if index_S is None else index_S
        is_active_BS = (index_S >= num_tokens - masked_B[:, None]) & (index_S < num_tokens)
        return int(is_active_BS.sum())

    @property
    def _is_doubled(self) -> bool:
        return self.alpha_0 < 1

    @cached_property
    def _schedule(self) -> NoiseSchedule:
        """α from α₀·ε to α₀·(1 − (1 − ε)·ε); asked for only where there is a diffusion term."""
        ends = (self.alpha_0 * self.epsilon, self.alpha_0 * (1 - (1 - self.epsilon) * self.epsilon))
        return NoiseSchedule(*(math.log(alpha / (1 - alpha)) for alpha in ends))

    def _draws(self, ordinal_B: Tensor, seed: int, validation: bool) -> _Draws:
        """Choose term, level and weights of each sequence, float64.

        Weights are divided by the probability of the term.
        """
        offset = VALIDATION_OFFSET if validation else 0
        term_word_B = random_words(seed, ordinal_B, 0, Purpose.SEQUENCE + offset, block=1)[:, 2]
        is_sequential_B = term_word_B < round(self.sequential_share * WORD_RANGE)
        # At −50 nothing is kept. No level is left for diffusion then, and no sequence that would train it.
        last_level = torch.tensor(self.alpha_0, dtype=torch.float64, device="cpu").logit().clamp(-50, 50)
        level_B = (
            sequence_log_snr(self._schedule, seed, ordinal_B, offset)
            if self.alpha_0 > 0
            else last_level.expand(ordinal_B.shape)
        )
        elbo_weight_B = self.alpha_0 * (1 - self.epsilon) / torch.sigmoid(-level_B)
        weight_B = torch.ones_like(elbo_weight_B) if self.loss_weighting == "simple" else elbo_weight_B
        probability_B = torch.where(is_sequential_B, self.sequential_share, 1 - self.sequential_share)
        return _Draws(
            is_sequential_B,
            torch.where(is_sequential_B, last_level, level_B),
            torch.where(is_sequential_B, 1.0, weight_B) / probability_B,
            torch.where(is_sequential_B, 1.0, elbo_weight_B) / probability_B,
        )

    def _noised(self, samples: Samples, log_snr_B: Tensor, seed: int, validation: bool) -> Tensor:
        """Return z in the order of the text, [B, L]; given tokens stay."""
        process = DiffusionProcess(NoiseSchedule(), MaskedMixing(self.vocab_size, self.mask_id))
        noised_BL = self.noise(
            samples.tokens_BL,
            log_snr_B.to(samples.device)[:, None],
            samples.ordinal_B.to(samples.device),
            samples.counted_BL,
            seed,
            process,
            validation=validation,
        ).noised
        return samples.with_given_clean(noised_BL)

    def _order(
        self, samples: Samples, noised_BL: Tensor, is_sequential_B1: Tensor, seed: int, validation: bool
    ) -> Tensor:
        """Return the places of the text in the order in which the model reads them, int64 [B, L].

        Given tokens come first, then clean ones, then masked ones: each at random, but for masked ones of the
        sequential term, which keep the order of the text.
        """
        place_L = torch.arange(samples.length, device=samples.device)
        purpose = Purpose.ORDER + (VALIDATION_OFFSET if validation else 0)
        word_BL = random_words(seed, samples.ordinal_B.to(samples.device)[:, None], place_L, purpose)[..., 0]
        is_masked_BL = noised_BL == self.mask_id
        group_BL = is_masked_BL.long() + (1 if samples.given_BL is None else (~samples.given_BL).long())
        within_BL = torch.where(is_sequential_B1 & is_masked_BL, place_L, word_BL)
        return (group_BL * WORD_RANGE + within_BL).argsort(dim=1, stable=True)


def _before_zeros(x_BL: Tensor) -> Tensor:
    """Return what the first half of a doubled sequence has, and zeros for the second, [B, 2L]."""
    return torch.cat([x_BL, torch.zeros_like(x_BL)], dim=1)
