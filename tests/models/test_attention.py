"""Who sees whom: documents, causal order, context-parallel pieces; the same rule as tensor, as blocks, by adapter."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from models.te_stand_in import TEDotProductAttention
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megadiff.diffusion.layout import AttentionLayout, document_numbers, positions_in_documents
from megadiff.models.attention import CoreAttention
from megadiff.models.te_attention import TransformerEngineAttention
from megadiff.parallel.batch import context_parallel_index, context_parallel_order

END = 2
TOKENS = torch.tensor([[5, 6, END, 7, 8, 9, END, 4], [END, 5, 6, 7, 8, END, END, 9]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 3]])


def test_a_document_ends_with_its_end_token_and_starts_at_position_zero() -> None:
    assert torch.equal(document_numbers(TOKENS, END), DOCUMENTS)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 3, 4, 0, 0]])
    assert torch.equal(positions_in_documents(DOCUMENTS), positions)


def by_hand(kind: str, documents: Tensor | None, size: int) -> Tensor:
    visible = torch.ones(size, size).tril().bool() if kind == "causal" else torch.ones(size, size, dtype=torch.bool)
    return visible[None] if documents is None else visible & (documents[:, :, None] == documents[:, None, :])


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_context_parallel_ranks_see_what_the_whole_sees(kind: Any, documents: Tensor | None) -> None:
    whole, order = by_hand(kind, documents, 8), context_parallel_order(8, 2)
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    for rank in range(2):
        index = context_parallel_index(8, rank, 2)
        layout = AttentionLayout(kind, documents).divided(index, order)
        if layout.is_plain:
            assert kind == "bidirectional" and documents is None
        else:
            assert torch.equal(layout.visible_BQK, whole[:, index][:, :, order])


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_blocks_and_tensor_say_the_same(kind: Any) -> None:
    """FlexAttention runs forward on CPUs, which is enough to compare its mask; blocks are 128 wide."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(60, (2, 384), generator=generator)
    layout = AttentionLayout(kind, document_numbers(tokens, END))
    query, key, value = torch.randn(3, 2, 4, 384, 16, generator=generator)
    dense = scaled_dot_product_attention(query, key, value, attn_mask=layout.visible_BQK[:, None])
    blocked = flex_attention(query, key, value, block_mask=layout.block_mask)
    torch.testing.assert_close(blocked, dense, rtol=1e-5, atol=1e-5)
    assert torch.equal(layout.visible_BQK, by_hand(kind, layout.document_BS, 384))


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_transformer_engine_is_asked_for_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, kind: Any, documents: Tensor | None
) -> None:
    extension = SimpleNamespace(TEDotProductAttention=TEDotProductAttention)
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", extension)
    config: Any = SimpleNamespace(context_parallel_size=1)
    adapter, local = TransformerEngineAttention(config, 1), CoreAttention(config, 1)
    query = torch.randn(8, 2, 4, 6)
    key, value = torch.randn(2, 8, 2, 2, 6)
    layout = AttentionLayout(kind, documents)
    ours = local(query, key, value, None, attention_bias=layout)
    theirs = adapter(query, key, value, None, attention_bias=layout)
    assert theirs.shape == (8, 2, 24)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert not adapter.state_dict() and not list(adapter.parameters())
    assert adapter.kernel.training and not adapter.eval().kernel.training
    assert adapter.train() is adapter and adapter.kernel.training


def other_documents_change() -> dict[str, Any]:
    """Logits and gradients of one document, before and after the tokens of the others in its sample change."""
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import Denoiser
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    config = DenoiserConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    denoiser = Denoiser(config, groups, vocab_size=400, sequence_length=8, seed=0)
    with torch.no_grad():
        denoiser.output_layer.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    position = positions_in_documents(DOCUMENTS)
    found = {}
    for name, layout in {"confined": AttentionLayout(document_BS=DOCUMENTS), "free": AttentionLayout()}.items():
        results = []
        for changed in (False, True):
            tokens = torch.where((DOCUMENTS != 1) & changed, 300 + TOKENS, TOKENS)
            logits = denoiser(tokens, position, layout).transpose(0, 1)
            denoiser.zero_grad()
            logits[DOCUMENTS == 1].square().sum().backward()
            gradient = denoiser.embedding.word_embeddings.weight.grad.clone()
            seen = sorted(set(tokens[DOCUMENTS != 1].tolist()) - set(tokens[DOCUMENTS == 1].tolist()))
            results.append((logits[DOCUMENTS == 1].detach(), gradient[seen].abs().max().item()))
        found[name] = results
    parallel_groups.shutdown()
    return found


def test_a_document_has_no_influence_on_another() -> None:
    """To the last bit, and no gradient at all flows to the embeddings of the other documents' tokens."""
    [found] = run_ranks(1, other_documents_change)
    (before, gradient), (after, gradient_after) = found["confined"]
    assert torch.equal(before, after) and gradient == gradient_after == 0.0
    (before, gradient), (after, _) = found["free"]
    assert not torch.equal(before, after) and gradient > 0.0
