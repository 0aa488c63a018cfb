"""Masked diffusion on whole samples and in blocks: unbiased estimators, weights, counts, noise that is a function."""

import dataclasses
import math

import pytest
import torch
from any_order import MASK, V, all_texts, hidden_sets_nll, losses_of, random_order_nll, random_table
from chance import assert_frequencies, assert_mean
from rows_reference import make_samples, row_losses

from megadiff.diffusion import (
    BlockDiffusionObjective,
    DiffusionProcess,
    ExactCountMasking,
    GiddObjective,
    LevelMasking,
    LogLinearSchedule,
    MaskedMixing,
    MdlmObjective,
    NoiseSchedule,
    Objective,
    random_lengths,
)
from megadiff.parallel.vocab_loss import vocab_loss

SEED = 77
WORDS, WORD_MASK = 11, 3
"""Of the tests that need more than the toy vocabulary."""


def masking_of(kind, vocab_size=WORDS, mask_id=WORD_MASK, schedule=None, **settings):
    masking = ExactCountMasking if kind == "exact_count" else LevelMasking
    return masking(mixing=MaskedMixing(vocab_size, mask_id), schedule=schedule or LogLinearSchedule(), **settings)


def objective_of(masking, block_size=None, **settings):
    if block_size is None:
        return MdlmObjective(masking=masking, **settings)
    return BlockDiffusionObjective(masking=masking, block_size=block_size, **settings)


def batch(batch_size=16, length=24, **fields):
    tokens = 4 + torch.arange(batch_size * length).view(batch_size, length) % (WORDS - 4)
    return make_samples(tokens, **fields)


def midpoints(number):
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


EVERY = pytest.mark.parametrize("kind", ["levels", "exact_count"])
BLOCKS = pytest.mark.parametrize("block_size", [None, 1, 4, 24])


# --- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens, block_size", [(3, None), (3, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize("loss_weighting", ["nelbo", "simple"])
@EVERY
def test_estimators_average_to_sums_over_all_hidden_sets(num_tokens, block_size, loss_weighting, kind):
    """40 000 samples, every text equally often. Errors are those of independent samples; stratified ones do better.

    Under exact counts the bound is that of a random order; under levels it is cut to times in [ε, 1].
    """
    table, size = random_table(num_tokens), block_size or num_tokens
    masking = masking_of(kind, V, MASK, loss_weighting=loss_weighting)
    tokens = all_texts(num_tokens).repeat(40_000 // 3**num_tokens, 1)
    noised = objective_of(masking, block_size).noised_batch(make_samples(tokens, 0), SEED)

    if kind == "levels":
        log_snr = masking.schedule.log_snr(midpoints(100_000))
        alpha, bound_weight = log_snr.sigmoid(), masking.weight(log_snr)

        def of_levels(k, weight):
            return (weight * (1 - alpha) ** k * alpha ** (size - k)).mean().item()

        expected = {"nelbo": lambda k: of_levels(k, bound_weight), "simple": lambda k: of_levels(k, 1.0)}
    else:
        expected = {"nelbo": lambda k: 1 / (k * math.comb(size, k)), "simple": lambda k: 1 / size / math.comb(size, k)}
    in_random_order = random_order_nll(table, size)
    assert hidden_sets_nll(table, size, expected["nelbo"]) == pytest.approx(
        in_random_order, rel=1e-12 if kind == "exact_count" else 4e-3
    )

    nll = losses_of(table, noised)
    for weight, name in ((noised.rows.elbo_weight, "nelbo"), (noised.rows.kl_weight, loss_weighting)):
        of_texts = (weight[:, :num_tokens].double() * nll).sum(-1)
        exact = hidden_sets_nll(table, size, expected[name])
        assert_mean(of_texts, exact, at_most=0.03 * exact)

    if (kind, loss_weighting, block_size) == ("exact_count", "nelbo", None):
        # A count of 0 that is forced to 1 afterwards would be seen.
        forced = hidden_sets_nll(
            table, size, lambda k: (expected["nelbo"](k) + (k == 1) / size) * num_tokens / (num_tokens + 1)
        )
        with pytest.raises(AssertionError, match="is not"):
            assert_mean(of_texts, forced, at_most=0.03 * forced)


@pytest.mark.parametrize("validation", [False, True])
def test_blocks_of_one_counted_token_are_exactly_autoregressive(validation):
    """No randomness is left: each sample's loss is the chain rule's."""
    table, tokens = random_table(4), all_texts(4)
    objective = objective_of(masking_of("exact_count", V, MASK), 1)
    noised = objective.noised_batch(make_samples(tokens), SEED, validation=validation)
    assert (noised.rows.kl_weight[:, :4] == 1).all() and (noised.noised_BS[:, :4] == MASK).all()
    assert losses_of(table, noised).sum(-1).mean().item() == pytest.approx(random_order_nll(table, 1), rel=1e-12)


class CosineSchedule(NoiseSchedule):
    """α = cos(πt/2), between the log-SNR bounds of the linear schedule."""

    def log_snr(self, time):
        first, last = (
            math.acos(1 / (1 + math.exp(-log_snr))) * 2 / math.pi for log_snr in (self.max_log_snr, self.min_log_snr)
        )
        return (torch.cos((first + (last - first) * time) * math.pi / 2)).logit()

    def log_snr_pdf(self, log_snr):
        alpha = log_snr.sigmoid()
        return 2 / math.pi * alpha * ((1 - alpha) / (1 + alpha)).sqrt()


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule(), LogLinearSchedule(), LogLinearSchedule(epsilon=1e-4), CosineSchedule()], ids=repr
)
def test_the_bound_of_levels_does_not_depend_on_the_schedule(schedule):
    """C(L, k)·∫ (1/t)·tᵏ(1 − t)ᴸ⁻ᵏ dt = 1/k, and 1/(L + 1) without 1/t, up to what the ends of the range cut off."""
    masking = masking_of("levels", schedule=schedule)
    log_snr = schedule.log_snr(midpoints(400_000))
    alpha, span = log_snr.sigmoid(), schedule.max_log_snr - schedule.min_log_snr
    normaliser = span / (1 / schedule.log_snr_pdf(log_snr)).mean()  # ∫ p dλ, which published weights leave out
    cut_off = max(1 - alpha.max().item(), alpha.min().item())
    for length in (1, 2, 7):
        for k in range(1, length + 1):
            probability = (1 - alpha) ** k * alpha ** (length - k) * math.comb(length, k)
            bound = normaliser * (masking.weight(log_snr) * probability).mean()
            assert bound.item() == pytest.approx(1 / k, abs=2.2 * length * cut_off)
            if not isinstance(schedule, CosineSchedule):
                assert probability.mean().item() == pytest.approx(1 / (length + 1), abs=2.2 * length * cut_off)


