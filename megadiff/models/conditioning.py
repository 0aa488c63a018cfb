"""What the first pipeline stage reads beside plain ids: noise levels, and mixtures of tokens.

Both act on the input embedding alone, so later stages, recomputation and attention know nothing of them. They are
modules of their own, called as such: hooks of overlapped parameter gathers run before the parameters are used.

Letters: S model length, B micro-batch, K ids of a mixture, H hidden size, F features of a noise level.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.utils import skip_init

NUM_LEVEL_FEATURES = 128
"""F: a sine and a cosine of each frequency."""
MAX_ABS_LOG_SNR = 16.0
"""Noise levels are clamped to ± this: beyond it α is 0 or 1 to six digits."""
LONGEST_PERIOD, SHORTEST_PERIOD = 128.0, 1.0
"""Of the features, in units of log-SNR, in between geometric: the longest grows along the whole range."""


class LogSnrEmbedding(nn.Module):
    """Noise levels as vectors that are added to the embedded tokens: sinusoidal features and a two-layer SiLU MLP.

    The last matrix starts at zero, so that the model starts as one that is not conditioned. Parameters are the same on
    all tensor-parallel ranks. Under sequence parallelism each rank computes its own positions, and Megatron sums the
    gradients of parameters that are marked for it.

    Source: features and MLP of Peebles and Xie (arXiv 2212.09748), of log-SNR in place of time as in Kingma et al.
    (arXiv 2107.00630).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, dtype = config.hidden_size, config.params_dtype
        self.linear_1 = skip_init(nn.Linear, NUM_LEVEL_FEATURES, hidden, dtype=dtype)
        self.linear_2 = skip_init(nn.Linear, hidden, hidden, dtype=dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, log_snr_SB: Tensor) -> Tensor:
        """Embed noise levels: [S, B] to [S, B, H], in the parameters' dtype."""
        features_SBF = level_features(log_snr_SB).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features_SBF)))


def level_features(log_snr: Tensor) -> Tensor:
    """Return sines and cosines of noise levels, float32: [...] to [..., F]."""
    exponent_D = torch.linspace(0, 1, NUM_LEVEL_FEATURES // 2, dtype=torch.float32, device=log_snr.device)
    frequency_D = 2 * math.pi / LONGEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** exponent_D
    angle_D = log_snr.float().clamp(-MAX_ABS_LOG_SNR, MAX_ABS_LOG_SNR)[..., None] * frequency_D
    return torch.cat([angle_D.sin(), angle_D.cos()], dim=-1)


class MixtureEmbedding(VocabParallelEmbedding):
    """Megatron's embedding, which also takes mixtures of K ids per position."""

    def forward(self, input_: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Embed ids [B, S], or mixtures: ids and weights, [B, S, K] each, of which the weights are data.

        Each rank sums the rows of its part of the vocabulary without ever holding K rows per position; the sums are
        added up over the tensor-parallel ranks as for plain ids.
        """
        if isinstance(input_, Tensor):
            return super().forward(input_)
        ids_BSK, weights_BSK = input_
        is_here_BSK = (ids_BSK >= self.vocab_start_index) & (ids_BSK < self.vocab_end_index)
        partial_TH = F.embedding_bag(
            torch.where(is_here_BSK, ids_BSK - self.vocab_start_index, 0).flatten(0, 1),
            self.weight,
            per_sample_weights=torch.where(is_here_BSK, weights_BSK, 0.0).to(self.weight.dtype).flatten(0, 1),
            mode="sum",
        )
        partial_BSH = partial_TH.unflatten(0, ids_BSK.shape[:2])
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(
                partial_BSH.transpose(0, 1).contiguous(), group=self.tp_group
            )
        return reduce_from_tensor_model_parallel_region(partial_BSH, group=self.tp_group)


class InputEmbedding(LanguageModelEmbedding):
    """Megatron's input embedding, which takes mixtures and adds noise levels where it has an embedding of them."""

    level_embedding: LogSnrEmbedding | None

    @staticmethod
    def replace(embedding: LanguageModelEmbedding, *, log_snr_conditioning: bool) -> None:
        """Turn Megatron's embedding, for which models take no spec, into this one."""
        embedding.__class__ = InputEmbedding
        embedding.word_embeddings.__class__ = MixtureEmbedding
        embedding.level_embedding = LogSnrEmbedding(embedding.config) if log_snr_conditioning else None

    def forward(  # type: ignore[override]
        self,
        noised_BS: Tensor,
        position_BS: Tensor,
        *,
        log_snr_BS: Tensor | None = None,
        soft_ids_BSK: Tensor | None = None,
        soft_weights_BSK: Tensor | None = None,
    ) -> Tensor:
        """Embed a micro-batch; see `Denoiser.forward`. Returns [S, B, H], or this rank's [S / tp, B, H]."""
        ids = noised_BS if soft_ids_BSK is None else (soft_ids_BSK, soft_weights_BSK)
        embedded_SBH = super().forward(ids, position_BS)
        if self.level_embedding is None:
            return embedded_SBH
        assert log_snr_BS is not None, "a denoiser that is conditioned on noise levels needs them"
        log_snr_SB = log_snr_BS.t()
        if self.reduce_scatter_embeddings:
            log_snr_SB = log_snr_SB.chunk(self.tp_group.size())[self.tp_group.rank()]
        return embedded_SBH + self.level_embedding(log_snr_SB)
