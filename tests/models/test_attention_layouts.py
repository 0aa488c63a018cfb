"""Attention rules against their definitions in plain loops: as a tensor, as blocks, in context-parallel pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megadiff.diffusion.layout import AttentionLayout
from megadiff.parallel.batch import context_parallel_index, context_parallel_order

SIZE = 16
PLACES = torch.arange(SIZE)
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 7, [0] * 16])
PERMUTED_DOCUMENTS = DOCUMENTS[:, torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))]
GIVEN = torch.tensor([[True] * 5 + [False] * 11, [False] * 16])
LOOKAHEAD = torch.tensor([0, 3])


@dataclass(frozen=True)
class Rule:
    name: str
    layout: AttentionLayout
    sees: Callable[[int, int, int], bool]
    """Whether in this sample the query at the second place sees the key at the third, from the definition."""


def in_blocks(block: int) -> Callable[[int, int, int], bool]:
    half = SIZE // 2

    def sees(sample: int, query: int, key: int) -> bool:
        query_block, key_block = query % half // block, key % half // block
        if query < half and key < half:  # noised, noised
            return query_block == key_block
        if query < half:  # noised, clean
            return key_block < query_block
        return key >= half and key_block <= query_block

    return sees


def of_block_diffusion(block_size: int, documents: Tensor | None = None) -> AttentionLayout:
    return AttentionLayout("block_diffusion", documents, block_size=block_size, query_Q=PLACES, key_K=PLACES)


def same_document(documents: Tensor) -> Callable[[int, int, int], bool]:
    return lambda sample, query, key: bool(documents[sample, query] == documents[sample, key])


DOUBLED = DOCUMENTS[:, :8].repeat(1, 2)
RULES = [
    Rule("documents", AttentionLayout(document_BS=DOCUMENTS), same_document(DOCUMENTS)),
    Rule(
        "permuted documents, causal",
        AttentionLayout("causal", PERMUTED_DOCUMENTS),
        lambda b, q, k: k <= q and same_document(PERMUTED_DOCUMENTS)(b, q, k),
    ),
    Rule(
        "clean prefix",
        AttentionLayout(given_BS=GIVEN),
        lambda b, q, k: bool(GIVEN[b, k]) or not GIVEN[b, q],
    ),
    Rule(
        "clean prefix, documents",
        AttentionLayout(given_BS=GIVEN, document_BS=DOCUMENTS),
        lambda b, q, k: (bool(GIVEN[b, k]) or not GIVEN[b, q]) and same_document(DOCUMENTS)(b, q, k),
    ),
    Rule(
        "look-ahead",
        AttentionLayout("causal", lookahead_B=LOOKAHEAD, query_Q=PLACES, key_K=PLACES),
        lambda b, q, k: k <= q + LOOKAHEAD[b].item(),
    ),
    *(Rule(f"blocks of {block}", of_block_diffusion(block), in_blocks(block)) for block in (1, 2, 4, 8)),
    Rule(
        "blocks of 2, documents",
        of_block_diffusion(2, DOUBLED),
        lambda b, q, k: in_blocks(2)(b, q, k) and same_document(DOUBLED)(b, q, k),
    ),
]


def by_definition(rule: Rule) -> Tensor:
    visible = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    for sample, query, key in itertools.product(range(2), range(SIZE), range(SIZE)):
        visible[sample, query, key] = rule.sees(sample, query, key)
    return visible


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_rule_is_its_definition_whole_and_in_pieces(rule: Rule) -> None:
    whole = by_definition(rule)
    assert not rule.layout.is_plain
    assert whole.any(-1).all(), "a query that sees nothing has no attention"
    assert torch.equal(rule.layout.visible_BQK.expand(2, SIZE, SIZE), whole)
    for size in (2, 4):
        order = context_parallel_order(SIZE, size)
        for rank in range(size):
            index = context_parallel_index(SIZE, rank, size)
            piece = rule.layout.divided(index, order).visible_BQK
            assert torch.equal(piece.expand(2, SIZE // size, SIZE), whole[:, index][:, :, order])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_blocks_of_keys_say_the_same(rule: Rule) -> None:
    """FlexAttention runs forward on CPUs, which is enough to compare its mask."""
    query, key, value = torch.randn(3, 2, 4, SIZE, 16, generator=torch.Generator().manual_seed(0))
    dense = scaled_dot_product_attention(query, key, value, attn_mask=by_definition(rule)[:, None])
    blocked = flex_attention(query, key, value, block_mask=rule.layout.block_mask)
    torch.testing.assert_close(blocked, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "block_diffusion"}, "block_size is None with kind 'block_diffusion'"),
        ({"kind": "causal", "block_size": 2}, "block_size is 2 with kind 'causal'"),
        ({"lookahead_B": LOOKAHEAD}, "lookahead_B widens causal attention, got kind 'bidirectional'"),
        ({"kind": "causal", "lookahead_B": LOOKAHEAD}, "a layout of kind 'causal' that is a mask needs a length"),
    ],
)
def test_rules_that_say_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionLayout(**settings)  # type: ignore[arg-type]
