"""Levels per token, given tokens, augmentations and caps in the GIDD objective."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from chance import assert_frequencies
from diffusion.rows_reference import make_samples

from megadiff.diffusion import (
    Augmentation,
    CosineSchedule,
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    Samples,
    TabulatedSchedule,
    UniformMixing,
    corrupt,
    random_lengths,
    sequence_log_snr,
    token_log_snr,
)
from megadiff.philox import Purpose, random_words

V, MASK, SEED = 9, 3, 77
MIXINGS = [MaskedMixing(V, MASK), UniformMixing(V, MASK), HybridMixing(V, MASK, 0.0)]
LEVELS: dict[str, Any] = dict(independent_level_fraction=0.3, linear_level_fraction=0.2)
AUGMENTATION = Augmentation(max_empty_token_fraction=0.4, empty_id=2, random_length_fraction=0.3, prompt_fraction=0.5)


def objective_of(mixing: Any = MIXINGS[2], schedule: NoiseSchedule | None = None, **settings: Any) -> GiddObjective:
    return GiddObjective(DiffusionProcess(schedule or NoiseSchedule(), mixing), **settings)


def batch(batch_size: int = 32, length: int = 24, **fields: torch.Tensor) -> Samples:
    return make_samples(4 + torch.arange(batch_size * length).view(batch_size, length) % (V - 4), **fields)


@pytest.mark.parametrize("schedule", [NoiseSchedule(), CosineSchedule(), TabulatedSchedule()], ids=str)
def test_sequences_have_the_kinds_of_levels_asked_for(schedule: NoiseSchedule) -> None:
    samples = batch(2000, 12)
    levels = objective_of(schedule=schedule, **LEVELS).noised_batch(samples, SEED).log_snr_BS
    assert levels is not None and levels.dtype == torch.float64
    linear = schedule.log_snr(torch.arange(1, 13).double() / 13)
    own = token_log_snr(schedule, SEED, samples.ordinal_B, torch.arange(12))
    shared = sequence_log_snr(schedule, SEED, samples.ordinal_B)[:, None]
    is_linear, is_own, is_shared = ((levels == expected).all(dim=1) for expected in (linear, own, shared))
    kinds = torch.stack([is_shared, is_own, is_linear]).long()
    assert (kinds.sum(dim=0) == 1).all()
    assert_frequencies(kinds.argmax(dim=0), torch.tensor([0.5, 0.3, 0.2]))


def test_levels_of_their_own_come_from_the_first_token_word_and_are_uniform_in_time() -> None:
    ordinal, position, schedule = torch.tensor([5, 1 << 40]), torch.arange(5000), NoiseSchedule()
    levels = token_log_snr(schedule, SEED, ordinal, position)
    words = random_words(SEED, ordinal[:, None], position, Purpose.TOKEN)[..., 0]
    torch.testing.assert_close(schedule.time(levels), (words.double() + 0.5) / 2**32, rtol=0, atol=1e-13)
    assert_frequencies((10 * schedule.time(levels)).long(), torch.full((10,), 0.1))
    assert torch.equal(token_log_snr(schedule, SEED, ordinal[1:], position[7:9]), levels[1:, 7:9])


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_tokens_are_noised_at_their_own_levels(mixing: Any) -> None:
    objective, samples = objective_of(mixing, **LEVELS), batch()
    noised = objective.noised_batch(samples, SEED)
    assert noised.log_snr_BS is not None
    expected = corrupt(samples.tokens_BL, noised.log_snr_BS, samples.ordinal_B, SEED, objective.process)
    assert torch.equal(noised.noised_BS, expected)
    torch.testing.assert_close(noised.rows.alpha, noised.log_snr_BS.sigmoid().float())


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("validation", [False, True])
def test_given_tokens_stay_clean_and_weigh_nothing(mixing: Any, validation: bool) -> None:
    given = (torch.arange(24) % 5 == 0).expand(32, 24)
    objective = objective_of(mixing, **LEVELS)
    plain = objective.noised_batch(batch(), SEED, validation=validation)
    prompted = objective.noised_batch(batch(given_BL=given, counted_BL=~given), SEED, validation=validation)
    tokens, rows = batch().tokens_BL, prompted.rows
    assert plain.log_snr_BS is not None and prompted.log_snr_BS is not None
    assert torch.equal(prompted.noised_BS, torch.where(given, tokens, plain.noised_BS))
    assert torch.equal(rows.noised, prompted.noised_BS)
    assert torch.equal(rows.counted, ~given)
    for weight, of_plain in zip(
        (rows.kl_weight, rows.is_weight, rows.elbo_weight),
        (plain.rows.kl_weight, plain.rows.is_weight, plain.rows.elbo_weight),
        strict=True,
    ):
        assert torch.equal(weight, torch.where(given, 0.0, of_plain))
    assert (prompted.log_snr_BS[given] == 9.0).all()
    assert torch.equal(prompted.log_snr_BS[~given], plain.log_snr_BS[~given])
    assert prompted.layout.given_BS is given


def test_prompts_see_prompts_only_and_tails_nothing_but_tails() -> None:
    samples = batch(200)
    noised = objective_of(augmentation=AUGMENTATION).noised_batch(samples, SEED)
    visible, given, rows = noised.layout.visible_BQK, noised.layout.given_BS, noised.rows
    assert given is not None and given.any() and (given & rows.counted).sum() == 0
    length = random_lengths(samples.ordinal_B, 24, 0.3, SEED)
    tail = torch.arange(24) >= length[:, None]
    assert 0 < tail.any(dim=1).sum() < 200 and not (tail & (rows.counted | given)).any()
    expected = (tail[:, :, None] == tail[:, None]) & (given[:, None] | ~given[:, :, None])
    assert torch.equal(visible, expected)
    # Noise reaches no prompt, also over several layers, and no tail reaches what counts.
    reached = torch.linalg.matrix_power(visible.double(), 4) > 0
    assert not (reached & given[:, :, None] & ~given[:, None]).any()
    assert not (reached & rows.counted[:, :, None] & tail[:, None]).any()


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_validation_has_none_of_what_training_does(mixing: Any) -> None:
    plain = objective_of(mixing).noised_batch(batch(), SEED, validation=True)
    busy = objective_of(mixing, augmentation=AUGMENTATION, max_loss_weight=0.01, **LEVELS)
    validation = busy.noised_batch(batch(), SEED, validation=True)
    assert validation.layout.is_plain and torch.equal(validation.position_BS, plain.position_BS)
    for name in ("target", "noised", "alpha", "uniform_mass", "elbo_weight", "counted"):
        assert torch.equal(getattr(validation.rows, name), getattr(plain.rows, name))
    assert not torch.equal(busy.noised_batch(batch(), SEED).rows.target, plain.rows.target)


def test_noise_does_not_depend_on_the_composition_of_the_batch() -> None:
    objective, samples = objective_of(augmentation=AUGMENTATION, **LEVELS), batch()
    whole = objective.noised_batch(samples, SEED)
    some = torch.tensor([11, 2, 30])
    part = objective.noised_batch(make_samples(samples.tokens_BL[some], ordinal_B=samples.ordinal_B[some]), SEED)
    for name in ("noised_BS", "position_BS", "log_snr_BS"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[some])
    for name in ("target", "kl_weight", "elbo_weight", "counted"):
        assert torch.equal(getattr(part.rows, name), getattr(whole.rows, name)[some])
    assert torch.equal(part.layout.visible_BQK, whole.layout.visible_BQK[some])


@pytest.mark.parametrize(
    "settings",
    [
        LEVELS,
        dict(independent_level_fraction=1.0),
        dict(augmentation=AUGMENTATION),
        dict(augmentation=dataclasses.replace(AUGMENTATION, max_empty_token_fraction=0.0), **LEVELS),
        dict(augmentation=AUGMENTATION, loss_weighting="nelbo", max_loss_weight=3.0, **LEVELS),
    ],
    ids=lambda settings: ",".join(settings),
)
@pytest.mark.parametrize("validation", [False, True])
def test_active_rows_are_counted_under_every_option(settings: dict[str, Any], validation: bool) -> None:
    """In all and in each piece of the sequence; the data's own prompts and tokens that do not count only lower it."""
    objective, samples = objective_of(MIXINGS[0], **settings), batch(64, 120)
    weight = objective.noised_batch(samples, SEED, validation=validation).rows.kl_weight
    given = (torch.arange(120) < 9).expand(64, 120)
    fewer = dataclasses.replace(samples, given_BL=given, counted_BL=~given & (samples.tokens_BL != 5))
    weight_of_fewer = objective.noised_batch(fewer, SEED, validation=validation).rows.kl_weight
    order = torch.cat([torch.arange(90, 120), torch.arange(90)])
    for index in (None, order[:60], order[60:]):
        count = objective.count_active_rows(samples.ordinal_B, 120, SEED, validation=validation, index_S=index)
        piece = slice(None) if index is None else index
        assert count == int((weight[:, piece] != 0).sum())
        assert 0 < int((weight_of_fewer[:, piece] != 0).sum()) < count