# --- weights and initial losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_the_weight_is_one_over_time(epsilon):
    masking = masking_of("levels", schedule=LogLinearSchedule(epsilon=epsilon))
    time = torch.tensor([epsilon, 0.1, 0.5, 1.0], dtype=torch.float64)
    log_snr = masking.schedule.log_snr((time - epsilon) / (1 - epsilon))
    torch.testing.assert_close(masking.weight(log_snr), 1 / time, rtol=1e-9, atol=0)
    torch.testing.assert_close(log_snr.sigmoid(), 1 - (1 - epsilon) * time, rtol=1e-12, atol=0)


@pytest.mark.parametrize("vocab_size, bound, simple", [(32_001, 10.36312, 5.18674), (131_072, 11.77171, 5.89174)])
def test_initial_losses(vocab_size, bound, simple):
    """A zero head loses ln(V − 1) nats on every hidden token."""
    nats = math.log(vocab_size - 1)
    masking = masking_of("levels", vocab_size)
    log_snr = masking.schedule.log_snr(midpoints(100_000))
    hidden = 1 - log_snr.sigmoid()
    assert (hidden * masking.weight(log_snr)).mean().item() * nats == pytest.approx(bound, abs=2e-5)
    assert hidden.mean().item() * nats == pytest.approx(simple, abs=2e-5)

    samples = batch(4000, 32)
    for loss_weighting, exact in (("nelbo", bound), ("simple", simple)):
        masking = masking_of("levels", vocab_size, loss_weighting=loss_weighting)
        rows = objective_of(masking).noised_batch(samples, SEED).rows
        assert_mean(rows.kl_weight.mean(-1) * nats, exact, at_most=0.025 * exact)
    # With an exact count a constant loss c per hidden token makes a bound of c, sample by sample.
    rows = objective_of(masking_of("exact_count", vocab_size)).noised_batch(samples, SEED).rows
    torch.testing.assert_close(rows.elbo_weight.mean(-1), torch.ones(4000), rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [32_001, 131_072])
