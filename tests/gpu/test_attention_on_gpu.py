"""Core attention on a GPU: the block mask's kernel against a dense mask, value and gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadiff.diffusion.layout import AttentionLayout, document_numbers
from megadiff.models.attention import CoreAttention

pytestmark = pytest.mark.gpu


LENGTH = 640


def layouts() -> dict[str, AttentionLayout]:
    """One layout of every kind of mask, for two samples."""
    tokens = torch.randint(100, (2, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    documents, places = document_numbers(tokens, end_id=2), torch.arange(LENGTH, device="cuda")
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1)).cuda()
    whole: dict[str, Any] = {"query_Q": places, "key_K": places}
    return {
        "documents": AttentionLayout("bidirectional", documents),
        "causal documents": AttentionLayout("causal", documents),
        "permuted documents": AttentionLayout("causal", documents[:, order]),
        "clean prefix": AttentionLayout(given_BS=(places < 200).expand(2, LENGTH)),
        "look-ahead": AttentionLayout("causal", lookahead_B=torch.tensor([3, 300], device="cuda"), **whole),
        "blocks of one": AttentionLayout("block_diffusion", block_size=1, **whole),
        "blocks": AttentionLayout("block_diffusion", block_size=32, **whole),
    }


NAMES = ("documents", "causal documents", "permuted documents", "clean prefix", "look-ahead", "blocks of one", "blocks")


CASES = [(name, torch.bfloat16, 2) for name in NAMES]
CASES += [(name, dtype, 4) for name in ("documents", "blocks") for dtype in (torch.float32, torch.bfloat16)]
"""Every mask in bf16 with grouped queries; two in fp32, too, and without groups."""


@pytest.fixture(autouse=True)
def compiled_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond eight recompilations torch would run FlexAttention without a kernel, and nothing would be tested."""
    torch.compiler.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)


@pytest.mark.parametrize("name, dtype, num_groups", CASES)
def test_blocks_equal_a_dense_mask(name: str, dtype: torch.dtype, num_groups: int) -> None:
    length, generator, layout = LENGTH, torch.Generator().manual_seed(0), layouts()[name]
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
