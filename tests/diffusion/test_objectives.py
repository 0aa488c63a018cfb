"""The GIDD objective: its rows reproduce the dense bound, and noise belongs to samples, not to batches."""

import dataclasses
import math

import pytest
import torch
from chance import assert_frequencies, assert_mean
from rows_reference import make_samples, row_divergences

from megadiff.diffusion import (
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    Objective,
    UniformMixing,
    corrupt,
    nelbo_terms,
    noise_rows,
    random_lengths,
    sequence_log_snr,
)
from megadiff.philox import VALIDATION_OFFSET

V, MASK, SEED = 9, 3, 77
MIXINGS = [
    MaskedMixing(V, MASK),
    UniformMixing(V, MASK),
    UniformMixing(V, MASK, include_mask=True),
    *(HybridMixing(V, MASK, shift) for shift in (-1000.0, 0.0, 1000.0)),
]


def objective_of(mixing, **settings):
    return GiddObjective(DiffusionProcess(NoiseSchedule(), mixing), **settings)


def batch(batch_size=16, length=24):
    tokens = 4 + torch.arange(batch_size * length).view(batch_size, length) % (V - 4)
    return make_samples(tokens)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_rows_reproduce_the_dense_bound(mixing):
    objective = objective_of(mixing, beta_is_div=0.5)
    noised_batch = objective.noised_batch(batch(), SEED)
    rows = noised_batch.rows
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*rows.target.shape, V, dtype=torch.float64, generator=generator)
    terms = nelbo_terms(logits, rows.target, rows.noised, noised_batch.log_snr_BS, objective.process)
    kl_div, is_div = row_divergences(logits, rows, MASK)
    loss = terms.loss_weight * (terms.kl_div + 0.5 * terms.is_div)
    # The rows are float32, so 1e-7 of the terms; α near 1 leaves less of a nearly vanishing sum.
    for of_rows, of_terms in (
        (rows.kl_weight * kl_div + rows.is_weight * is_div, loss),
        (rows.elbo_weight * (kl_div + is_div), terms.nelbo),
    ):
        torch.testing.assert_close(of_rows, of_terms, rtol=2e-5, atol=2e-4)


def test_weighting_by_the_bound():
    mixing = HybridMixing(V, MASK, 0.0)
    of_nelbo = objective_of(mixing, loss_weighting="nelbo").noised_batch(batch(), SEED).rows
    assert torch.equal(of_nelbo.kl_weight, of_nelbo.elbo_weight)
    assert torch.equal(of_nelbo.is_weight, of_nelbo.elbo_weight)
    published = objective_of(mixing).noised_batch(batch(), SEED).rows
    assert torch.equal(published.elbo_weight, of_nelbo.elbo_weight)
    assert published.kl_weight.max() <= 2


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_noised_batch_has_the_contracts_fields(mixing):
    objective: Objective = objective_of(mixing)
    samples = batch()
    tokens, ordinal = samples.tokens_BL, samples.ordinal_B
    noised_batch = objective.noised_batch(samples, SEED)
    rows = noised_batch.rows
    log_snr = sequence_log_snr(NoiseSchedule(), SEED, ordinal)[:, None].expand(tokens.shape)
    assert objective.sequence_length(24) == 24
    assert torch.equal(noised_batch.log_snr_BS, log_snr)
    assert torch.equal(noised_batch.noised_BS, corrupt(tokens, log_snr, ordinal, SEED, objective.process))
    assert torch.equal(rows.target, tokens) and torch.equal(rows.noised, noised_batch.noised_BS)
    assert torch.equal(noised_batch.position_BS, torch.arange(24).expand(16, 24))
    assert noised_batch.layout.kind == "bidirectional" and noised_batch.layout.is_plain
    assert noised_batch.soft_ids_BSK is None and noised_batch.soft_weights_BSK is None
    for name in ("alpha", "uniform_mass", "kl_weight", "is_weight", "elbo_weight"):
        assert getattr(rows, name).dtype == torch.float32 and getattr(rows, name).shape == tokens.shape
    assert rows.counted.dtype == torch.bool and rows.counted.all()
    assert rows.any_uniform_mass == bool(rows.uniform_mass.any())


