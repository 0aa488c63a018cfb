"""The Duo objective: its published loss is the row loss, its training estimate is unbiased, its curriculum ends."""

import math

import pytest
import torch
from chance import assert_frequencies, assert_mean
from rows_reference import make_samples, row_losses
from torch import Tensor

from megadiff.diffusion import (
    DiffusionProcess,
    DuoObjective,
    GaussianCurriculum,
    LogLinearSchedule,
    NoiseSchedule,
    Objective,
    UniformMixing,
    nelbo_terms,
    sequence_log_snr,
)
from megadiff.diffusion.gaussian import keep_probability
from megadiff.objectives import DuoConfig, Vocabulary
from megadiff.philox import VALIDATION_OFFSET

V, MASK, SEED = 4, 2, 5
VOCABULARY = Vocabulary(size=V, mask_id=MASK, bos_id=0, eos_id=1, pad_id=1)


def process_of(vocab_size=V, mask_id=MASK, schedule=None):
    return DiffusionProcess(schedule or LogLinearSchedule(), UniformMixing(vocab_size, mask_id, include_mask=True))


def samples_of(batch_size=64, length=24, first_ordinal=0, **fields):
    ordinary = torch.tensor([0, 1, 3])
    return make_samples(
        ordinary[torch.arange(batch_size * length).view(batch_size, length) % 3], first_ordinal, **fields
    )


def curriculum_of(**settings):
    return GaussianCurriculum(**{"vocab_size": V, "gamma": (-3.0, 2.5), "end_sample": 10**6, "top_k": 2, **settings})


def rao_blackwellised(xhat: Tensor, x: Tensor, z: Tensor, alpha: Tensor, slope: float) -> Tensor:
    """Duo's published loss over K states (arXiv 2506.10892 v3, equation 17); xhat [..., K], the others [...]."""
    size = xhat.shape[-1]
    at = lambda values, ids: values.gather(-1, ids[..., None]).squeeze(-1)  # noqa: E731
    bar = size * alpha[..., None] * xhat + (1 - alpha)[..., None]
    bar_at_z = size * alpha * (x == z) + 1 - alpha
    kept, moved = (x == z).double(), (x != z).double()
    kappa = (1 - alpha) / (size * alpha + 1 - alpha)
    first = size / bar_at_z - size / at(bar, z)
    second = (
        -(kappa * kept + moved) * (bar.log().sum(-1) - size * at(bar, z).log())
        - size * alpha / (1 - alpha) * (at(bar, x) / at(bar, z)).log() * moved
        + ((size - 1) * kappa * kept - moved / kappa) * kappa.log()
    )
    return slope / (size * alpha) * (first - second)


def udlm(xhat: Tensor, x: Tensor, z: Tensor, alpha: Tensor, slope: float) -> Tensor:
    """The same bound as UDLM writes it (arXiv 2412.10193, equation 18): a sum over the states other than z."""
    size = xhat.shape[-1]
    bar_x = size * alpha[..., None] * torch.nn.functional.one_hot(x, size) + (1 - alpha)[..., None]
    bar = size * alpha[..., None] * xhat + (1 - alpha)[..., None]
    at_z = lambda values: values.gather(-1, z[..., None])  # noqa: E731
    ratio, model_ratio = bar_x / at_z(bar_x), bar / at_z(bar)
    inner = size / at_z(bar_x) - size / at_z(bar) - (ratio * (ratio / model_ratio).log()).sum(-1, keepdim=True)
    return (slope / (size * alpha[..., None]) * inner).squeeze(-1)


