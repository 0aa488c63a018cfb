"""Eso-LM: both terms against their definitions, one token of one order at a time, and what never sees what."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from chance import assert_mean
from diffusion.rows_reference import make_samples, row_losses
from diffusion.tiny_denoiser import TinyDenoiser, causal, visible

from megadiff.diffusion import EsoLmObjective, Objective
from megadiff.objectives import EsoLmConfig, Vocabulary
from megadiff.objectives.noising import fused_noise_rows

V, MASK, SEED = 4, 3, 7
WORDS = [v for v in range(V) if v != MASK]
TEXT = [2, 0, 1]
DENOISER = TinyDenoiser(V)
MIXED = dict(alpha_0=0.5, sequential_share=0.3)
PLANS = [dict(alpha_0=1.0, sequential_share=0.0), MIXED, dict(alpha_0=0.0, sequential_share=1.0)]
EPSILON = 1e-3


def objective_of(**settings) -> Objective:
    return EsoLmObjective(**{"vocab_size": V, "mask_id": MASK, **settings})


def copies(text, count, **fields):
    return make_samples(torch.tensor([text] * count), **fields)


def random_samples(batch_size, length, **fields):
    generator = torch.Generator().manual_seed(1)
    return make_samples(torch.tensor(WORDS)[torch.randint(3, (batch_size, length), generator=generator)], **fields)


def is_sequential(objective, samples):
    """Which sequences train the sequential term: those whose second half has no masks."""
    batch = objective.noised_batch(samples, SEED)
    return ~(batch.noised_BS[:, samples.length :] == MASK).any(1)


def cross_entropy(order, known):
    """Of the tokens of TEXT at the places order[known:], all masked, after those at order[:known]: their sum."""
    ids = torch.tensor([[TEXT[place] if i < known else MASK for i, place in enumerate(order)]])
    logits = DENOISER(ids, torch.tensor([order]), causal(len(order)))[0, :, WORDS].log_softmax(-1)
    return -sum(logits[i, WORDS.index(TEXT[order[i]])].item() for i in range(known, len(order)))


def one_by_one(order, known):
    """The same where each token is known once it is predicted."""
    return sum(cross_entropy(order[: i + 1], i) for i in range(known, len(order)))


def mean_over_orders(value, clean, orders_of_masked):
    orders = itertools.product(itertools.permutations(clean), orders_of_masked)
    return float(np.mean([value([*first, *then], len(clean)) for first, then in orders]))


def exact_terms(alpha_0, weight):
    """The sequential and the diffusion term of TEXT by enumeration of masks and orders, Gauss-Legendre in time.

    Args:
        weight: of the diffusion term, a function of α.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    alphas = alpha_0 * (1 - (1 - EPSILON) * (EPSILON + (1 - EPSILON) * (nodes + 1) / 2))
    sequential = diffusion = 0.0
    for is_masked in itertools.product([False, True], repeat=len(TEXT)):
        masked = [place for place in range(len(TEXT)) if is_masked[place]]
        clean = [place for place in range(len(TEXT)) if not is_masked[place]]

        def probability(alpha, masked=masked, clean=clean):
            return (1 - alpha) ** len(masked) * alpha ** len(clean)

        sequential += probability(alpha_0) * mean_over_orders(one_by_one, clean, [masked])
        in_time = np.array([weight(alpha) * probability(alpha) for alpha in alphas])
        at_once = mean_over_orders(cross_entropy, clean, list(itertools.permutations(masked)))
        diffusion += float((node_weights / 2 * in_time).sum()) * at_once
    return sequential, diffusion


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("loss_weighting", ["nelbo", "simple"])
def test_estimates_are_unbiased(plan, loss_weighting):
    """20 000 sequences against everything there is; the loss and the bound, each by its own weights."""
    objective = objective_of(**plan, loss_weighting=loss_weighting)
    alpha_0 = plan["alpha_0"]

    def of_the_bound(alpha):
        return alpha_0 * (1 - EPSILON) / (1 - alpha)

    for validation in (False, True):
        batch = objective.noised_batch(copies(TEXT, 20_000), SEED, validation=validation)
        for values, weight in zip(
            row_losses(DENOISER.on(batch), batch.rows, MASK),
            (of_the_bound if loss_weighting == "nelbo" else lambda alpha: float(alpha_0 > 0), of_the_bound),
            strict=True,
        ):
            exact = sum(exact_terms(alpha_0, weight))
            assert_mean(values.sum(-1), exact, at_most=0.03 * exact)