def test_uncounted_rows_weigh_nothing():
    samples = batch()
    objective = objective_of(HybridMixing(V, MASK, 0.0))
    whole = objective.noised_batch(samples, SEED)
    counted = torch.ones_like(samples.counted_BL)
    counted[:, 5:9] = False
    partial = objective.noised_batch(dataclasses.replace(samples, counted_BL=counted), SEED)
    assert torch.equal(partial.noised_BS, whole.noised_BS)
    assert torch.equal(partial.rows.counted, counted)
    for name in ("kl_weight", "is_weight", "elbo_weight"):
        of_partial, of_whole = getattr(partial.rows, name), getattr(whole.rows, name)
        assert (of_partial[:, 5:9] == 0).all()
        assert torch.equal(of_partial[counted], of_whole[counted])


@pytest.mark.parametrize("validation", [False, True])
def test_noise_does_not_depend_on_the_composition_of_the_batch(validation):
    objective, samples = objective_of(HybridMixing(V, MASK, 0.0)), batch()
    whole = objective.noised_batch(samples, SEED, validation=validation)
    some = torch.tensor([11, 2, 3])
    chosen = make_samples(samples.tokens_BL[some], ordinal_B=samples.ordinal_B[some])
    part = objective.noised_batch(chosen, SEED, validation=validation)
    assert torch.equal(part.noised_BS, whole.noised_BS[some])
    assert torch.equal(part.rows.kl_weight, whole.rows.kl_weight[some])


def test_validation_draws_levels_and_noise_of_its_own():
    objective, samples = objective_of(HybridMixing(V, MASK, 0.0)), batch()
    tokens, ordinal = samples.tokens_BL, samples.ordinal_B
    validation = objective.noised_batch(samples, SEED, validation=True)
    levels = sequence_log_snr(NoiseSchedule(), SEED, ordinal, VALIDATION_OFFSET)[:, None].expand(tokens.shape)
    assert torch.equal(validation.log_snr_BS, levels)
    noised = corrupt(tokens, levels, ordinal, SEED, objective.process, validation=True)
    assert torch.equal(validation.noised_BS, noised)
    assert not torch.equal(levels, objective.noised_batch(samples, SEED).log_snr_BS)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("mask_id", [0, MASK])
@pytest.mark.parametrize("validation", [False, True])
def test_active_rows_are_counted_without_tokens(mixing, mask_id, validation):
    mixing = dataclasses.replace(mixing, mask_id=mask_id)
    objective, samples = objective_of(mixing), batch(32, 500)
    tokens, ordinal = samples.tokens_BL, samples.ordinal_B
    rows = objective.noised_batch(samples, SEED, validation=validation).rows
    active = int(((rows.kl_weight != 0) | (rows.is_weight != 0) | (rows.elbo_weight != 0)).sum())
    count = objective.count_active_rows(ordinal, 500, SEED, validation=validation)
    if rows.any_uniform_mass:
        assert count is None and active == tokens.numel()
    else:
        assert count == active and 0.4 < active / tokens.numel() < 0.6
        samples = make_samples(tokens, counted_BL=(torch.arange(500) % 3 > 0).expand(32, 500))
        weight = objective.noised_batch(samples, SEED, validation=validation).rows.kl_weight
        assert 0 < int((weight != 0).sum()) < count


@pytest.mark.parametrize("mixing", [MaskedMixing(V, MASK), HybridMixing(V, MASK, 0.0)], ids=str)
def test_context_parallel_pieces_are_pieces_of_the_whole(mixing):
    """Cut in any order, each piece has its own noise, rows and positions, and its own count of active rows."""
    objective, samples = objective_of(mixing), batch(4, 24)
    documents = torch.arange(24).div(5, rounding_mode="floor").expand(4, 24)
    whole = objective.noised_batch(dataclasses.replace(samples, document_BL=documents), SEED)
    assert whole.position_BS[0].tolist() == [*[0, 1, 2, 3, 4] * 4, 0, 1, 2, 3]
    plain = objective.noised_batch(samples, SEED)
    assert torch.equal(whole.noised_BS, plain.noised_BS) and torch.equal(whole.rows.kl_weight, plain.rows.kl_weight)
    order = torch.cat([torch.arange(16, 24), torch.arange(16)])
    pieces = [whole.divided(index, order) for index in (order[:12], order[12:])]
    for name in ("noised_BS", "position_BS", "log_snr_BS"):
        assert torch.equal(torch.cat([getattr(p, name) for p in pieces], dim=1), getattr(whole, name)[:, order])
    for field in dataclasses.fields(whole.rows):
        values = [getattr(piece.rows, field.name) for piece in pieces]
        if field.name == "any_uniform_mass":
            assert values == [whole.rows.any_uniform_mass] * 2
        else:
            assert torch.equal(torch.cat(values, dim=1), getattr(whole.rows, field.name)[:, order])
    for piece, index in zip(pieces, (order[:12], order[12:]), strict=True):
        assert torch.equal(piece.layout.visible_BQK, whole.layout.visible_BQK[:, index][:, :, order])
        count = objective.count_active_rows(samples.ordinal_B, 24, SEED, index_S=index)
        assert count == (None if whole.rows.any_uniform_mass else int((piece.rows.kl_weight != 0).sum()))