@pytest.mark.parametrize("mask_id", [0, 3, 8])
def test_published_loss_is_the_row_loss_in_value_and_gradient(mask_id):
    size, process = 9, process_of(9, mask_id)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, size, generator=generator, dtype=torch.float64).requires_grad_()
    x = (mask_id + torch.randint(1, size, (500,), generator=generator)) % size
    z = torch.where(torch.arange(500) < 200, x, torch.randint(size, (500,), generator=generator))
    log_snr = torch.empty(500, dtype=torch.float64).uniform_(-6.9, 6.9, generator=generator)
    xhat = logits.masked_fill(torch.arange(size) == mask_id, -math.inf).softmax(-1)
    slope = LogLinearSchedule().epsilon - 1  # dα/dt
    ours = nelbo_terms(logits, x, z, log_snr, process).nelbo
    [our_gradient] = torch.autograd.grad(ours.sum(), logits)
    assert (ours >= 0).all() and (z == mask_id).any()
    for published in (rao_blackwellised, udlm):
        theirs = published(xhat, x, z, log_snr.sigmoid(), slope)
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
        [gradient] = torch.autograd.grad(theirs.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, our_gradient, rtol=1e-7, atol=1e-8)


def test_loss_of_a_perfect_prediction_is_zero():
    x = torch.tensor([0, 1, 3]).repeat_interleave(V)
    z = torch.arange(V).repeat(3)
    logits = 800.0 * torch.nn.functional.one_hot(x, V).double()
    assert nelbo_terms(logits, x, z, torch.zeros(12, dtype=torch.float64), process_of()).nelbo.abs().max() < 1e-12


VECTORS = [  # α, x, z, loss at dα/dt = −1, w, KL, IS
    (0.6, 0, 0, 0.2246568028, 0.595238, 0.18703922, 0.19038421),
    (0.6, 0, 1, 1.7918417978, 4.166667, 0.18703922, 0.24300281),
    (0.6, 0, 3, 1.1751785242, 4.166667, 0.18703922, 0.09500363),
    (0.6, 3, 0, 5.7212834033, 4.166667, 0.73681366, 0.63629436),
    (0.2, 0, 0, 0.2147919724, 3.125, 0.02308217, 0.04565126),
    (0.2, 0, 1, 0.2421066277, 6.25, 0.02308217, 0.01565489),
    (0.95, 0, 0, 0.2330355500, 0.273411, 0.55821233, 0.29411520),
    (0.95, 0, 1, 50.6305676387, 21.052632, 0.55821233, 1.84673964),
    (0.95, 3, 0, 98.6026203797, 21.052632, 1.99442180, 2.68920267),
]


def test_losses_of_the_known_values():
    """Four states without a mask: uniform noise over the ids other than a fifth one."""
    alpha, x, z, loss, weight, kl_div, is_div = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*VECTORS, strict=True)
    )
    x, z = x.long(), z.long()
    xhat = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).expand(9, 4)
    torch.testing.assert_close(rao_blackwellised(xhat, x, z, alpha, -1.0), loss, rtol=0, atol=1e-9)
    process = DiffusionProcess(NoiseSchedule(), UniformMixing(5, 4))
    logits = torch.nn.functional.pad(xhat.log(), (0, 1))
    terms = nelbo_terms(logits, x, z, torch.logit(alpha), process)
    torch.testing.assert_close(terms.elbo_weight, weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.kl_div, kl_div, rtol=0, atol=6e-9)
    torch.testing.assert_close(terms.is_div, is_div, rtol=0, atol=6e-9)
    torch.testing.assert_close(terms.nelbo, loss, rtol=0, atol=1e-9)
    uniform = nelbo_terms(
        torch.zeros(4, 5).double(), torch.zeros(4).long(), torch.arange(4), torch.logit(alpha[:1]), process
    ).nelbo
    expected = torch.tensor([0.7239446162] + [3.1755712681] * 3, dtype=torch.float64)
    torch.testing.assert_close(uniform, expected, rtol=0, atol=1e-9)


