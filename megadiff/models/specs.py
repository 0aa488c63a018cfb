"""Which module does what in a layer: Megatron-Core's `ModuleSpec`, filled for a denoiser.

`layer_spec` is the only place that knows an implementation. The local one runs everywhere: Megatron's parallel
linears with our norm and core attention. Core attention may be Transformer Engine's instead; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
from megadiff.models.config import AttentionBackend
from megadiff.models.linears import SwiGLU
from megadiff.models.te_attention import TransformerEngineAttention


def residual_add(multiplier: float) -> Callable[..., Any]:
    """What Megatron's layers add a branch to the residual stream with: residual + multiplier·branch, rounded once.

    It stands in the place of `get_bias_dropout_add`: denoisers have neither biases nor dropout there.
    """

    def get_residual_add(training: bool, fused: bool) -> Callable[..., Tensor]:
        def add(output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
            return torch.add(residual, output_with_bias[0], alpha=multiplier)

        return add

    return get_residual_add


def layer_spec(
    attention: AttentionBackend, *, is_gated: bool, qk_layernorm: bool, residual_multiplier: float
) -> ModuleSpec:
    """One pre-norm transformer layer that attends as an `AttentionLayout` says."""
    qk_norm = RMSNorm if qk_layernorm else None
    add = residual_add(residual_multiplier)
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
            self_attn_bda=add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=SwiGLU if is_gated else ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=add,
        ),
    )


def block_spec(
    config: TransformerConfig,
    attention: AttentionBackend,
    pipeline_rank: int,
    virtual_stage: int | None = None,
    *,
    is_gated: bool,
    residual_multiplier: float,
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage and the final norm.

    Args:
        is_gated: whether feed-forward layers are gated; Megatron's configuration does not say so.
        residual_multiplier: of what each branch adds to the residual stream.
    """
    layer = layer_spec(
        attention, is_gated=is_gated, qk_layernorm=config.qk_layernorm, residual_multiplier=residual_multiplier
    )
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
