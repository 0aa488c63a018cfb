"""Stands for Megatron's Transformer Engine layers, which need the package and a GPU: same constructors, same names.

Norm and product as their documentation states them, by Megatron's own parallel layers, an extra state that must not
reach a checkpoint, and weight gradients that go into a buffer where there is one.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "megatron.core.extensions.transformer_engine"


handed: dict[str, set[str]] = {}
"""Names of the settings that each kind of layer was built with."""


class _IntoBuffer(torch.autograd.Function):
    """A weight whose gradient is added to its buffer; autograd gets one that nobody may read."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ctx.weight.main_grad.add_(grads[0])
        ctx.weight.grad_added_to_main_grad = True
        return torch.full_like(grads[0], torch.nan)


class _Product:
    """Before one of Megatron's layers: where gradients of its weight go. The real ones fail without a buffer."""

    fuse_wgrad_accumulation = False

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        if self.fuse_wgrad_accumulation and hasattr(weight, "main_grad"):
            weight = _IntoBuffer.apply(weight)
        return super()._forward_impl(input, weight, **settings)  # type: ignore[misc]


class TELayerNormColumnParallelLinear(_Product, ColumnParallelLinear):
    """RMS norm, whose gain is a parameter here, and a product."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **settings: Any) -> None:
        super().__init__(input_size, output_size, config=config, **settings)
        handed["TELayerNormColumnParallelLinear"] = settings.keys() | {"config"}
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        weight = self.weight
        del self.weight  # the gain comes first
        gain = torch.full((input_size,), 7.0, dtype=config.params_dtype, device=weight.device)
        self.layer_norm_weight = nn.Parameter(gain)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight = weight
        self.is_first_microbatch = True

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.is_first_microbatch = False
        gain = self.layer_norm_weight
        return super().forward(nn.functional.rms_norm(x, gain.shape, gain, self.config.layernorm_epsilon))

    def get_extra_state(self) -> Any:
        raise AssertionError("scales of FP8 would be saved")

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("scales of FP8 would be loaded")


class TERowParallelLinear(_Product, RowParallelLinear):
    """A product."""

    def __init__(self, input_size: int, output_size: int, **settings: Any) -> None:
        super().__init__(input_size, output_size, **settings)
        handed["TERowParallelLinear"] = set(settings)

    get_extra_state = TELayerNormColumnParallelLinear.get_extra_state
    set_extra_state = TELayerNormColumnParallelLinear.set_extra_state


class TEDotProductAttention(nn.Module):
    """Attention to whole sequences and to packed ones, with the conventions that the documentation states."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # state that must not reach a checkpoint

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: None,
        *,
        attn_mask_type: Any,
        packed_seq_params: Any = None,
    ) -> Tensor:
        causal = attn_mask_type.name == "causal"
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            attended = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            return attended.permute(2, 0, 1, 3).flatten(2)
        assert packed_seq_params.qkv_format == "thd" and packed_seq_params.cu_seqlens_q.dtype == torch.int32
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        pieces = []
        for start, stop in itertools.pairwise(bounds):
            assert 0 < stop - start <= packed_seq_params.max_seqlen_q
            q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
            pieces.append(scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(0, 1))
        return torch.cat(pieces).flatten(1)


class TEFusedMLP(nn.Module):
    """Only asked whether a layer has it."""


class QuantizedTensor(Tensor):
    """A tensor in 8 bits with one scale, which says that it has another type, as Transformer Engine's of version 2.20.

    Detached, cloned or moved it stays what it is, or not, when moved, before 2.16; a copy into it rounds; for all else
    its numbers are computed with. Files get what is inside.
    """

    stays_when_moved = True
    data_in_8_bits: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, data_in_8_bits: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantizedTensor:
        shape, device = data_in_8_bits.shape, data_in_8_bits.device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.data_in_8_bits, made.scale = data_in_8_bits, scale
        return made

    @classmethod
    def of(cls, tensor: Tensor) -> QuantizedTensor:
        scale = tensor.detach().abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
        return cls((tensor.detach() / scale).to(torch.float8_e4m3fn), scale, tensor.dtype)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        return (self.data_in_8_bits.float() * self.scale).to(dtype or self.dtype)

    def untyped_storage(self) -> torch.UntypedStorage:
        return torch.UntypedStorage(0, device=self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.data_in_8_bits, self.scale, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        stays = (aten.detach.default, aten.clone.default, *([aten._to_copy.default] if cls.stays_when_moved else []))
        if func in stays and kwargs.get("dtype") in (None, args[0].dtype):
            return cls(args[0].data_in_8_bits.clone(), args[0].scale.clone(), args[0].dtype)
        if func == aten.copy_.default and isinstance(args[0], cls):
            rounded = cls.of(args[1].dequantize() if isinstance(args[1], cls) else args[1])
            args[0].data_in_8_bits, args[0].scale = rounded.data_in_8_bits, rounded.scale
            return args[0]
        plain = [x.dequantize() if isinstance(x, cls) else x for x in args]
        return func(*plain, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


def install_quantized_tensors() -> None:
    """Let Megatron know the stand-in as the class of tensors in FP8, in this process."""
    from megatron.core import fp8_utils

    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS = True
    fp8_utils.FP8_TENSOR_CLASS = QuantizedTensor
    fp8_utils.is_te_min_version = lambda version: True


def install() -> None:
    """Put the stand-ins where Megatron's layers would be, in this process."""
    module = ModuleType(NAME)
    for stand_in in (TELayerNormColumnParallelLinear, TERowParallelLinear, TEDotProductAttention, TEFusedMLP):
        setattr(module, stand_in.__name__, stand_in)
    sys.modules[NAME] = module