def expected_nelbo(logits_of, x: int, process: DiffusionProcess, nodes: int = 4000) -> float:
    """Bound of a single token over λ in the schedule's range: exact over z, Simpson's rule over λ.

    `logits_of(log_snr, z)` gives the model's logits.
    """
    low, high = process.schedule.min_log_snr, process.schedule.max_log_snr
    log_snr = torch.linspace(low, high, 2 * nodes + 1, dtype=torch.float64)
    simpson = torch.full_like(log_snr, 2.0)
    simpson[1::2], simpson[0], simpson[-1] = 4.0, 1.0, 1.0
    simpson *= (high - low) / (6 * nodes)
    total = torch.zeros_like(log_snr)
    for z in range(process.mixing.vocab_size):
        noised, tokens = torch.full(log_snr.shape, z), torch.full(log_snr.shape, x)
        nelbo = nelbo_terms(logits_of(log_snr, z), tokens, noised, log_snr, process).nelbo
        total += process.marginal_at(log_snr, tokens, noised) * nelbo
    return (simpson * process.schedule.log_snr_pdf(log_snr) * total).sum().item()


def test_bound_of_one_token_is_its_entropy_and_the_posterior_mean_is_worse():
    process = process_of(7, 6, NoiseSchedule(-34.0, 34.0))
    p = torch.tensor([0.35, 0.25, 0.15, 0.13, 0.07, 0.05, 0.0], dtype=torch.float64)

    def constant(log_snr: Tensor, z: int) -> Tensor:
        return p.log().clamp(min=-800).expand(*log_snr.shape, 7)

    def posterior_mean(log_snr: Tensor, z: int) -> Tensor:
        noised = torch.full(log_snr.shape, z)
        return process.clean_posterior(log_snr, noised, p.expand(*log_snr.shape, 7)).log().clamp(min=-800)

    for x in (0, 4):
        assert expected_nelbo(constant, x, process) == pytest.approx(-math.log(p[x]), rel=1e-6)
    uniform = expected_nelbo(lambda log_snr, z: torch.zeros(*log_snr.shape, 7, dtype=torch.float64), 3, process)
    assert uniform == pytest.approx(math.log(6), rel=1e-6)
    entropy = -(p * p.clamp(min=1e-300).log()).sum().item()
    of_mean = sum(p[x].item() * expected_nelbo(posterior_mean, x, process) for x in range(6))
    assert of_mean > 1.3 * entropy


@pytest.mark.parametrize("num_tokens, expected", [(32_000, 10.36299), (131_071, 11.77167)])
def test_initial_loss(num_tokens, expected):
    """A zero head, exactly: z is x, the mask, or any of the others alike; Gauss and Legendre's rule over λ."""
    size = num_tokens + 1
    process = process_of(size, 3)
    schedule = process.schedule
    node, weight = (torch.tensor(values, dtype=torch.float64) for values in _gauss_legendre(24))
    middle, half = (schedule.max_log_snr + schedule.min_log_snr) / 2, (schedule.max_log_snr - schedule.min_log_snr) / 2
    total = 0.0
    for log_snr, of_node in zip(middle + half * node, half * weight, strict=True):
        x, z = torch.tensor([0, 0, 0]), torch.tensor([0, 3, 1])
        nelbo = nelbo_terms(torch.zeros(1, size, dtype=torch.float64).expand(3, -1), x, z, log_snr, process).nelbo
        expectation = (torch.tensor([1, 1, size - 2]) * process.marginal_at(log_snr, x, z) * nelbo).sum()
        total += (of_node * schedule.log_snr_pdf(log_snr) * expectation).item()
    assert total / (1 - schedule.epsilon) == pytest.approx(expected, abs=6e-6)


def _gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(count)
    return nodes.tolist(), weights.tolist()


