"""What the bound must equal: weighted cross-entropy, the uniform-state bound, the entropy of one token."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusion.toy import gauss_legendre, levels

from megadiff.diffusion import (
    CosineSchedule,
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    TabulatedSchedule,
    UniformMixing,
    nelbo_terms,
)

V, MASK = 5, 3
SHIFTS = (-1000.0, -2.0, 0.0, 2.0, 1000.0)
CLEAN = torch.tensor([0, 1, 2, 4])
P = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.1], dtype=torch.float64)
UNIFORM_P = torch.tensor([0.25, 0.25, 0.25, 0.0, 0.25], dtype=torch.float64)


def process_of(mixing, schedule=None):
    return DiffusionProcess(schedule or NoiseSchedule(), mixing)


def entropy(p):
    return -torch.xlogy(p, p).sum().item()


def random_case(num_rows=40):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(num_rows, V, dtype=torch.float64, generator=generator).requires_grad_()
    tokens = CLEAN[torch.randint(4, (num_rows,), generator=generator)]
    log_snr = torch.empty(num_rows, dtype=torch.float64).uniform_(-9, 9, generator=generator)
    return logits, tokens, log_snr


@pytest.mark.parametrize("mixing", [MaskedMixing(V, MASK), HybridMixing(V, MASK, -1000.0)], ids=str)
def test_masked_limit_is_weighted_cross_entropy(mixing):
    logits, tokens, log_snr = random_case()
    masked = torch.arange(tokens.numel()) % 3 > 0
    noised = torch.where(masked, MASK, tokens)
    nelbo = nelbo_terms(logits, tokens, noised, log_snr, process_of(mixing)).nelbo
    (gradient,) = torch.autograd.grad(nelbo.sum(), logits)

    removed = logits.masked_fill(torch.arange(V) == MASK, -math.inf)
    time_weight = 1.0 / torch.sigmoid(-log_snr)  # 1/t on the linear schedule α = 1 − t
    expected = masked * time_weight * F.cross_entropy(removed, tokens, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(nelbo, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def uniform_state_nelbo(alpha, xhat, tokens, noised):
    """Continuous-time NELBO of uniform-state diffusion at α' = −1 (Schiff et al., arXiv 2412.10193).

    `xhat` is [..., K]; ids index the K states.
    """
    num_states, alpha, z = xhat.shape[-1], alpha[..., None], noised[..., None]
    xbar = num_states * alpha * F.one_hot(tokens, num_states) + 1 - alpha
    xbar_hat = num_states * alpha * xhat + 1 - alpha
    xbar_z, xbar_hat_z = xbar.gather(-1, z), xbar_hat.gather(-1, z)
    logarithms = (xbar_hat_z * xbar).log() - (xbar_hat * xbar_z).log()
    ratio_sum = (xbar / xbar_z * logarithms).sum(-1, keepdim=True)
    bound = (num_states / xbar_hat_z - num_states / xbar_z + ratio_sum) / (num_states * alpha)
    return bound.squeeze(-1)


@pytest.mark.parametrize(
    "mixing",
    [UniformMixing(V, MASK), HybridMixing(V, MASK, 1000.0), UniformMixing(V, MASK, include_mask=True)],
    ids=str,
)
def test_uniform_limit_is_the_uniform_state_bound(mixing):
    logits, tokens, log_snr = random_case()
    states = torch.arange(V) if mixing.mask_is_uniform_state else CLEAN
    state_of_id = torch.full((V,), -1).scatter(0, states, torch.arange(states.numel()))
    noised = states[torch.randint(states.numel(), tokens.shape, generator=torch.Generator().manual_seed(5))]
    nelbo = nelbo_terms(logits, tokens, noised, log_snr, process_of(mixing)).nelbo

    xhat = logits.masked_fill(torch.arange(V) == MASK, -math.inf).softmax(-1)[:, states]
    expected = uniform_state_nelbo(torch.sigmoid(log_snr), xhat, state_of_id[tokens], state_of_id[noised])
    torch.testing.assert_close(nelbo, expected, rtol=1e-8, atol=1e-10)


# α, x, z, value for K = 4 and x_θ = (.5, .2, .2, .1)
UNIFORM_STATE_VECTORS = [
    (0.6, 0, 0, 0.2246568028),
    (0.6, 0, 1, 1.7918417978),
    (0.6, 0, 3, 1.1751785242),
    (0.6, 3, 0, 5.7212834033),
    (0.2, 0, 0, 0.2147919724),
    (0.2, 0, 1, 0.2421066277),
    (0.95, 0, 0, 0.2330355500),
    (0.95, 0, 1, 50.6305676387),
    (0.95, 3, 0, 98.6026203797),
]


@pytest.mark.parametrize("alpha, token, noised, expected", UNIFORM_STATE_VECTORS)
def test_published_values_of_the_uniform_state_bound(alpha, token, noised, expected):
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1, 1.0], dtype=torch.float64).log()
    log_snr = torch.logit(torch.tensor(alpha, dtype=torch.float64))
    process = process_of(UniformMixing(5, 4))
    nelbo = nelbo_terms(logits, torch.tensor(token), torch.tensor(noised), log_snr, process).nelbo
    assert nelbo.item() == pytest.approx(expected, rel=1e-9)


def expected_integrand(process, log_snr_N, xhat_of, p):
    """Return E over x ~ p and z ~ q_λ(·|x) of w·(KL + IS) on one token, [N]."""
    log_snr, tokens, noised = (
        t.contiguous() for t in torch.broadcast_tensors(log_snr_N[:, None, None], CLEAN[:, None], torch.arange(V))
    )
    logits = xhat_of(log_snr, noised).log()
    terms = nelbo_terms(logits, tokens, noised, log_snr, process)
    weighted = terms.loss_weight * (terms.kl_div + terms.is_div)
    probability = p[tokens] * process.marginal_at(log_snr, tokens, noised)
    # States of probability 0 may carry an infinite divergence.
    return torch.where(probability > 0, probability * weighted, 0.0).sum((1, 2))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("p", [P, UNIFORM_P], ids=["skewed", "uniform"])
def test_one_token_bound_is_the_entropy_for_the_posterior_of_the_others(shift, p):
    process = process_of(HybridMixing(V, MASK, shift))
    log_snr = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    exclusive = expected_integrand(process, log_snr, lambda _, z: p.expand(*z.shape, V), p)
    assert torch.trapezoid(exclusive, log_snr).item() == pytest.approx(entropy(p), abs=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_one_token_bound_is_loose_for_the_inclusive_posterior(shift):
    process = process_of(HybridMixing(V, MASK, shift))
    log_snr = torch.linspace(-30, 30, 4001, dtype=torch.float64)

    def inclusive_posterior(log_snr, noised):
        posterior = process.clean_posterior(log_snr, noised, P.expand(*noised.shape, V))
        return posterior.clamp(min=1e-300)  # finite logarithms for states that cannot occur

    inclusive = torch.trapezoid(expected_integrand(process, log_snr, inclusive_posterior, P), log_snr).item()
    if shift == -1000.0:
        assert inclusive == pytest.approx(entropy(P), abs=1e-6)
    else:
        assert inclusive > entropy(P) + 0.1


@pytest.mark.parametrize("vocab_size", [32001, 131072])
def test_zero_logits_give_the_logarithm_of_the_vocabulary(vocab_size):
    schedule = NoiseSchedule()
    process = process_of(MaskedMixing(vocab_size, 3), schedule)
    token, mask = torch.tensor(7), torch.tensor(3)
    expected_nelbo = []
    for log_snr in schedule.log_snr(torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)):
        logits = torch.zeros(2, vocab_size, dtype=torch.float64)
        noised = torch.stack((token, mask))
        terms = nelbo_terms(logits, token.expand(2), noised, log_snr, process)
        expected_nelbo.append((process.marginal_at(log_snr, token, noised) * terms.nelbo).sum().item())
    # The same at every level, hence the average over the schedule's own draws whatever they are …
    assert expected_nelbo == pytest.approx([math.log(vocab_size - 1)] * 4, rel=1e-9)
    assert math.log(vocab_size - 1) == pytest.approx({32001: 10.3735, 131072: 11.7835}[vocab_size], abs=1e-4)
    # … while the integral over the range has the un-normalised mass as its factor.
    assert schedule.mass == pytest.approx(0.999753, abs=1e-6)


@pytest.mark.parametrize("schedule", [CosineSchedule(), TabulatedSchedule(alphas=(1.0, 0.9, 0.3, 0.0))], ids=str)
def test_zero_logits_give_the_same_on_average_with_any_schedule(schedule):
    """At a level the masked bound is α·(1 − α)/p·log(V − 1), which only the linear schedule makes a constant."""
    kinks = schedule.time(torch.tensor([0.9, 0.3], dtype=torch.float64).logit())
    log_snr, weight = levels(schedule, kinks)
    share = torch.sigmoid(log_snr) * torch.sigmoid(-log_snr) / schedule.log_snr_pdf(log_snr)
    assert (weight * share).sum().item() == pytest.approx(1.0, rel=1e-4)
    process = process_of(MaskedMixing(V, MASK), schedule)
    zeros, token, mask = torch.zeros(len(log_snr), V, dtype=torch.float64), torch.tensor(0), torch.tensor(MASK)
    nelbo = nelbo_terms(zeros, token.expand(len(log_snr)), mask.expand(len(log_snr)), log_snr, process).nelbo
    torch.testing.assert_close(torch.sigmoid(-log_snr) * nelbo, share * math.log(V - 1))


@pytest.mark.parametrize("mixing_of", [UniformMixing, partial(HybridMixing, shift=0.0)], ids=["uniform", "balanced"])
def test_zero_logits_cost_the_logarithm_of_a_large_vocabulary_under_uniform_noise_too(mixing_of):
    """Over the whole line: prediction and data are both uniform. All noise tokens but the clean one are alike."""
    vocab_size = 32001
    process = process_of(mixing_of(vocab_size, 3))
    tokens, noised = torch.full((3,), 7), torch.tensor([7, 3, 8])
    alike = torch.tensor([1, 1, vocab_size - 2])
    zeros = torch.zeros(3, vocab_size, dtype=torch.float64)
    total = 0.0
    for level, weight in zip(*gauss_legendre(torch.linspace(-28, 28, 15, dtype=torch.float64), 8), strict=True):
        terms = nelbo_terms(zeros, tokens, noised, level, process)
        probability = alike * process.marginal_at(level, tokens, noised)
        total += (weight * (probability * terms.loss_weight * (terms.kl_div + terms.is_div)).sum()).item()
    assert total == pytest.approx(math.log(vocab_size - 1), rel=1e-5)
