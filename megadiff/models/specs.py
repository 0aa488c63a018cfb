"""Which module does what in a layer: Megatron-Core's `ModuleSpec`, filled for a denoiser.

`layer_spec` is the only place that knows an implementation. The local one runs everywhere: Megatron's parallel
linears with our norm and core attention. Core attention may be Transformer Engine's instead; nothing else changes.
"""

from __future__ import annotations

from typing import Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megadiff.models.attention import CoreAttention, RMSNorm
from megadiff.models.te_attention import TransformerEngineAttention

AttentionBackend = Literal["local", "transformer_engine"]
"""Whose kernels compute core attention: torch's, or Transformer Engine's."""


def layer_spec(attention: AttentionBackend) -> ModuleSpec:
    """One pre-norm transformer layer that attends in both directions."""
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
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TransformerConfig, attention: AttentionBackend, pipeline_rank: int, virtual_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage and the final norm."""
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(attention)] * num_layers, layer_norm=RMSNorm)