def test_training_estimate_is_unbiased():
    """V = 4, L = 3, logits a fixed function of all noised tokens: every z enumerated, against 60 000 draws."""
    objective = DuoObjective(process_of())
    states = torch.cartesian_prod(*[torch.arange(V)] * 3)
    logits = 2 * torch.randn(V**3, 3, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.tensor([1, 3, 0])

    node, weight = (torch.tensor(values, dtype=torch.float64) for values in _gauss_legendre(64))
    schedule = objective.process.schedule
    span = -math.log(schedule.epsilon)
    time = torch.exp((node - 1) / 2 * span)
    log_snr = torch.logit(1 - (1 - schedule.epsilon) * time)[:, None, None]
    tokens = x.expand(64, V**3, 3)
    probability = objective.process.marginal_at(log_snr, tokens, states.expand(64, -1, -1)).prod(-1)
    nelbo = nelbo_terms(
        logits.expand(64, -1, -1, -1), tokens, states.expand(64, -1, -1), log_snr, objective.process
    ).nelbo.sum(-1)
    exact = (weight * span / 2 * time * (probability * nelbo).sum(-1)).sum() / (1 - schedule.epsilon)

    rows = objective.noised_batch(make_samples(x.expand(60_000, 3)), SEED).rows
    index = (rows.noised * torch.tensor([16, 4, 1])).sum(-1)
    loss, bound = (values.sum(-1) for values in row_losses(logits[index], rows, MASK))
    torch.testing.assert_close(loss, bound)
    assert_mean(loss, exact.item(), at_most=0.02 * exact.item())


def test_noised_batch_has_the_contracts_fields():
    objective: Objective = DuoObjective(process_of())
    samples = samples_of()
    batch, rows = (noised := objective.noised_batch(samples, SEED)), noised.rows
    assert objective.sequence_length(24) == 24
    assert objective.count_active_rows(samples.ordinal_B, 24, SEED) is None
    log_snr = sequence_log_snr(LogLinearSchedule(), SEED, samples.ordinal_B)
    assert torch.equal(batch.log_snr_BS, log_snr[:, None].expand(64, 24))
    assert batch.layout.is_plain and batch.layout.kind == "bidirectional"
    assert batch.soft_ids_BSK is None and batch.soft_weights_BSK is None
    assert (rows.noised == MASK).any() and rows.any_uniform_mass
    assert torch.equal(rows.kl_weight, rows.elbo_weight) and torch.equal(rows.is_weight, rows.elbo_weight)
    alpha = log_snr.sigmoid()[:, None]
    at_z = torch.where(rows.noised == rows.target, alpha, 0.0) + (1 - alpha) / V
    torch.testing.assert_close(rows.elbo_weight.double(), 0.999 / (V * alpha * at_z), rtol=1e-6, atol=0)
    validation = objective.noised_batch(samples, SEED, validation=True)
    assert torch.equal(
        validation.log_snr_BS[:, 0], sequence_log_snr(LogLinearSchedule(), SEED, samples.ordinal_B, VALIDATION_OFFSET)
    )


def test_clipped_weights_leave_the_bound_alone():
    plain, clipped = (
        DuoObjective(process_of(), max_loss_weight=limit).noised_batch(samples_of(), SEED).rows for limit in (None, 2.0)
    )
    assert torch.equal(clipped.elbo_weight, plain.elbo_weight) and plain.kl_weight.max() > 20
    for name in ("kl_weight", "is_weight"):
        assert torch.equal(getattr(clipped, name), plain.elbo_weight.clamp(max=2.0))


@pytest.mark.parametrize("curriculum", [None, curriculum_of()], ids=["discrete", "soft"])
def test_given_tokens_stay_and_tokens_that_do_not_count_weigh_nothing(curriculum):
    objective = DuoObjective(process_of(), curriculum=curriculum)
    place = torch.arange(24).expand(64, 24)
    given, counted = place < 5, (place >= 5) & (place < 20)
    whole = objective.noised_batch(samples_of(), SEED)
    batch = objective.noised_batch(samples_of(given_BL=given, counted_BL=counted), SEED)
    assert torch.equal(batch.noised_BS[given], batch.rows.target[given])
    assert torch.equal(batch.noised_BS[~given], whole.noised_BS[~given])
    assert (batch.log_snr_BS[given] == objective.process.schedule.max_log_snr).all()
    assert torch.equal(batch.log_snr_BS[~given], whole.log_snr_BS[~given])
    for name in ("kl_weight", "is_weight", "elbo_weight"):
        assert torch.equal(getattr(batch.rows, name), getattr(whole.rows, name) * counted)
    if curriculum is not None:
        assert (batch.soft_ids_BSK[..., 0][given] == batch.rows.target[given]).all()
        assert (batch.soft_weights_BSK[given] == torch.tensor([1.0, 0.0, 0.0])).all()
        assert torch.equal(batch.soft_weights_BSK[~given], whole.soft_weights_BSK[~given])


def test_random_lengths_shorten_training_samples_only():
    objective = DuoObjective(process_of(), random_length_fraction=0.5)
    batch = objective.noised_batch(samples_of(), SEED)
    lengths = batch.rows.counted.sum(-1)
    assert 20 < (lengths < 24).sum() < 44 and lengths.min() >= 1
    assert torch.equal(batch.rows.elbo_weight != 0, batch.rows.counted)
    assert batch.layout.document_BS is not None and (batch.position_BS[lengths < 24].max(-1).values < 23).all()
    assert objective.noised_batch(samples_of(), SEED, validation=True).rows.counted.all()


def test_curriculum_ends_at_its_sample_and_never_reaches_validation():
    objective, plain = (DuoObjective(process_of(), curriculum=c) for c in (curriculum_of(end_sample=1032), None))
    mixed, discrete = (o.noised_batch(samples_of(first_ordinal=1000), SEED) for o in (objective, plain))
    assert not torch.equal(mixed.noised_BS[:32], discrete.noised_BS[:32])
    assert mixed.soft_ids_BSK.shape == mixed.soft_weights_BSK.shape == (64, 24, 3)
    # What follows the end is the discrete batch, as mixtures of one token.
    for name in ("noised", "alpha", "uniform_mass", "kl_weight", "is_weight", "elbo_weight"):
        assert torch.equal(getattr(mixed.rows, name)[32:], getattr(discrete.rows, name)[32:])
    assert torch.equal(mixed.log_snr_BS[32:], discrete.log_snr_BS[32:])
    assert (mixed.soft_weights_BSK[32:] == torch.tensor([1.0, 0.0, 0.0])).all()
    assert torch.equal(mixed.soft_ids_BSK[32:, :, 0], discrete.noised_BS[32:])
    for first_ordinal, options in ((1032, {}), (0, {"validation": True})):
        samples = samples_of(first_ordinal=first_ordinal)
        ours, theirs = (o.noised_batch(samples, SEED, **options) for o in (objective, plain))
        assert ours.soft_ids_BSK is None and ours.soft_weights_BSK is None
        assert torch.equal(ours.noised_BS, theirs.noised_BS)
        assert torch.equal(ours.rows.kl_weight, theirs.rows.kl_weight)
    tail = objective.noised_batch(samples_of(8, first_ordinal=1028), SEED)
    assert torch.equal(tail.soft_weights_BSK[:4], mixed.soft_weights_BSK[28:32])


def test_cold_curriculum_is_the_bound_over_its_levels():
    """As τ → 0: inputs are tokens, noised as at α = T(γ), and the mean loss is the bound's integral over those α."""
    curriculum = curriculum_of(log10_temperature=(-6.0, -6.0))
    objective = DuoObjective(process_of(), curriculum=curriculum)
    x = torch.tensor([1, 3, 0])
    batch = objective.noised_batch(make_samples(x.expand(8000, 3), 0), SEED)
    rows = batch.rows
    largest, place = batch.soft_weights_BSK.max(-1, keepdim=True)
    assert torch.equal(batch.soft_ids_BSK.gather(-1, place).squeeze(-1), rows.noised) and largest.mean() > 0.9999
    clean, noisy = (alpha.item() for alpha in keep_probability(torch.tensor(curriculum.gamma).double(), V)[0])
    assert noisy <= rows.alpha.min() < noisy + 0.01 and clean - 0.01 < rows.alpha.max() <= clean
    torch.testing.assert_close(rows.alpha.double(), batch.log_snr_BS.sigmoid(), rtol=1e-6, atol=0)
    narrow = (rows.alpha[:, 0] - 0.5).abs() < 0.05
    expected = torch.full((V,), (1 - rows.alpha[narrow].mean().item()) / V, dtype=torch.float64)
    expected[0] += rows.alpha[narrow].mean().item()
    assert_frequencies((rows.noised[narrow] - x) % V, expected)

    # The bound does not depend on the path of α: that of the linear schedule between the same ends.
    ends = (torch.logit(torch.tensor(alpha, dtype=torch.float64)).item() for alpha in (noisy, clean))
    linear = process_of(schedule=NoiseSchedule(*ends))
    logits = torch.tensor([0.3, -1.0, 5.0, 0.7], dtype=torch.float64)
    exact = sum(expected_nelbo(lambda log_snr, z: logits.expand(*log_snr.shape, V), i, linear) for i in x.tolist())
    loss, bound = (values.sum(-1) for values in row_losses(logits.expand(8000, 3, V), rows, MASK))
    torch.testing.assert_close(loss, bound)
    assert_mean(loss, exact, at_most=0.03 * exact)


def test_settings_build_what_they_say():
    config = DuoConfig(
        max_loss_weight=50.0, random_length_fraction=0.01, curriculum_end_sample=1000, curriculum_top_k=2, epsilon=1e-2
    )
    objective = config.build(VOCABULARY)
    assert objective.process == DiffusionProcess(LogLinearSchedule(1e-2), UniformMixing(V, MASK, include_mask=True))
    assert objective.max_loss_weight == 50.0 and objective.random_length_fraction == 0.01
    assert objective.curriculum is not None and objective.curriculum.end_sample == 1000
    alpha, _ = keep_probability(torch.tensor(objective.curriculum.gamma, dtype=torch.float64), V)
    assert alpha.tolist() == pytest.approx([0.95, 0.06])
    chosen = DuoConfig(curriculum_end_sample=9, curriculum_top_k=1, curriculum_gamma=(-2.0, 2.0)).build(VOCABULARY)
    assert chosen.curriculum is not None and chosen.curriculum.gamma == (-2.0, 2.0)
    assert DuoConfig().build(VOCABULARY).curriculum is None and DuoConfig().gives_log_snr


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(epsilon=0.7), r"epsilon must lie in \(0, 0.5\), got 0.7"),
        (dict(max_loss_weight=0.0), "objective.max_loss_weight is 0.0, but must be positive, or none"),
        (dict(curriculum_end_sample=-1), "objective.curriculum_end_sample is -1, but must be at least 0"),
        (dict(curriculum_end_sample=5, curriculum_start_sample=5), "start_sample must be at least 0 and below"),
        (dict(curriculum_end_sample=5, curriculum_top_k=0), "top_k must be at least 1"),
        (dict(curriculum_end_sample=5, curriculum_log10_temperature=(0.0, 3.0)), "log10_temperature must lie in"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DuoConfig(**settings)


def test_what_the_vocabulary_forbids_is_refused_when_it_is_known():
    with pytest.raises(ValueError, match="top_k must be at least 1 and below the vocabulary's 4 ids, got 8"):
        DuoConfig(curriculum_end_sample=5).build(VOCABULARY)
    with pytest.raises(ValueError, match="gamma must rise"):
        DuoConfig(curriculum_end_sample=5, curriculum_top_k=2, curriculum_gamma=(1.0, 0.0)).build(VOCABULARY)


def test_bad_settings_of_the_objective_are_refused():
    with pytest.raises(ValueError, match=r"max_loss_weight must be positive or None, got -1.0"):
        DuoObjective(process_of(), max_loss_weight=-1.0)
    with pytest.raises(ValueError, match=r"random_length_fraction must lie in \[0, 1\], got 2.0"):
        DuoObjective(process_of(), random_length_fraction=2.0)
