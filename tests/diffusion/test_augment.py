"""What only training does to samples: right frequencies, flags that move along, and pure functions of the ordinal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from chance import assert_frequencies
from diffusion.rows_reference import make_samples

from megadiff.diffusion import Augmentation, Samples, random_lengths
from megadiff.diffusion.augment import (
    empty_token_shares,
    random_prompt_lengths,
    with_empty_tokens,
    with_prompts,
)

SEED, EMPTY = 9, 2
EVERYTHING = Augmentation(max_empty_token_fraction=0.4, empty_id=EMPTY, random_length_fraction=0.5, prompt_fraction=0.5)


def labelled(batch_size: int, length: int) -> Samples:
    """Samples whose tokens say where they were, and whose flags follow from them."""
    tokens = 100 + torch.arange(length).expand(batch_size, length)
    given = tokens % 7 == 0
    return make_samples(tokens, given_BL=given, counted_BL=~given & (tokens % 5 != 0), document_BL=(tokens - 100) // 10)


def equal(a: Samples, b: Samples) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Samples))


def taken(samples: Samples, rows: slice) -> Samples:
    return Samples(**{field.name: getattr(samples, field.name)[rows] for field in dataclasses.fields(Samples)})


def test_empty_tokens_move_everything_along() -> None:
    samples = labelled(64, 80)
    moved = with_empty_tokens(samples, torch.full((64,), 0.25, dtype=torch.float64), EMPTY, SEED)
    for before, after in zip(samples.tokens_BL, moved.tokens_BL, strict=True):
        kept = after[after != EMPTY]
        assert torch.equal(kept, before[: len(kept)])
    # The place of the token itself or of the last one before, the first in front of it.
    source = torch.where(moved.tokens_BL == EMPTY, -1, moved.tokens_BL - 100).cummax(dim=1).values.clamp(min=0)
    for name in ("counted_BL", "given_BL", "document_BL"):
        assert torch.equal(getattr(moved, name), getattr(samples, name).gather(1, source))
    assert (moved.tokens_BL[:, 0] == EMPTY).any() and (moved.document_BL.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_places_are_empty_with_the_probability_asked_for(share: float) -> None:
    moved = with_empty_tokens(labelled(200, 100), torch.full((200,), share, dtype=torch.float64), EMPTY, SEED)
    is_empty = (moved.tokens_BL == EMPTY).long()
    assert_frequencies(is_empty, torch.tensor([1 - share, share]))


def test_shares_of_empty_tokens_are_uniform_up_to_the_maximum() -> None:
    share = empty_token_shares(torch.arange(20_000), 0.2, SEED)
    assert_frequencies((share / 0.02).long(), torch.full((10,), 0.1))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_prompt_lengths_have_the_published_law(length: int) -> None:
    """Length k of N: f = arccos(1 − 2r)/π in [(k − 1)/(N − 1), k/(N − 1)), whose probability is that of r."""
    drawn = random_prompt_lengths(torch.arange(40_000), torch.full((40_000,), length), 0.3, SEED)
    bounds = torch.cos(math.pi * torch.linspace(0, 1, max(length, 2), dtype=torch.float64))
    law = 0.3 * (bounds[:-1] - bounds[1:]) / 2
    assert_frequencies(drawn, torch.cat([torch.tensor([0.7], dtype=torch.float64), law]))
    assert drawn.max() == max(length - 1, 1)


def test_prompts_are_what_counts_among_the_first_tokens() -> None:
    samples = labelled(3, 40)
    assert samples.given_BL is not None
    prompted = with_prompts(samples, torch.tensor([0, 12, 40]))
    prefix = torch.arange(40) < torch.tensor([[0], [12], [40]])
    assert torch.equal(prompted.counted_BL, samples.counted_BL & ~prefix)
    assert torch.equal(prompted.given_BL, samples.given_BL | (samples.counted_BL & prefix))
    without = with_prompts(dataclasses.replace(samples, given_BL=None), torch.tensor([0, 12, 40]))
    assert torch.equal(without.given_BL, samples.counted_BL & prefix)


def test_all_at_once_of_a_slice_is_the_slice_of_all_at_once() -> None:
    samples = labelled(64, 40)
    whole = EVERYTHING.augmented(samples, SEED)
    assert equal(EVERYTHING.augmented(taken(samples, slice(20, 30)), SEED), taken(whole, slice(20, 30)))
    other_seed = EVERYTHING.augmented(samples, SEED + 1)
    assert not torch.equal(whole.tokens_BL, other_seed.tokens_BL)


def test_prompts_fit_into_shortened_samples() -> None:
    samples = make_samples(torch.zeros(2000, 40, dtype=torch.int64))
    augmented = EVERYTHING.augmented(samples, SEED)
    assert augmented.given_BL is not None
    length = random_lengths(samples.ordinal_B, 40, 0.5, SEED)
    kept = torch.arange(40) < length[:, None]
    assert torch.equal(augmented.counted_BL | augmented.given_BL, kept)
    # A prompt leaves something to predict wherever there are two tokens.
    assert augmented.counted_BL[length > 1].any(dim=1).all()
    assert_frequencies(augmented.given_BL.any(dim=1).long(), torch.tensor([0.5, 0.5]))


def test_none_of_it_is_the_default() -> None:
    samples = labelled(8, 40)
    assert equal(Augmentation().augmented(samples, SEED), samples)


@pytest.mark.parametrize("name", ["max_empty_token_fraction", "random_length_fraction", "prompt_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_shares_outside_of_0_to_1_are_refused(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got {value}"):
        Augmentation(**settings)