def test_both_terms_are_those_of_the_definition_one_by_one():
    """The same for each term alone, so that no error of one hides in the other."""
    objective, samples = objective_of(**MIXED), copies(TEXT, 20_000)
    sequential = is_sequential(objective, samples)
    batch = objective.noised_batch(samples, SEED)
    sums = row_losses(DENOISER.on(batch), batch.rows, MASK)[1].sum(-1)
    # A diffusion sequence without a mask looks sequential and adds nothing to either sum.
    for term, exact in zip(
        (sequential, ~sequential), exact_terms(0.5, lambda a: 0.5 * (1 - EPSILON) / (1 - a)), strict=True
    ):
        assert_mean(torch.where(term, sums, 0.0), exact, at_most=0.03 * exact)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_constant_cross_entropy_is_the_bound(plan):
    objective = objective_of(**plan)
    rows = objective.noised_batch(random_samples(512, 64), SEED).rows
    per_sequence = row_losses(torch.zeros(*rows.target.shape, V), rows, MASK)[1].sum(-1) / 64
    expected = (1 - EPSILON * plan["alpha_0"]) * math.log(V - 1)
    assert_mean(per_sequence, expected, at_most=0.06)


@pytest.mark.parametrize("vocab_size, of_bound, of_simple", [(32_001, 10.36312, 5.18674), (131_072, 11.77171, 5.89174)])
def test_initial_losses_are_the_published_ones(vocab_size, of_bound, of_simple):
    objective = objective_of(alpha_0=1.0, sequential_share=0.0, vocab_size=vocab_size, loss_weighting="simple")
    rows = objective.noised_batch(random_samples(2048, 64), SEED).rows
    # Zero logits: every row's cross-entropy is the logarithm of the real ids.
    for weight, expected in ((rows.elbo_weight, of_bound), (rows.kl_weight, of_simple)):
        assert_mean(weight.mean(-1) * math.log(vocab_size - 1), expected, at_most=0.03 * expected)


def test_without_diffusion_it_is_autoregressive_in_place():
    """Every token is predicted at its own place, from those before it, and all texts have probability 1 together."""
    texts = torch.tensor(list(itertools.product(WORDS, repeat=3)))
    objective = objective_of(alpha_0=0.0, sequential_share=1.0)
    batch = objective.noised_batch(make_samples(texts), SEED)
    assert (batch.noised_BS[:, :3] == MASK).all() and torch.equal(batch.noised_BS[:, 3:], texts)
    assert torch.equal(batch.position_BS, torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(27, 6))
    loss, nelbo = row_losses(DENOISER.on(batch), batch.rows, MASK)
    assert torch.equal(loss, nelbo)
    assert nelbo.sum(-1).neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    by_hand = one_by_one([0, 1, 2], 0)
    [same] = [i for i, text in enumerate(texts.tolist()) if text == TEXT]
    assert nelbo[same].sum().item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_probabilities_of_every_row_sum_to_one(plan):
    """Also of logits that are not normalised: a gathered raw logit is no likelihood."""
    samples = random_samples(64, 8)
    batch = objective_of(**plan).noised_batch(samples, SEED)
    logits = DENOISER.on(batch) + 3.0
    total = torch.zeros(batch.noised_BS.shape, dtype=torch.float64)
    for word in WORDS:
        rows = dataclasses.replace(batch.rows, target=torch.full_like(batch.rows.target, word))
        loss, _ = row_losses(logits, rows, MASK)
        total += torch.exp(-loss / rows.kl_weight.double())
    active = batch.rows.kl_weight > 0
    torch.testing.assert_close(total[active], torch.ones_like(total[active]), rtol=1e-6, atol=0)


