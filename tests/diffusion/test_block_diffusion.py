"""Block diffusion: who sees whom in the doubled sequence, and what it is at its two ends."""

from types import SimpleNamespace

import pytest
import torch
from rows_reference import make_samples

from megadiff.diffusion import (
    BlockDiffusionObjective,
    ExactCountMasking,
    LevelMasking,
    LogLinearSchedule,
    MaskedMixing,
    MdlmObjective,
)
from megadiff.models.attention import CoreAttention

V, MASK, SEED = 11, 3, 77
MIXING = MaskedMixing(V, MASK)
MASKINGS = [masking(mixing=MIXING, schedule=LogLinearSchedule()) for masking in (LevelMasking, ExactCountMasking)]


def batch(length, block_size, masking=MASKINGS[0], **fields):
    tokens = 4 + torch.arange(3 * length).view(3, length) % (V - 4)
    return BlockDiffusionObjective(masking=masking, block_size=block_size).noised_batch(
        make_samples(tokens, **fields), SEED
    )


def visible_by_hand(length, block_size):
    visible = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            query_block, key_block = query % length // block_size, key % length // block_size
            if query < length:
                visible[query, key] = key_block == query_block if key < length else key_block < query_block
            else:
                visible[query, key] = key >= length and key_block <= query_block
    return visible


@pytest.mark.parametrize("length, block_size, number", [(8, 1, 72), (8, 4, 96), (12, 3, 180), (8, 8, 128)])
def test_visible_pairs(length, block_size, number):
    [visible] = batch(length, block_size).layout.visible_BQK
    assert visible.sum() == number == length**2 + length * block_size
    assert torch.equal(visible, visible_by_hand(length, block_size))


@pytest.mark.parametrize("length, block_size", [(8, 1), (8, 4), (12, 3), (8, 8)])
def test_what_reaches_each_output_through_two_layers_of_attention(length, block_size):
    """Gradients of outputs by inputs: nonzero exactly where the mask allows, so no hidden token leaks on a detour."""
    layout = batch(length, block_size).layout
    attention = CoreAttention(SimpleNamespace(context_parallel_size=1), layer_number=1)

    def two_layers(hidden_SD):
        for _ in range(2):
            heads = hidden_SD[:, None, None, :]  # [S, B, N, D]
            hidden_SD = hidden_SD + attention(heads, heads, heads, None, attention_bias=layout)[:, 0]
        return hidden_SD

    hidden = torch.randn(2 * length, 4, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(two_layers, hidden)
    influence = jacobian.abs().sum(dim=(1, 3)) > 0
    assert torch.equal(influence, visible_by_hand(length, block_size))


@pytest.mark.parametrize("masking", MASKINGS, ids=lambda masking: type(masking).__name__)
def test_one_block_is_plain_masked_diffusion(masking):
    tokens = 4 + torch.arange(48).view(4, 12) % (V - 4)
    whole = MdlmObjective(masking=masking).noised_batch(make_samples(tokens), SEED)
    block = BlockDiffusionObjective(masking=masking, block_size=12).noised_batch(make_samples(tokens), SEED)
    assert torch.equal(block.noised_BS[:, :12], whole.noised_BS) and torch.equal(block.noised_BS[:, 12:], tokens)
    assert torch.equal(block.rows.elbo_weight[:, :12], whole.rows.elbo_weight)
    assert not block.layout.visible_BQK[:, :12, 12:].any() and block.layout.visible_BQK[:, :12, :12].all()


def test_documents_narrow_both_copies():
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]).expand(3, 8)
    noised = batch(8, 2, document_BL=document)
    own = document[:, :, None] == document[:, None, :]
    assert torch.equal(noised.layout.visible_BQK, visible_by_hand(8, 2) & own.repeat(1, 2, 2))
    assert noised.position_BS[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0] * 2
    order = torch.cat([torch.arange(12, 16), torch.arange(12)])
    for index in (order[:8], order[8:]):
        piece = noised.divided(index, order)
        assert torch.equal(piece.layout.visible_BQK, noised.layout.visible_BQK[:, index][:, :, order])


@pytest.mark.parametrize("block_size", [0, 3, 16])
def test_blocks_that_do_not_divide_the_sample_are_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size must be a positive divisor of the 8 tokens .* got {block_size}"):
        batch(8, block_size)