def test_noise_may_be_injected():
    calls = []

    def noise(*arguments, **options):
        calls.append((arguments, options))
        return noise_rows(*arguments, **options)

    plain, injected = (objective_of(MaskedMixing(V, MASK), **settings) for settings in ({}, {"noise": noise}))
    expected = plain.noised_batch(batch(), SEED, validation=True)
    assert torch.equal(injected.noised_batch(batch(), SEED, validation=True).noised_BS, expected.noised_BS)
    [(arguments, options)] = calls
    assert arguments[5] is injected.process and options == {"validation": True}


def test_average_bound_at_zero_logits_is_the_logarithm_of_the_vocabulary():
    objective = objective_of(MaskedMixing(V, MASK))
    rows = objective.noised_batch(batch(512, 64), SEED).rows
    kl_div, is_div = row_divergences(torch.zeros(512, 64, V), rows, MASK)
    per_sequence = (rows.elbo_weight * (kl_div + is_div)).mean(-1)
    assert_mean(per_sequence, math.log(V - 1), at_most=0.1 * math.log(V - 1))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loss_weighting="elbo"), "loss_weighting must be 'gidd' or 'nelbo', got 'elbo'"),
        (dict(beta_is_div=-1.0), "beta_is_div must be finite and not negative, got -1.0"),
        (dict(beta_is_div=math.nan), "beta_is_div must be finite"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objective_of(MaskedMixing(V, MASK), **settings)


def test_samples_that_do_not_fit_together_are_refused():
    tokens = batch().tokens_BL
    with pytest.raises(ValueError, match="counted_BL must have the tokens' shape"):
        make_samples(tokens, counted_BL=torch.ones(16, 23, dtype=torch.bool))
    with pytest.raises(ValueError, match="ordinal_B must have shape"):
        make_samples(tokens, ordinal_B=torch.arange(3))


def test_shortened_samples_end_where_they_should():
    tokens = batch(4, 24).tokens_BL
    documents = torch.arange(24).div(5, rounding_mode="floor").expand(4, 24)
    given = (torch.arange(24) < 3).expand(4, 24)
    samples = make_samples(tokens, document_BL=documents, given_BL=given, counted_BL=~given)
    short = samples.shortened(torch.tensor([24, 1, 2, 17]))
    for row, length in enumerate([24, 1, 2, 17]):
        assert torch.equal(short.counted_BL[row, :length], samples.counted_BL[row, :length])
        assert not short.counted_BL[row, length:].any() and not short.given_BL[row, length:].any()
        assert torch.equal(short.document_BL[row, :length], documents[row, :length])
        assert set(short.document_BL[row, length:].tolist()).isdisjoint(documents[row].tolist())
    assert torch.equal(short.tokens_BL, tokens)


def test_random_lengths_cut_the_share_they_should_uniformly():
    lengths = random_lengths(torch.arange(40_000), 10, 0.25, SEED)
    # A cut sample keeps its length in one of ten cases.
    assert_frequencies(lengths, torch.tensor([0.0] + [0.025] * 9 + [0.775]))
    assert (random_lengths(torch.arange(100), 10, 0.0, SEED) == 10).all()
    assert torch.equal(
        random_lengths(torch.arange(50, 60), 10, 1.0, SEED), random_lengths(torch.arange(60), 10, 1.0, SEED)[50:]
    )
