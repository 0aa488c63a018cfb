"""The diffusion process: marginals, transitions, posteriors and loss weights of one token.

    q_λ(·|x) = α·e_x + (1 − α)·π_λ,    α = σ(λ),    π_λ from the mixing distribution.

All formulas are functions of the log-SNR λ and act on one token; tokens are noised independently. A log-SNR
tensor broadcasts against token tensors, and results have its dtype: float64 in gives float64 out. Where two
noise levels meet, t is the noisier one and s the cleaner one. Clean distributions (`xhat`) give the mask no
probability.

Source: von Rütte et al. (arXiv 2512.10858), §2.3–2.4 and Proposition 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.diffusion.mixing import MixingDistribution
from megadiff.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class DiffusionProcess:
    """A noise schedule and a mixing distribution, with everything that follows from the two."""

    schedule: NoiseSchedule
    mixing: MixingDistribution

    def alpha(self, log_snr: Tensor) -> Tensor:
        """Return α = σ(λ), the probability that a token is kept; shape of `log_snr`."""
        return torch.sigmoid(log_snr)

    def uniform_mass(self, log_snr: Tensor) -> Tensor:
        """Return c = (1 − α)·s/K, the probability of each single uniform state; shape of `log_snr`."""
        return torch.sigmoid(-log_snr) * self.mixing.uniform_share(log_snr) / self.mixing.num_uniform_states

    def log_uniform_mass(self, log_snr: Tensor) -> Tensor:
        """Return log c without underflow, −inf where there is no uniform noise; shape of `log_snr`."""
        log_share = F.logsigmoid(self.mixing.log_odds(log_snr))
        return F.logsigmoid(-log_snr) + log_share - math.log(self.mixing.num_uniform_states)

    @cached_property
    def any_uniform_mass(self) -> bool:
        """Whether uniform noise has any probability, in float64, on the schedule's range."""
        ends = torch.tensor([self.schedule.min_log_snr, self.schedule.max_log_snr], dtype=torch.float64, device="cpu")
        return bool(self.mixing.uniform_share(ends).any())  # a share is monotone: its ends decide

    def marginal(self, log_snr: Tensor, xhat: Tensor) -> Tensor:
        """Return q_λ(·|x̂) = α·x̂ + (1 − α)·π_λ.

        Args:
            log_snr: Broadcastable to [...].
            xhat: Distributions over clean tokens, [..., V].

        Returns:
            Distributions over noised tokens, [..., V].
        """
        noise = torch.sigmoid(-log_snr).unsqueeze(-1) * self.mixing.probs(log_snr)
        return self.alpha(log_snr).unsqueeze(-1) * xhat + noise

    def marginal_at(self, log_snr: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
        """Return q_λ(ids | tokens), the probability of one noised id per clean token; broadcast shape."""
        kept = torch.where(tokens == ids, self.alpha(log_snr), 0.0)
        return kept + torch.sigmoid(-log_snr) * self.mixing.probs_at(log_snr, ids)

    def prior(self, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
        """Return pure noise, π at the schedule's lowest log-SNR; shape [V]."""
        return self.mixing.probs(torch.tensor(self.schedule.min_log_snr, dtype=dtype, device=device))

    def loss_weight(self, log_snr: Tensor, tokens: Tensor, noised: Tensor) -> Tensor:
        """Return the weight w of the bound's two divergences, in closed form.

        By definition w = (1 − α)·(π − π')_z / q_λ(z|x). With a the scale of the mixing's log-odds this is
        1 + a·s at the mask, 1 − a·(1 − s) at a noise token, and s·(1 − a·(1 − s)) / (s + K·e^λ) at z = x:
        the same numbers with no division by a vanishing probability, so masked and uniform limits are exact.

        Args:
            log_snr: Broadcastable to the tokens' shape.
            tokens: Clean ids x, [...].
            noised: Noised ids z, [...].

        Returns:
            w, [...].

        Source: von Rütte et al. (arXiv 2512.10858), Proposition 1.
        """
        share = self.mixing.uniform_share(log_snr)
        scale = self.mixing.scale
        at_noise = (1.0 - scale) + scale * share  # 1 − a(1 − s), kept relative to a small share
        at_clean = share * at_noise / (share + self.mixing.num_uniform_states * log_snr.exp())
        weight = torch.where(noised == tokens, at_clean, at_noise)
        if self.mixing.mask_is_uniform_state:
            return weight
        return torch.where(noised == self.mixing.mask_id, 1.0 + scale * share, weight)

    def elbo_weight(self, log_snr: Tensor, tokens: Tensor, noised: Tensor) -> Tensor:
        """Return w/p(λ), the weight under which the divergences average to the NELBO when λ ~ p; [...].

        p is the schedule's published, un-normalised density.
        """
        return self.loss_weight(log_snr, tokens, noised) / self.schedule.log_snr_pdf(log_snr)

    def transition(self, log_snr_t: Tensor, log_snr_s: Tensor, noised_s: Tensor) -> Tensor:
        """Return q(z_t | z_s), one forward step from level s to the noisier level t.

        Args:
            log_snr_t: log-SNR after the step, broadcastable to [...].
            log_snr_s: log-SNR before it, not below `log_snr_t`; broadcastable to [...].
            noised_s: Ids z_s, [...].

        Returns:
            Distributions over z_t, [..., V].
        """
        ids_V = torch.arange(self.mixing.vocab_size, device=noised_s.device)
        keep = self._transition_keep(log_snr_t, log_snr_s).unsqueeze(-1)
        noise = self._transition_noise_at(log_snr_t.unsqueeze(-1), log_snr_s.unsqueeze(-1), ids_V)
        return torch.where(noised_s.unsqueeze(-1) == ids_V, keep, 0.0) + noise

    def posterior(self, log_snr_t: Tensor, log_snr_s: Tensor, noised: Tensor, xhat: Tensor) -> Tensor:
        """Return q(z_s | z_t, x̂), one reverse step from level t to the cleaner level s.

        Where the model rules the noised id out altogether, the id stays.

        Args:
            log_snr_t: log-SNR of `noised`, broadcastable to [...].
            log_snr_s: log-SNR after the step, not below `log_snr_t`; broadcastable to [...].
            noised: Ids z_t, [...].
            xhat: Distributions over clean tokens, [..., V].

        Returns:
            Distributions over z_s, [..., V].
        """
        keep = self._transition_keep(log_snr_t, log_snr_s)
        noise = self._transition_noise_at(log_snr_t, log_snr_s, noised)
        return _condition(self.marginal(log_snr_s, xhat), keep, noise, noised)

    def clean_posterior(self, log_snr: Tensor, noised: Tensor, xhat: Tensor) -> Tensor:
        """Return p(x | z) ∝ x̂(x)·q_λ(z|x), the `posterior` all the way to clean tokens.

        The bound is tight when x̂ is the posterior given the *other* tokens; this adds the evidence of the
        token itself.

        Args:
            log_snr: log-SNR of `noised`, broadcastable to [...].
            noised: Ids z, [...].
            xhat: Distributions over clean tokens, [..., V].

        Returns:
            Distributions over clean tokens, [..., V]; ids without probability in `xhat` have none here.
        """
        noise = torch.sigmoid(-log_snr) * self.mixing.probs_at(log_snr, noised)
        return _condition(xhat, self.alpha(log_snr), noise, noised)

    def renewal(self, log_snr_t: Tensor, log_snr_s: Tensor, noised: Tensor, xhat: Tensor) -> Tensor:
        """Return Σ_x q(z_s | x)·p(x | z_t, x̂): the clean token is guessed and noised anew, to level s.

        Like the `posterior`, it leads from the marginal at t to the marginal at s, but it keeps nothing of the noise
        that was there. So any mixture of the two is a reverse step as well: with 1 − κ of this one, a Ψ-step, and on
        masked noise the step of ReMDM that hides a token again with probability σ = (1 − κ)·(1 − α_s).

        Args:
            log_snr_t: log-SNR of `noised`, broadcastable to [...].
            log_snr_s: log-SNR after the step, broadcastable to [...].
            noised: Ids z_t, [...].
            xhat: Distributions over clean tokens, [..., V].

        Returns:
            Distributions over z_s, [..., V].

        Source: Ψ-samplers of Deschenaux et al. (arXiv 2602.21185); Wang et al., ReMDM (arXiv 2503.00307).
        """
        return self.marginal(log_snr_s, self.clean_posterior(log_snr_t, noised, xhat))

    def _transition_keep(self, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
        """Return α_{t|s} = α_t/α_s."""
        return self.alpha(log_snr_t) / self.alpha(log_snr_s)

    def _transition_noise_at(self, log_snr_t: Tensor, log_snr_s: Tensor, ids: Tensor) -> Tensor:
        """Return (1 − α_t)·π_t − α_{t|s}·(1 − α_s)·π_s at `ids`; clamped, as rounding may leave −1e-17."""
        noise_t = torch.sigmoid(-log_snr_t) * self.mixing.probs_at(log_snr_t, ids)
        noise_s = torch.sigmoid(-log_snr_s) * self.mixing.probs_at(log_snr_s, ids)
        return (noise_t - self._transition_keep(log_snr_t, log_snr_s) * noise_s).clamp(min=0.0)


def _condition(before: Tensor, keep: Tensor, noise: Tensor, noised: Tensor) -> Tensor:
    """Apply Bayes' rule: distributions over ids v before a step, [..., V], given the id `noised` after it.

    From v the step leads to `noised` with probability keep·1[v = noised] + noise; both broadcast to [...].
    """
    noised_index = noised.unsqueeze(-1)
    kept = keep.unsqueeze(-1) * before.gather(-1, noised_index)
    joint = (before * noise.unsqueeze(-1)).scatter_add(-1, noised_index, kept)
    total = joint.sum(-1, keepdim=True)
    impossible = (total == 0).to(joint.dtype)  # then the id stays
    return joint.scatter_add(-1, noised_index, impossible) / (total + impossible)
