"""Core attention on a GPU: the block mask's kernel against a dense mask, value and gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadiff.diffusion.layout import AttentionLayout, document_numbers
from megadiff.models.attention import CoreAttention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_groups", [4, 2])
def test_blocks_equal_a_dense_mask(kind: Any, dtype: torch.dtype, num_groups: int) -> None:
    length, generator = 640, torch.Generator().manual_seed(0)
    tokens = torch.randint(100, (2, length), generator=generator).cuda()
    layout = AttentionLayout(kind, document_numbers(tokens, end_id=2))
    shapes = [(length, 2, 4, 64), *[(length, 2, num_groups, 64)] * 2]
    inputs = [torch.randn(shape, generator=generator).cuda().to(dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(length, 2, 256, generator=generator).cuda().to(dtype)

    config: Any = SimpleNamespace(context_parallel_size=1)
    blocked = CoreAttention(config, 1)(*inputs, None, attention_bias=layout)
    by_blocks = torch.autograd.grad((blocked * weight).sum(), inputs)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = (x.permute(1, 2, 0, 3) for x in exact)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.visible_BQK[:, None], enable_gqa=True
    )
    dense = dense.permute(2, 0, 1, 3).flatten(2)
    by_mask = torch.autograd.grad((dense * weight).sum(), exact)

    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3  # of TF32 products where the kernel uses them
    for ours, reference in zip((blocked, *by_blocks), (dense, *by_mask), strict=True):
        assert (ours.double() - reference).norm() <= tolerance * reference.norm()
