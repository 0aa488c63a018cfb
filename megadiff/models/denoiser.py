"""The denoiser: noised tokens in, logits over clean tokens out.

A Megatron-Core `GPTModel` whose attention looks where the layout says. It never sees clean tokens or losses, and noise
levels only if it is conditioned on them. It has the same call on every pipeline stage: noised tokens, positions and the
attention layout, which each stage builds for itself. Position enters through rotary phases alone, computed from
`position_BS`, so permuted, packed and doubled sequences need nothing new here.

Letters: S model length, B micro-batch, W = padded vocabulary / tensor-parallel size, P = half the head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megadiff import accelerations
from megadiff.models.conditioning import InputEmbedding
from megadiff.models.config import AttentionBackend, DenoiserConfig, TransformerImpl, padded_vocab_size
from megadiff.models.fp8 import Fp8Config
from megadiff.models.fp8_emulation import Emulation
from megadiff.models.fused import squared_relu
from megadiff.models.rotary import PhasedLayout
from megadiff.models.specs import block_spec
from megadiff.models.weights import draw_nothing, initialize_weights

if TYPE_CHECKING:
    from megadiff.diffusion.layout import AttentionLayout
    from megadiff.parallel.groups import Groups, ParallelConfig


def unchanged(x: Tensor) -> Tensor:
    """x itself: the activation of a gated layer, whose first matrix has its own."""
    return x


def transformer_config(
    config: DenoiserConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    transformer_impl: TransformerImpl = "local",
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """What Megatron-Core has to know, written out; of what is installed only `megadiff.accelerations` counts.

    Of FP8 in local layers, which emulate it, Megatron hears only which layers stay as they are.
    """
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    full_recompute = parallel.recompute_granularity == "full"
    fp8_settings: dict[str, Any] = {}
    if fp8 is not None:
        fp8_settings = fp8.megatron_settings if transformer_impl == "transformer_engine" else fp8.bf16_layers
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.query_groups,
        kv_channels=config.head_size,
        ffn_hidden_size=config.ffn_size,
        layernorm_epsilon=config.layernorm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
        activation_func=unchanged if config.is_gated else squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=draw_nothing,
        output_layer_init_method=draw_nothing,
        embedding_init_method=draw_nothing,
        # False with init methods that draw nothing: Megatron's GPU path is the one that marks tensor-parallel
        # parameters, and without the marks gradient norms at tp 2 are silently wrong.
        use_cpu_initialization=False,
        perform_initialization=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # Batched sends of both neighbours are one message when there are two stages: the interleaved schedule then
        # mixes up its chunks, silently. Sends of their own never do.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method if full_recompute else None,
        recompute_num_layers=parallel.recompute_num_layers if full_recompute else None,
        recompute_modules=list(parallel.recompute_modules),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # Megatron drops what it has sent while the send may still go on: in order on CUDA streams, too early over gloo.
        deallocate_pipeline_outputs=not interleaved or torch.cuda.is_available(),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=accelerations.fuses_gradient_accumulation(),
        apply_rope_fusion=False,
        persist_layer_norm=False,
        transformer_impl=transformer_impl,
        **fp8_settings,
    )


HeadFunction = Callable[[Tensor, Tensor], Any]
"""From the hidden states before the output layer, [S, B, H], and its local weight, [W, H], to anything."""


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer, which may hand its weight to a function instead of multiplying by it.

    The function is called from within the module, so that hooks on it run first: overlapped parameter gathers of the
    distributed optimizer wait there for the weight.
    """

    def forward(self, input_: Tensor, *args: Any, head: HeadFunction | None = None, **kwargs: Any) -> Any:
        """`head(input_, weight)`; Megatron's (logits, bias) without one."""
        return super().forward(input_, *args, **kwargs) if head is None else head(input_, self.weight)


