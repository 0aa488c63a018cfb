"""Objectives that take autoregressive weights up: shifted inputs, and attention that grows from causal to all."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows_reference import make_samples
from torch import Tensor

from megadiff.diffusion import (
    AnnealedObjective,
    AttentionLayout,
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    NoisedBatch,
    NoiseSchedule,
    Samples,
    ShiftedObjective,
    shifted_inputs,
)
from megadiff.models.attention import CoreAttention
from megadiff.objectives import GiddConfig, Vocabulary
from megadiff.parallel.batch import context_parallel_index, context_parallel_order

V, MASK, BOS, SEED = 11, 3, 0, 77
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 3]])
TOKENS = 4 + torch.arange(16).view(2, 8) % (V - 4)


def gidd(shift: float = 0.0) -> GiddObjective:
    return GiddObjective(DiffusionProcess(NoiseSchedule(), HybridMixing(V, MASK, shift)))


def test_inputs_are_shifted_within_documents() -> None:
    x, y = torch.arange(10, 18), torch.arange(20, 28)
    tokens = torch.stack([x, y])
    assert shifted_inputs(tokens, BOS).tolist() == [[BOS, *range(10, 17)], [BOS, *range(20, 27)]]
    assert shifted_inputs(tokens, BOS, DOCUMENTS).tolist() == [
        [BOS, 10, 11, BOS, 13, 14, 15, BOS],
        [BOS, BOS, 21, 22, 23, 24, BOS, BOS],
    ]


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("validation", [False, True])
def test_shifting_moves_what_is_read_and_nothing_else(documents: Tensor | None, validation: bool) -> None:
    samples = make_samples(TOKENS, document_BL=documents)
    plain = gidd().noised_batch(samples, SEED, validation=validation)
    objective = ShiftedObjective(gidd(), BOS)
    shifted = objective.noised_batch(samples, SEED, validation=validation)
    assert torch.equal(shifted.noised_BS, shifted_inputs(plain.noised_BS, BOS, documents))
    for field in dataclasses.fields(NoisedBatch):
        if field.name not in ("noised_BS", "rows", "layout"):
            before, after = getattr(plain, field.name), getattr(shifted, field.name)
            assert (before is after is None) or torch.equal(before, after)
    for field in dataclasses.fields(plain.rows):
        before, after = getattr(plain.rows, field.name), getattr(shifted.rows, field.name)
        assert before == after if field.name == "any_uniform_mass" else torch.equal(before, after)
    assert shifted.layout.document_BS is documents and shifted.layout.is_plain == (documents is None)
    assert objective.sequence_length(8) == 8


def test_active_rows_are_those_of_the_inner_objective() -> None:
    masked = GiddObjective(DiffusionProcess(NoiseSchedule(), MaskedMixing(V, MASK)))
    ordinal, index = torch.arange(4), torch.tensor([1, 2, 5])
    count = masked.count_active_rows(ordinal, 8, SEED, validation=True, index_S=index)
    for objective in (ShiftedObjective(masked, BOS), AnnealedObjective(masked, 10)):
        assert objective.count_active_rows(ordinal, 8, SEED, validation=True, index_S=index) == count
    assert count not in (None, masked.count_active_rows(ordinal, 8, SEED, index_S=index))


PLAIN = AttentionLayout()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Stands for objectives with prompts or soft inputs: GIDD with some fields replaced."""

    layout: AttentionLayout = PLAIN
    soft: tuple[Tensor, Tensor] | None = None
    name = "prepared"

    def sequence_length(self, num_tokens: int) -> int:
        return num_tokens

    def count_active_rows(self, *_: Any, **__: Any) -> None:
        return None

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        batch = dataclasses.replace(gidd().noised_batch(samples, seed), layout=self.layout)
        if self.soft is not None:
            batch = dataclasses.replace(batch, soft_ids_BSK=self.soft[0], soft_weights_BSK=self.soft[1])
        return batch


def test_clean_context_reads_clean_tokens_and_predicts_none() -> None:
    """A prompt stays as it is; of other given tokens, one that follows a noised one reads a noised one."""
    given = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 1]], dtype=torch.bool)
    shifted = ShiftedObjective(Prepared(AttentionLayout(given_BS=given)), BOS)
    assert torch.equal(shifted.noised_batch(make_samples(TOKENS), SEED).layout.given_BS, expected)
    # In the second sample a document starts at place 6, and one at place 7: both read BOS.
    expected[1, 6] = True
    layout = AttentionLayout(given_BS=given, document_BS=DOCUMENTS)
    shifted = ShiftedObjective(Prepared(layout), BOS)
    assert torch.equal(shifted.noised_batch(make_samples(TOKENS), SEED).layout.given_BS, expected)


