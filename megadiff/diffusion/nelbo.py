"""The bound on −log p(x), written densely: the reference that every fused or sharded loss is checked against.

Both marginals are materialised over the vocabulary in log space. Nothing here is fast; everything is
differentiable, exact in the masked limit, and free of NaN in value and gradient at the ends of every range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.diffusion.process import DiffusionProcess


class NelboTerms(NamedTuple):
    """The parts of the bound, per token and in nats, each of the tokens' shape."""

    kl_div: Tensor
    """KL(q_λ(·|x) ‖ q_λ(·|x_θ))."""
    is_div: Tensor
    """Itakura-Saito divergence r − log r − 1 of r = q_λ(z|x) / q_λ(z|x_θ); 0 where q_λ(z|x) = 0."""
    loss_weight: Tensor
    """w, the weight of the training loss."""
    elbo_weight: Tensor
    """w/p(λ), the weight of the bound, with the published un-normalised p."""
    nelbo: Tensor
    """elbo_weight·(kl_div + is_div); its mean over λ ~ p and z ~ q is the bound. 0 where the weight is 0."""


def nelbo_terms(
    logits: Tensor, tokens: Tensor, noised: Tensor, log_snr: Tensor, process: DiffusionProcess
) -> NelboTerms:
    """Compute the terms of the negative evidence lower bound at given noise.

    Prior and reconstruction terms at the ends of the schedule are left out, as in all published code.

    Args:
        logits: Denoiser outputs, [..., V]; the mask's logit is ignored. Below float32 they are raised to
            float32, otherwise their dtype is the dtype of the computation and of the results.
        tokens: Clean ids x, [...], never the mask.
        noised: Noised ids z, [...].
        log_snr: λ of each token, broadcastable to [...]: per token, per sequence as [B, 1], or a scalar
            tensor.
        process: The diffusion process that produced `noised`.

    Returns:
        Five tensors of the tokens' shape; differentiable with respect to `logits`.

    Raises:
        ValueError: If the shapes do not fit together or the logits do not have V columns.

    Source: von Rütte et al. (arXiv 2512.10858), Proposition 1.
    """
    if logits.shape != (*tokens.shape, process.mixing.vocab_size) or noised.shape != tokens.shape:
        raise ValueError(
            f"logits and noised must have shapes {(*tokens.shape, process.mixing.vocab_size)} and "
            f"{tuple(tokens.shape)} to fit tokens and the vocabulary, got {tuple(logits.shape)} and "
            f"{tuple(noised.shape)}; cut padded vocabulary columns first."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_snr = torch.as_tensor(log_snr, device=logits.device).to(dtype)
    if len(log_snr.shape) > tokens.dim() or any(
        size not in (1, wanted) for size, wanted in zip(log_snr.shape[::-1], tokens.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"log_snr must broadcast to the tokens' shape {tuple(tokens.shape)}, got {tuple(log_snr.shape)}; "
            "give one value per token, [B, 1] for one per sequence, or a scalar."
        )

    # Clean distributions x and x_θ. Neither gives the mask any probability, so their marginals agree there
    # and the mask's column adds nothing to a divergence: one common finite value stands for both.
    is_mask_V = torch.arange(process.mixing.vocab_size, device=logits.device) == process.mixing.mask_id
    log_xhat_V = logits.to(dtype).masked_fill(is_mask_V, -math.inf).log_softmax(-1)
    log_x_V = torch.full_like(log_xhat_V, -math.inf).scatter(-1, tokens.unsqueeze(-1), 0.0)
    log_xhat_V, log_x_V = log_xhat_V.masked_fill(is_mask_V, 0.0), log_x_V.masked_fill(is_mask_V, 0.0)

    # Marginals q(v|·) = α·(·)_v + c.
    log_alpha = F.logsigmoid(log_snr).unsqueeze(-1)
    log_uniform_mass = process.log_uniform_mass(log_snr).unsqueeze(-1)
    log_q_V = torch.logaddexp(log_alpha + log_x_V, log_uniform_mass)
    log_p_V = torch.logaddexp(log_alpha + log_xhat_V, log_uniform_mass)

    # Divergences, with the convention 0·log 0 = 0.
    q_V = log_q_V.exp()
    log_ratio_V = torch.where(q_V > 0, log_q_V - log_p_V, 0.0)
    kl_div = (q_V * log_ratio_V).sum(-1)
    log_ratio = log_ratio_V.gather(-1, noised.unsqueeze(-1)).squeeze(-1)

    loss_weight = process.loss_weight(log_snr, tokens, noised)
    elbo_weight = process.elbo_weight(log_snr, tokens, noised)
    # A kept token of the masked process has weight 0 and a ratio that may overflow; it must not make 0·∞.
    weighted_log_ratio = torch.where(loss_weight != 0, log_ratio, 0.0)
    nelbo = elbo_weight * (kl_div + _itakura_saito(weighted_log_ratio))
    return NelboTerms(kl_div, _itakura_saito(log_ratio), loss_weight, elbo_weight, nelbo)


def _itakura_saito(log_ratio: Tensor) -> Tensor:
    """Return r − log r − 1 from log r."""
    return torch.expm1(log_ratio) - log_ratio
