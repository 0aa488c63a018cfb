"""Which module does what in a layer: Megatron-Core's `ModuleSpec`, filled for a denoiser.

`linears_of_layer` and `layer_spec` are the only places that know an implementation. The local one runs everywhere:
Megatron's parallel linears with our norm and core attention. Linears may be Transformer Engine's, with the norms before
them, or round their products to FP8; core attention may be Transformer Engine's, whatever the linears are. All have the
same parameters, and the same names for them in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megadiff.models.attention import RMSNorm
from megadiff.models.config import AttentionBackend
from megadiff.models.fp8_emulation import Emulation, emulated_linears
from megadiff.models.linears import Linears, local_linears
from megadiff.models.rotary import RotaryCoreAttention, RotaryTransformerEngineAttention
from megadiff.models.te_linears import transformer_engine_linears


def residual_add(multiplier: float) -> Callable[..., Any]:
    """What Megatron's layers add a branch to the residual stream with: residual + multiplier·branch, rounded once.

    It stands in the place of `get_bias_dropout_add`: denoisers have neither biases nor dropout there.
    """

    def get_residual_add(training: bool, fused: bool) -> Callable[..., Tensor]:
        def add(output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
            return torch.add(residual, output_with_bias[0], alpha=multiplier)

        return add

    return get_residual_add


def linears_of_layer(
    config: TransformerConfig, layer: int, *, is_gated: bool, emulation: Emulation | None = None
) -> Linears:
    """Who multiplies in a layer of the whole model, counted from 0.

    Args:
        emulation: of FP8, in local layers that are not to stay in higher precision; Transformer Engine asks Megatron.
    """
    if config.transformer_impl == "transformer_engine":
        return transformer_engine_linears(is_gated=is_gated)
    if emulation is None or is_first_last_bf16_layer(config, layer):
        return local_linears(is_gated=is_gated)
    return emulated_linears(emulation, is_gated=is_gated)


def layer_spec(
    linears: Linears, attention: AttentionBackend, *, qk_layernorm: bool, residual_multiplier: float
) -> ModuleSpec:
    """One pre-norm transformer layer that attends as an `AttentionLayout` says."""
    norm = IdentityOp if linears.fuses_norms else RMSNorm
    qk_norm = RMSNorm if qk_layernorm else None
    core_attention = RotaryTransformerEngineAttention if attention == "transformer_engine" else RotaryCoreAttention
    add = residual_add(residual_multiplier)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.qkv,
                    core_attention=core_attention,
                    linear_proj=linears.proj,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linears.fc1, linear_fc2=linears.fc2)),
            mlp_bda=add,
            sharded_state_dict_keys_map=dict(linears.canonical_names),
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
    emulation: Emulation | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage and the final norm.

    Args:
        is_gated: whether feed-forward layers are gated; Megatron's configuration does not say so.
        residual_multiplier: of what each branch adds to the residual stream.
        emulation: of FP8, in local layers.
    """
    first = get_transformer_layer_offset(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    layers = [
        layer_spec(
            linears_of_layer(config, layer, is_gated=is_gated, emulation=emulation),
            attention,
            qk_layernorm=config.qk_layernorm,
            residual_multiplier=residual_multiplier,
        )
        for layer in range(first, first + num_layers)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