@EVERY
def test_rows_are_cross_entropy_of_hidden_tokens_alone(vocab_size, kind):
    """Through the loss of training: value, gradient, and exact zeros where nothing is hidden."""
    noised = objective_of(masking_of(kind, vocab_size)).noised_batch(batch(3, 4), SEED)
    rows = noised.rows.flat()
    logits = torch.zeros(12, vocab_size, requires_grad=True)
    loss = vocab_loss(logits, rows, vocab_size=vocab_size, mask_id=WORD_MASK).loss_T
    loss.sum().backward()
    hidden = (noised.noised_BS == WORD_MASK).t().flatten()
    assert 0 < hidden.sum() < 12
    torch.testing.assert_close(loss[hidden], rows.kl_weight[hidden] * math.log(vocab_size - 1))
    expected = torch.full_like(logits, 1 / (vocab_size - 1))
    expected[torch.arange(12), rows.target] -= 1
    expected[:, WORD_MASK] = 0
    expected *= rows.kl_weight[:, None]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)
    assert (loss[~hidden] == 0).all() and (logits.grad[~hidden] == 0).all()


# --- which tokens hide ------------------------------------------------------------------------------------------------


@BLOCKS
def test_exact_counts_are_exact_uniform_and_of_counted_tokens(block_size):
    size, num_samples = block_size or 24, 9000
    counted = torch.arange(24) % 8 != 5
    given = torch.arange(24) % 8 == 5
    samples = batch(num_samples, counted_BL=counted.expand(num_samples, 24), given_BL=given.expand(num_samples, 24))
    noised = objective_of(masking_of("exact_count"), block_size).noised_batch(samples, SEED)
    rows = noised.rows
    hidden = (noised.noised_BS[:, :24] == WORD_MASK).view(num_samples, -1, size)
    counted = counted.view(-1, size)
    assert not (hidden & ~counted).any()
    number, k = counted.sum(-1).expand(num_samples, -1), hidden.sum(-1)
    weight = (number / k.clamp(min=1)).float()[..., None] * hidden
    torch.testing.assert_close(rows.elbo_weight[:, :24].view_as(weight), weight)
    for group in range(counted.shape[0]):
        n = int(counted[group].sum())
        # Stratified: each count occurs as often as it should, up to the discrepancy of the rotation.
        frequency = torch.bincount(k[:, group], minlength=n + 1) * max(n, 1) / num_samples
        expected = torch.tensor([float(n == 0)] + [1.0] * n)
        torch.testing.assert_close(frequency, expected, rtol=0, atol=0.005 * max(n, 1))


def test_exact_counts_hide_every_set_of_k_equally_often():
    samples = make_samples(torch.full((12_000, 5), 4))
    hidden = objective_of(masking_of("exact_count")).noised_batch(samples, SEED).noised_BS == WORD_MASK
    for k in range(1, 5):
        sets = (hidden[hidden.sum(-1) == k] * 2 ** torch.arange(5)).sum(-1)
        possible = torch.tensor([float(bin(x).count("1") == k) for x in range(32)])
        assert_frequencies(sets, possible / possible.sum())


@BLOCKS
def test_validation_counts_whatever_training_does(block_size):
    """The bound has no ends cut off: with a constant loss c per hidden token, every sample's is c."""
    by_level, by_count = (
        objective_of(masking_of(kind, loss_weighting="simple"), block_size).noised_batch(batch(), SEED, validation=True)
        for kind in ("levels", "exact_count")
    )
    assert torch.equal(by_level.noised_BS, by_count.noised_BS)
    for name in ("kl_weight", "elbo_weight"):
        assert torch.equal(getattr(by_level.rows, name), getattr(by_count.rows, name))
    torch.testing.assert_close(by_level.rows.elbo_weight[:, :24].mean(-1), torch.ones(16), rtol=1e-6, atol=0)


@BLOCKS
def test_models_are_told_the_level_that_a_count_shows(block_size):
    """Of k hidden in n: about log((n − k)/k), nothing that the noised tokens do not show, and never out of range."""
    schedule, size = LogLinearSchedule(), block_size or 24
    noised = objective_of(masking_of("exact_count"), block_size).noised_batch(batch(64), SEED)
    k = (noised.noised_BS[:, :24] == WORD_MASK).view(64, -1, size).sum(-1).double()
    told = noised.log_snr_BS[:, :24].view(64, -1, size)
    expected = torch.logit((size - k + 0.5) / (size + 1)).clamp(schedule.min_log_snr, schedule.max_log_snr)
    torch.testing.assert_close(told, expected[..., None].expand_as(told), rtol=1e-12, atol=1e-12)
    assert (noised.log_snr_BS[:, 24:] == schedule.max_log_snr).all()


