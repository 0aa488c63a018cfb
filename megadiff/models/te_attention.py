"""Core attention by Transformer Engine: its kernels for whole, causal and packed sequences, and over context ranks.

An adapter from an `AttentionLayout` to the arguments of Megatron's `TEDotProductAttention`. Plain layouts go as they
are, with Transformer Engine's own exchange of keys and values over context-parallel ranks. Documents become sequences
of variable length: the micro-batch is laid out as one row of tokens with the places where documents start.

Shapes: S model length, B micro-batch, T = B·S, N query heads of this rank, G key-value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

if TYPE_CHECKING:
    from megadiff.diffusion.layout import AttentionLayout


class TransformerEngineAttention(nn.Module):
    """softmax(q kᵀ / √D) v by Transformer Engine, behind the signature of `CoreAttention`."""

    kernel: Any

    def __init__(self, config: TransformerConfig, layer_number: int, **settings: Any) -> None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        super().__init__()
        # Not registered as a child: it has no parameters, and the scales of FP8 attention that it would save do not
        # belong into checkpoints that every implementation opens.
        self.__dict__["kernel"] = TEDotProductAttention(config=config, layer_number=layer_number, **settings)

    def train(self, mode: bool = True) -> TransformerEngineAttention:
        """Also of the kernel, which keeps what backward needs in training alone; `eval` comes here, too."""
        super().train(mode)
        self.kernel.train(mode)
        return self

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: None,
        /,
        *,
        attention_bias: AttentionLayout | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend as the layout says; see `CoreAttention.forward`. Returns [S, B, N·D]."""
        layout = attention_bias
        if layout is not None:
            masked = layout.given_BS is not None or layout.lookahead_B is not None
            assert layout.kind != "block_diffusion" and not masked, "the kernels know no such mask: refused at start"
        causal = layout is not None and layout.kind == "causal"
        mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
        if layout is None or layout.document_BS is None:
            return self.kernel(query_SBND, key_SBGD, value_SBGD, None, attn_mask_type=mask_type)

        length, batch_size = query_SBND.shape[:2]
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query_SBND, key_SBGD, value_SBGD))
        context_TX = self.kernel(
            *(query, key, value, None),
            attn_mask_type=mask_type,
            packed_seq_params=_packed(layout),
        )
        return context_TX.view(batch_size, length, -1).transpose(0, 1)


def _packed(layout: AttentionLayout) -> PackedSeqParams:
    """The documents of a micro-batch, sample after sample, as sequences of variable length."""
    assert layout.document_BS is not None
    bounds = layout.document_bounds
    # An upper bound of the lengths: the true maximum would have to be asked of the device too.
    longest = layout.document_BS.shape[1]
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