def test_uniform_noise_may_weigh_anything_under_every_option() -> None:
    objective = objective_of(augmentation=AUGMENTATION, **LEVELS)
    assert objective.count_active_rows(torch.arange(4), 24, SEED) is None


def test_the_cap_binds_the_training_weight_alone() -> None:
    samples = batch()
    free = objective_of(MIXINGS[0], loss_weighting="nelbo").noised_batch(samples, SEED).rows
    capped = objective_of(MIXINGS[0], loss_weighting="nelbo", max_loss_weight=10.0).noised_batch(samples, SEED).rows
    assert torch.equal(capped.elbo_weight, free.elbo_weight) and free.elbo_weight.max() > 10
    assert torch.equal(capped.kl_weight, free.kl_weight.clamp(max=10.0))
    assert torch.equal(capped.is_weight, capped.kl_weight)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_published_caps_cannot_bind(mixing: Any) -> None:
    """w ≤ 2 and w/p ≤ 2/p(9) = 16 210, below 1e3 and 1e6."""
    process = objective_of(mixing).process
    log_snr, noised = torch.linspace(-9, 9, 181, dtype=torch.float64)[:, None], torch.arange(V)
    assert process.loss_weight(log_snr, torch.tensor(5), noised).max() <= 2
    assert process.elbo_weight(log_snr, torch.tensor(5), noised).max() < 16_211


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_loss_weight=0.0), "max_loss_weight must be positive, got 0.0"),
        (dict(max_loss_weight=math.nan), "max_loss_weight must be positive, got nan"),
        (dict(independent_level_fraction=0.6, linear_level_fraction=0.5), "sum is at most 1, got 0.6 and 0.5"),
        (dict(independent_level_fraction=-0.1), "must be shares whose sum is at most 1, got -0.1"),
        (dict(linear_level_fraction=math.nan), "must be shares whose sum is at most 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_of(**settings)