@pytest.mark.parametrize("block_size", [1, 4, 24])
def test_levels_of_blocks_are_stratified_and_decide_their_block_alone(block_size):
    masking, samples = masking_of("levels"), batch(64)
    noised = objective_of(masking, block_size).noised_batch(samples, SEED)
    level = noised.log_snr_BS[:, :24].view(64, -1, block_size)
    assert (level == level[..., :1]).all()
    assert (noised.log_snr_BS[:, 24:] == masking.schedule.max_log_snr).all()
    time = masking.schedule.time(level[..., 0]).flatten().sort().values
    assert time.diff().max() < 2.7 / len(time)  # the golden rotation leaves no gap above φ²/N
    weight = noised.rows.elbo_weight[:, :24]
    hidden = noised.noised_BS[:, :24] == WORD_MASK
    expected = torch.where(hidden, masking.weight(noised.log_snr_BS[:, :24]), 0.0)
    torch.testing.assert_close(weight, expected.float())
    if block_size == 4:
        share = hidden.double().mean()
        assert 0.45 < share < 0.55


@BLOCKS
@EVERY
@pytest.mark.parametrize("validation", [False, True])
def test_given_tokens_stay_and_rows_that_do_not_count_weigh_nothing(block_size, kind, validation):
    given = (torch.arange(24) < 7).expand(16, 24)
    counted = ((torch.arange(24) >= 7) & (torch.arange(24) < 20)).expand(16, 24)
    samples = batch(given_BL=given, counted_BL=counted)
    noised = objective_of(masking_of(kind), block_size).noised_batch(samples, SEED, validation=validation)
    rows = noised.rows
    assert torch.equal(noised.noised_BS[:, :24][given], samples.tokens_BL[given])
    assert torch.equal(rows.counted[:, :24], counted) and not rows.counted[:, 24:].any()
    for weight in (rows.kl_weight, rows.elbo_weight):
        assert torch.equal(weight[:, :24] != 0, counted & (noised.noised_BS[:, :24] == WORD_MASK))
        assert (weight[:, 24:] == 0).all()
    assert (noised.log_snr_BS[:, :24][given] == LogLinearSchedule().max_log_snr).all()


# --- the contract -----------------------------------------------------------------------------------------------------


@BLOCKS
@EVERY
def test_noised_batch_has_the_contracts_fields(block_size, kind):
    objective: Objective = objective_of(masking_of(kind), block_size)
    samples = batch()
    noised = objective.noised_batch(samples, SEED)
    rows, length = noised.rows, objective.sequence_length(24)
    copies = length // 24
    assert copies == (1 if block_size is None else 2)
    assert torch.equal(rows.target, samples.tokens_BL.repeat(1, copies)) and (rows.noised == WORD_MASK).all()
    assert torch.equal(noised.position_BS, torch.arange(24).repeat(16, copies))
    assert noised.layout.is_plain == (block_size is None)
    assert noised.log_snr_BS.shape == (16, length) and noised.log_snr_BS.dtype == torch.float64
    for name in ("alpha", "uniform_mass", "kl_weight", "is_weight", "elbo_weight"):
        assert getattr(rows, name).dtype == torch.float32 and getattr(rows, name).shape == (16, length)
    assert (rows.alpha == 1).all() and not rows.uniform_mass.any() and not rows.is_weight.any()
    assert not rows.any_uniform_mass
    loss, nelbo = row_losses(torch.randn(16, length, WORDS), rows, WORD_MASK)
    assert torch.equal(loss, nelbo) and ((loss > 0) == (rows.elbo_weight > 0)).all()


@BLOCKS
@EVERY
@pytest.mark.parametrize("validation", [False, True])
def test_noise_belongs_to_samples_not_to_batches(block_size, kind, validation):
    objective, samples = objective_of(masking_of(kind), block_size, random_length_fraction=0.5), batch()
    whole = objective.noised_batch(samples, SEED, validation=validation)
    some = torch.tensor([11, 2, 3])
    chosen = make_samples(samples.tokens_BL[some], ordinal_B=samples.ordinal_B[some])
    part = objective.noised_batch(chosen, SEED, validation=validation)
    assert torch.equal(part.noised_BS, whole.noised_BS[some])
    assert torch.equal(part.rows.kl_weight, whole.rows.kl_weight[some])
    other = objective.noised_batch(samples, SEED, validation=not validation)
    assert not torch.equal(other.noised_BS, whole.noised_BS)


