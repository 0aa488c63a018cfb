"""Which module does what in a layer: Megatron-Core's `ModuleSpec`, filled for a denoiser.

`layer_spec` is the only place that knows an implementation. The local one runs everywhere: Megatron's parallel
linears with our norm and core attention. Core attention may be Transformer Engine's instead; nothing else changes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megadiff.models.attention import CoreAttention, RMSNorm
from megadiff.models.te_attention import TransformerEngineAttention

AttentionBackend = Literal["local", "transformer_engine"]
"""Whose kernels compute core attention: torch's, or Transformer Engine's."""


class SwiGLU(ColumnParallelLinear):
    """The first matrix of a gated feed-forward layer and its activation, silu(gate)·up; [S, B, H] to [S, B, F].

    Rows of gate and up alternate. So a tensor-parallel rank holds a range of rows as of any other matrix, which every
    layout can save, load and initialise; Megatron's gated layers hold two ranges, of which the rest here knows nothing.

    Source: Shazeer (arXiv 2002.05202).
    """

    def __init__(self, input_size: int, output_size: int, **settings: Any) -> None:
        super().__init__(input_size, 2 * output_size, **settings)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The product of both halves, and no bias."""
        product, bias = super().forward(input_, *args, **kwargs)
        gate, up = product.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.nn.functional.silu(gate) * up, bias


def layer_spec(attention: AttentionBackend, *, is_gated: bool, qk_layernorm: bool) -> ModuleSpec:
    """One pre-norm transformer layer that attends as an `AttentionLayout` says."""
    qk_norm = RMSNorm if qk_layernorm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=TransformerEngineAttention if attention == "transformer_engine" else CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=SwiGLU if is_gated else ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TransformerConfig,
    attention: AttentionBackend,
    pipeline_rank: int,
    virtual_stage: int | None = None,
    *,
    is_gated: bool,
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage and the final norm.

    Args:
        is_gated: whether feed-forward layers are gated; Megatron's configuration does not say so.
    """
    layer = layer_spec(attention, is_gated=is_gated, qk_layernorm=config.qk_layernorm)
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