def test_one_layout_serves_both_terms():
    """With z in both halves, the doubled sequence is causal attention over z, twice."""
    objective, samples = objective_of(**MIXED), random_samples(64, 10)
    diffusion = ~is_sequential(objective, samples)
    batch = objective.noised_batch(samples, SEED)
    half = batch.noised_BS[diffusion, :10]
    assert 20 < len(half) < 60 and torch.equal(half, batch.noised_BS[diffusion, 10:])
    doubled = DENOISER.on(batch)[diffusion]
    plain = DENOISER(half, batch.position_BS[diffusion, :10], causal(10))
    torch.testing.assert_close(doubled, plain.repeat(1, 2, 1), rtol=1e-12, atol=1e-12)
    # A clean token of the sequential term does not see a mask either.
    clean = batch.noised_BS[~diffusion, 10:]
    plain = DENOISER(clean, batch.position_BS[~diffusion, 10:], causal(10))
    torch.testing.assert_close(DENOISER.on(batch)[~diffusion, 10:], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_is_later_in_the_order_has_no_influence(plan):
    samples = random_samples(16, 8)
    batch = objective_of(**plan).noised_batch(samples, SEED)
    length = batch.noised_BS.shape[1]
    changed = batch.noised_BS.clone()
    changed[:, [5, length - 3]] = (changed[:, [5, length - 3]] + 1) % V
    before, after = (DENOISER.on(dataclasses.replace(batch, noised_BS=ids)) for ids in (batch.noised_BS, changed))
    earlier = torch.arange(length) % 8 < 5
    assert torch.equal(before[:, earlier], after[:, earlier])
    assert not torch.allclose(before[:, 5], after[:, 5])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_places_travel_with_their_tokens(plan):
    """Undoing the permutation, of ids, phases and mask alike, permutes the predictions and changes none."""
    batch = objective_of(**plan).noised_batch(random_samples(1, 8), SEED)
    length = batch.noised_BS.shape[1]
    back = torch.cat([half + batch.position_BS[0, :8].argsort() for half in range(0, length, 8)])
    mask = visible(batch.layout, length)[:, back][:, :, back]
    in_text_order = DENOISER(batch.noised_BS[:, back], batch.position_BS[:, back], mask)
    torch.testing.assert_close(in_text_order, DENOISER.on(batch)[:, back], rtol=1e-12, atol=1e-12)
    assert torch.equal(batch.position_BS[0, back[:8]], torch.arange(8))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("validation", [False, True])
def test_orders_are_clean_then_masked_and_random(plan, validation):
    objective, samples = objective_of(**plan), random_samples(400, 6)
    batch = objective.noised_batch(samples, SEED, validation=validation)
    rows, masked = batch.rows, batch.noised_BS[:, :6] == MASK
    assert (masked.long().diff(dim=1) >= 0).all()
    order = batch.position_BS[:, :6]
    assert torch.equal(rows.target[:, :6], samples.tokens_BL.gather(1, order))
    assert torch.equal(rows.elbo_weight[:, :6] > 0, masked) and (rows.elbo_weight[:, 6:] == 0).all()
    assert rows.counted.sum() == 400 * 6 and torch.isfinite(rows.elbo_weight).all()
    assert (rows.noised == MASK).all() and (rows.alpha == 1).all() and not rows.any_uniform_mass
    rises = (order[:, 1:] > order[:, :-1]) & masked[:, :-1]
    if plan["alpha_0"] == 1.0:
        share = rises.sum() / masked[:, :-1].sum()
        assert 0.4 < share < 0.6
    if plan["alpha_0"] == 0.0:
        assert torch.equal(rises, masked[:, :-1])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_everything_is_a_function_of_the_ordinal(plan):
    objective, samples = objective_of(**plan), random_samples(32, 8)
    whole = objective.noised_batch(samples, SEED)
    some = torch.tensor([11, 2, 3])
    chosen = make_samples(samples.tokens_BL[some], ordinal_B=samples.ordinal_B[some])
    part = objective.noised_batch(chosen, SEED)
    assert torch.equal(part.noised_BS, whole.noised_BS[some]) and torch.equal(part.position_BS, whole.position_BS[some])
    assert torch.equal(part.rows.kl_weight, whole.rows.kl_weight[some])
    validation = objective.noised_batch(samples, SEED, validation=True)
    if plan["alpha_0"] > 0:
        assert not torch.equal(validation.position_BS, whole.position_BS)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_given_tokens_are_clean_first_and_not_counted(plan):
    given = (torch.arange(8) % 3 == 0).expand(32, 8)
    samples = random_samples(32, 8, given_BL=given, counted_BL=~given)
    batch = objective_of(**plan).noised_batch(samples, SEED)
    order, rows = batch.position_BS[:, :8], batch.rows
    assert (order[:, :3] % 3 == 0).all() and (order[:, 3:] % 3 != 0).all()
    assert torch.equal(batch.noised_BS[:, :3], samples.tokens_BL.gather(1, order)[:, :3])
    assert not rows.counted[:, :3].any() and not rows.counted[:, 8:].any() and rows.counted[:, 3:8].all()
    assert (rows.kl_weight[:, :3] == 0).all() and (rows.kl_weight[:, 3:8] > 0).any()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_documents_do_not_influence_each_other(plan):
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]).expand(64, 8)
    samples = random_samples(64, 8, document_BL=documents)
    other = dataclasses.replace(
        samples, tokens_BL=torch.where(documents == 1, 2 - samples.tokens_BL, samples.tokens_BL)
    )
    objective = objective_of(**plan)
    batches = [objective.noised_batch(s, SEED) for s in (samples, other)]
    losses = [row_losses(DENOISER.on(b), b.rows, MASK)[0] for b in batches]
    assert torch.equal(*(b.position_BS for b in batches))
    of_document = batches[0].layout.document_BS
    assert torch.equal(losses[0][of_document != 1], losses[1][of_document != 1])
    assert not torch.allclose(losses[0][of_document == 1], losses[1][of_document == 1])
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0]).expand(64, 8)
    for document in range(3):
        one = of_document[:, :8] == document
        assert torch.equal(
            batches[0].position_BS[:, :8][one].view(64, -1).sort(1)[0], places[:, documents[0] == document]
        )


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("validation", [False, True])
def test_active_rows_are_counted_without_tokens(plan, validation):
    objective, samples = objective_of(**plan), random_samples(32, 50)
    length = objective.sequence_length(50)
    batch = objective.noised_batch(samples, SEED, validation=validation)
    assert batch.noised_BS.shape == (32, length)
    order = torch.cat([torch.arange(length // 2, length), torch.arange(length // 2)])
    for index in (None, order[: length // 4], order[length // 4 :]):
        rows = batch.rows if index is None else batch.rows.select(index)
        count = objective.count_active_rows(samples.ordinal_B, 50, SEED, validation=validation, index_S=index)
        assert count == int((rows.elbo_weight > 0).sum())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cut_tails_are_neither_seen_nor_counted(plan):
    objective = objective_of(**plan, random_length_fraction=1.0)
    samples = random_samples(32, 12)
    batch = objective.noised_batch(samples, SEED)
    tail = batch.layout.document_BS == 12
    changed = dataclasses.replace(batch, noised_BS=torch.where(tail, (batch.noised_BS + 1) % V, batch.noised_BS))
    assert torch.equal(DENOISER.on(batch)[~tail], DENOISER.on(changed)[~tail])
    assert tail.any() and not batch.rows.counted[tail].any() and (batch.rows.kl_weight[tail] == 0).all()
    active = int((batch.rows.kl_weight > 0).sum())
    assert active <= objective.count_active_rows(samples.ordinal_B, 12, SEED)
    assert objective.noised_batch(samples, SEED, validation=True).layout.document_BS is None


def test_settings():
    vocabulary = Vocabulary(size=V, mask_id=MASK, bos_id=1, eos_id=2, pad_id=0)
    assert EsoLmConfig().build(vocabulary) == objective_of(**PLANS[0], noise=fused_noise_rows)
    assert EsoLmConfig(alpha_0=0.0, loss_weighting="simple").build(vocabulary).sequential_share == 1.0
    mixed = EsoLmConfig(alpha_0=0.25, sequential_share=0.5, random_length_fraction=0.1)
    expected = objective_of(alpha_0=0.25, sequential_share=0.5, random_length_fraction=0.1, noise=fused_noise_rows)
    assert mixed.build(vocabulary) == expected
    assert EsoLmConfig(alpha_0=0.25).build(vocabulary).sequential_share == 0.75
    for config in (EsoLmConfig(), mixed):
        assert config.model_length(9) == config.build(vocabulary).sequence_length(9) and not config.gives_log_snr
    assert EsoLmConfig().mask_features(documents=False, prompts=True) == {"causal"}
    assert EsoLmConfig().mask_features(documents=True, prompts=False) == {"causal", "permuted documents"}
    assert mixed.mask_features(documents=False, prompts=False) == {"block diffusion", "permuted documents"}


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(alpha_0=1.5), "objective.alpha_0 is 1.5, but must lie in"),
        (dict(alpha_0=math.nan), "objective.alpha_0 is nan, but must lie in"),
        (dict(epsilon=0.0), "objective.epsilon is 0.0, but must lie in"),
        (dict(alpha_0=0.5, sequential_share=1.0), "objective.sequential_share is 1.0, but must lie in"),
        (dict(loss_weighting="low_var"), "objective.loss_weighting is 'low_var', but must be one of nelbo, simple"),
        (dict(sequential_share=0.5), "objective.sequential_share is 0.5, but must be none where one term is alone"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EsoLmConfig(**settings)


@pytest.mark.parametrize("alpha_0, share", [(0.5, 0.0), (0.5, 1.0), (1.0, 0.5), (0.0, 0.0), (1.5, 0.0)])
def test_terms_that_would_be_left_out_are_refused(alpha_0, share):
    with pytest.raises(ValueError, match=rf"alpha_0 must lie in .*, got {alpha_0} and {share}"):
        EsoLmObjective(vocab_size=9, mask_id=3, alpha_0=alpha_0, sequential_share=share)