def test_mixtures_of_embeddings_are_shifted_too() -> None:
    ids = torch.arange(2 * 8 * 3).view(2, 8, 3)
    weights = torch.rand(2, 8, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    batch = ShiftedObjective(Prepared(soft=(ids, weights)), BOS).noised_batch(make_samples(TOKENS), SEED)
    table = torch.randn(48, 5, generator=torch.Generator().manual_seed(1))

    def mixed(ids: Tensor, weights: Tensor) -> Tensor:
        return (weights[..., None] * table[ids]).sum(-2)

    inputs = mixed(batch.soft_ids_BSK, batch.soft_weights_BSK)
    torch.testing.assert_close(inputs[:, 1:], mixed(ids, weights)[:, :-1])
    torch.testing.assert_close(inputs[:, 0], table[BOS].expand(2, 5))


# Annealing


def layout_at(ordinals: list[int], num_samples: int, **fields: Any) -> AttentionLayout:
    tokens = TOKENS[:1].expand(len(ordinals), 8)
    samples = make_samples(tokens, ordinal_B=torch.tensor(ordinals), **fields)
    return AnnealedObjective(gidd(), num_samples).noised_batch(samples, SEED).layout


def seen(layout: AttentionLayout, batch_size: int) -> Tensor:
    everything = torch.ones(batch_size, 8, 8, dtype=torch.bool)
    return everything if layout.is_plain else everything & layout.visible_BQK


def test_attention_grows_from_causal_to_bidirectional() -> None:
    growing = seen(layout_at(list(range(20)), 16), 20)
    for place in range(20):
        lookahead = min(place, 16) * 8 // 16
        assert torch.equal(growing[place], torch.ones(8, 8).tril(lookahead).bool())
    assert (growing[1:] >= growing[:-1]).all() and growing[16:].all() and not growing[13].all()


def test_when_all_samples_see_everything_no_mask_is_left() -> None:
    assert layout_at([16, 17], 16).is_plain and not layout_at([15, 17], 16).is_plain
    validation = AnnealedObjective(gidd(), 16).noised_batch(make_samples(TOKENS, 0), SEED, validation=True)
    assert validation.layout.is_plain and validation.layout.kind == "bidirectional"


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_who_sees_whom_does_not_depend_on_the_batch_or_the_rank(documents: Tensor | None) -> None:
    """In particular not on whether all samples of a micro-batch are beyond the end."""
    whole = seen(layout_at([7, 20], 16, document_BL=documents), 2)
    for row in range(2):
        alone = layout_at([[7, 20][row]], 16, document_BL=None if documents is None else documents[row : row + 1])
        assert torch.equal(seen(alone, 1)[0], whole[row])
    order = context_parallel_order(8, 2)
    for rank in range(2):
        index = context_parallel_index(8, rank, 2)
        piece = layout_at([7, 20], 16, document_BL=documents).divided(index, order)
        assert torch.equal(piece.visible_BQK, whole[:, index][:, :, order])
    if documents is not None:
        assert not (whole & (documents[:, :, None] != documents[:, None, :])).any()


@pytest.mark.parametrize("ordinal, plain", [(0, AttentionLayout("causal")), (15, PLAIN)])
def test_both_ends_are_the_plain_kinds_in_value_and_gradient(ordinal: int, plain: AttentionLayout) -> None:
    """Sample 15 sees everything, but has a mask because of sample 0 beside it."""
    attention = CoreAttention(SimpleNamespace(context_parallel_size=1), 1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, 2, 4, 6, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 8, 2, 2, 6, generator=generator, dtype=torch.float64)
    results = []
    for layout in (layout_at([ordinal, 0], 15), plain):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attention(*inputs, None, attention_bias=layout)[:, 0]
        output.square().sum().backward()
        results.append([output, *(tensor.grad[:, 0] for tensor in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_settings_wrap_the_objective_they_belong_to() -> None:
    vocabulary = Vocabulary(size=V, mask_id=MASK, bos_id=BOS, eos_id=1, pad_id=2)
    adapting = GiddConfig(shift_inputs=True, attention_annealing_samples=16)
    batch = adapting.build(vocabulary).noised_batch(make_samples(TOKENS, 0), SEED)
    assert (batch.noised_BS[:, 0] == BOS).all() and batch.layout.lookahead_B.tolist() == [0, 0]
    assert adapting.shifts_inputs and not GiddConfig().shifts_inputs
    assert adapting.mask_features(documents=True, prompts=False) == {"causal", "look-ahead", "documents"}
    plain = GiddConfig()
    assert isinstance(plain.build(vocabulary), GiddObjective)
    assert plain.mask_features(documents=False, prompts=False) == frozenset()
    with pytest.raises(ValueError, match=r"objective.attention_annealing_samples is -1, but must be at least 0"):
        GiddConfig(attention_annealing_samples=-1)