@BLOCKS
@EVERY
@pytest.mark.parametrize("mask_id", [0, WORD_MASK])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_active_rows_are_counted_without_tokens(block_size, kind, mask_id, fraction):
    """Exactly where all tokens count; a bound where some do not, for the whole and for context-parallel pieces."""
    masking = masking_of(kind, mask_id=mask_id)
    objective = objective_of(masking, block_size, random_length_fraction=fraction)
    samples = batch(40)
    length = objective.sequence_length(24)
    pieces = [None, torch.cat([torch.arange(length // 4), torch.arange(length * 3 // 4, length)])]
    pieces += [torch.arange(length // 4, length * 3 // 4), torch.arange(24, length)]
    some = (torch.arange(24) * torch.arange(40)[:, None] % 5 > 1) & (torch.arange(24) >= 6)
    for validation in (False, True):
        for counted in (torch.ones(40, 24, dtype=torch.bool), some):
            chosen = dataclasses.replace(samples, counted_BL=counted)
            weight = objective.noised_batch(chosen, SEED, validation=validation).rows.elbo_weight
            for index in pieces:
                active = int((weight if index is None else weight[:, index]).count_nonzero())
                count = objective.count_active_rows(samples.ordinal_B, 24, SEED, validation=validation, index_S=index)
                by_levels = kind == "levels" and not validation
                is_exact = counted.all() and (by_levels or index is None)
                assert count == active if is_exact else count >= active


def test_counts_of_whole_blocks_are_exact_in_context_parallel_pieces():
    objective, samples = objective_of(masking_of("exact_count"), 3), batch(40)
    weight = objective.noised_batch(samples, SEED).rows.elbo_weight
    for index in (torch.cat([torch.arange(12), torch.arange(36, 48)]), torch.arange(12, 36)):
        count = objective.count_active_rows(samples.ordinal_B, 24, SEED, index_S=index)
        assert count == int(weight[:, index].count_nonzero())


@BLOCKS
@EVERY
def test_cut_samples_end_in_training_alone(block_size, kind):
    objective, samples = objective_of(masking_of(kind), block_size, random_length_fraction=1.0), batch(200)
    is_tail = torch.arange(24) >= random_lengths(samples.ordinal_B, 24, 1.0, SEED)[:, None]
    assert 0.3 < is_tail.double().mean() < 0.6
    noised = objective.noised_batch(samples, SEED)
    assert torch.equal(noised.rows.counted[:, :24], ~is_tail) and not noised.rows.kl_weight[:, :24][is_tail].any()
    documents = noised.layout.document_BS
    assert torch.equal(documents, torch.where(is_tail, 24, 0).repeat(1, noised.noised_BS.shape[1] // 24))
    validation = objective.noised_batch(samples, SEED, validation=True)
    assert validation.rows.counted[:, :24].all() and validation.layout.document_BS is None


def test_simple_weighting_changes_the_training_loss_alone():
    for kind in ("levels", "exact_count"):
        by_bound, by_one = (
            objective_of(masking_of(kind, loss_weighting=weighting)).noised_batch(batch(), SEED)
            for weighting in ("nelbo", "simple")
        )
        nelbo, simple = by_bound.rows, by_one.rows
        assert torch.equal(by_bound.noised_BS, by_one.noised_BS)
        assert torch.equal(nelbo.elbo_weight, simple.elbo_weight)
        assert torch.equal(nelbo.kl_weight, nelbo.elbo_weight)
        assert torch.equal(simple.kl_weight, (by_one.noised_BS == WORD_MASK).float())


def test_levels_of_any_schedule_are_gidds_masked_bound():
    """Time and log-SNR are two names of one thing: same ordinals, same noise, and the same loss in every row."""
    samples, logits = batch(), torch.randn(16, 24, WORDS, generator=torch.Generator().manual_seed(0))
    for schedule in (NoiseSchedule(), LogLinearSchedule()):
        process = DiffusionProcess(schedule, MaskedMixing(WORDS, WORD_MASK))
        by_log_snr = GiddObjective(process, loss_weighting="nelbo").noised_batch(samples, SEED)
        by_time = objective_of(masking_of("levels", schedule=schedule)).noised_batch(samples, SEED)
        assert torch.equal(by_log_snr.noised_BS, by_time.noised_BS)
        assert torch.equal(by_log_snr.log_snr_BS, by_time.log_snr_BS)
        for of_log_snr, of_time in zip(
            row_losses(logits, by_log_snr.rows, WORD_MASK), row_losses(logits, by_time.rows, WORD_MASK), strict=True
        ):
            torch.testing.assert_close(of_time, of_log_snr, rtol=1e-6, atol=0)


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="loss_weighting must be 'nelbo' or 'simple', got 'gidd'"):
        masking_of("levels", loss_weighting="gidd")