class Denoiser(GPTModel):
    """Transformer that predicts the clean token of every position."""

    def __init__(
        self,
        config: DenoiserConfig,
        groups: Groups,
        *,
        vocab_size: int,
        sequence_length: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        attention: AttentionBackend = "local",
        transformer_impl: TransformerImpl = "local",
        fp8: Fp8Config | None = None,
        virtual_stage: int | None = None,
    ) -> None:
        """Build this rank's part of the model, or one of its virtual stages, with its initial weights.

        Args:
            vocab_size: real ids; rows are padded to a multiple of `VOCABULARY_MULTIPLE`.
            sequence_length: model length S, for Megatron's books only (rotary phases have no limit).
            seed: of the initial weights.
            dtype: of parameters and activations, bf16 or fp32.
            attention: whose kernels compute attention, as `DenoiserConfig.resolved_attention` says.
            transformer_impl: whose linear layers and norms, as `DenoiserConfig.resolved_transformer_impl` says.
            fp8: what the products of the layers are rounded to: in Transformer Engine's by the hardware, in local ones
                by emulation. None: nothing.
            virtual_stage: which of the rank's groups of layers; None where there is one.
        """
        megatron_config = transformer_config(config, groups.config, dtype, transformer_impl, fp8)
        emulation = None
        if fp8 is not None and transformer_impl == "local":
            emulation = Emulation(fp8_format=fp8.format, amax_group=groups.collection.tp_cp)
        last_virtual_stage = groups.config.num_virtual_stages - 1
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=cast(
                Any,
                block_spec(
                    megatron_config,
                    attention,
                    groups.pp.rank(),
                    virtual_stage,
                    is_gated=config.is_gated,
                    residual_multiplier=config.scales.residual_multiplier,
                    emulation=emulation,
                ),
            ),
            vocab_size=padded_vocab_size(vocab_size),
            max_sequence_length=sequence_length,
            pre_process=groups.is_first_stage and virtual_stage in (None, 0),
            post_process=groups.is_last_stage and virtual_stage in (None, last_virtual_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            pg_collection=groups.collection,
            vp_stage=virtual_stage,
        )
        # GPTModel takes specs for its layers but none for its embedding and its output layer.
        if self.pre_process:
            InputEmbedding.replace(self.embedding, log_snr_conditioning=config.log_snr_conditioning)
            # All else lies on its device, and parameters in FP8 may lose their marks when they are moved there again.
            self.embedding.to(groups.device)
        if self.post_process:
            self.output_layer.__class__ = OutputLayer
        initialize_weights(self, seed=seed, init_std=config.init_std, scales=config.scales)
        self.logit_multiplier = config.scales.logit_multiplier
        frequency = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=groups.device)
        self.inverse_frequency_P = config.rotary_base ** (-frequency / config.head_size)

    def forward(  # type: ignore[override]
        self,
        noised_BS: Tensor,
        position_BS: Tensor,
        layout: AttentionLayout,
        head: HeadFunction | None = None,
        *,
        log_snr_BS: Tensor | None = None,
        soft_ids_BSK: Tensor | None = None,
        soft_weights_BSK: Tensor | None = None,
    ) -> Any:
        """Predict clean tokens.

        Args:
            noised_BS: noised ids, int64; read on the first stage only.
            position_BS: place of each id in its document, int64; read on every stage.
            layout: who may see whom.
            head: on the last stage, takes the place of the product with the output layer's weight.
            log_snr_BS: noise levels, for denoisers that are conditioned on them; read on the first stage only.
            soft_ids_BSK, soft_weights_BSK: in place of `noised_BS`, inputs that are mixtures of K embeddings, int64
                and float32; read on the first stage only.

        Returns:
            Last stage: what `head` returns, or logits [S, B, W] in the model's dtype; the mask's and the padded
            columns are raw. Other stages: hidden states [S, B, H].
        """
        hidden_SBH = super().forward(
            input_ids=noised_BS,
            position_ids=position_BS,
            attention_mask=None,
            decoder_input=self.embedding(
                noised_BS,
                position_BS,
                log_snr_BS=log_snr_BS,
                soft_ids_BSK=soft_ids_BSK,
                soft_weights_BSK=soft_weights_BSK,
            )
            if self.pre_process
            else None,
            extra_block_kwargs={"attention_bias": PhasedLayout.of(layout, position_BS, self.inverse_frequency_P)},
        )
        if not self.post_process:
            return hidden_SBH
        if self.logit_multiplier != 1.0:  # here, where both kinds of head have it, and on H columns instead of W
            hidden_SBH = hidden_SBH * self.logit_multiplier
        if head is not None:
            return self.output_layer(hidden_SBH, head=head)
        logits_SBW, _ = self.output_layer(hidden_SBH)
        return logits_SBW

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states as they are: `forward` goes on from here, on logits in Megatron's sequence-major order."""
        return hidden_states


def build_denoiser(config: DenoiserConfig, groups: Groups, **settings: Any) -> list[Denoiser]:
    """This rank's part of the model: one `Denoiser` per virtual stage, in order; `settings` are those of `Denoiser`."""
    if groups.config.virtual_pipeline_model_parallel_size is None:
        return [Denoiser(config, groups, **settings)]
    stages = range(groups.config.num_virtual_stages)
    return [Denoiser(config, groups, virtual_stage=stage, **settings) for stage in stages]
