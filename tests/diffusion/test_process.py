"""The process: weights against their definition, and the probability calculus between two noise levels."""

import pytest
import torch

from megadiff.diffusion import DiffusionProcess, HybridMixing, MaskedMixing, NoiseSchedule, UniformMixing

V, MASK = 6, 3
MIXINGS = [
    MaskedMixing(V, MASK),
    UniformMixing(V, MASK),
    UniformMixing(V, MASK, include_mask=True),
    *(HybridMixing(V, MASK, shift) for shift in (-1000.0, -2.0, 0.0, 2.0, 1000.0)),
    HybridMixing(V, MASK, 0.5, scale=0.3),
]
LOG_SNR = torch.linspace(-9, 9, 13, dtype=torch.float64)
CLEAN_IDS = torch.tensor([i for i in range(V) if i != MASK])


def process_of(mixing):
    return DiffusionProcess(NoiseSchedule(), mixing)


def random_xhat(*shape):
    logits = torch.randn(*shape, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[..., MASK] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("mixing", [*MIXINGS, HybridMixing(V, MASK, 1.0, scale=2.0)], ids=str)
def test_closed_form_weight_equals_its_definition(mixing):
    process = process_of(mixing)
    log_snr, tokens, noised = LOG_SNR[:, None, None], CLEAN_IDS[:, None], torch.arange(V)
    marginal = process.marginal_at(log_snr, tokens, noised)
    numerator = mixing.probs_at(log_snr, noised) - mixing.probs_derivative_at(log_snr, noised)
    weight = process.loss_weight(log_snr, tokens, noised)
    possible = marginal > 0
    by_definition = torch.sigmoid(-log_snr) * numerator / marginal
    torch.testing.assert_close(weight[possible], by_definition[possible], rtol=1e-9, atol=1e-12)
    density = torch.sigmoid(log_snr) * torch.sigmoid(-log_snr)
    torch.testing.assert_close(process.elbo_weight(log_snr, tokens, noised), weight / density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift, limit", [(-1000.0, MaskedMixing(V, MASK)), (1000.0, UniformMixing(V, MASK))])
def test_weights_at_extreme_shifts_are_finite_and_those_of_the_limit(shift, limit, dtype):
    log_snr, tokens, noised = LOG_SNR.to(dtype)[:, None, None], CLEAN_IDS[:, None], torch.arange(V)
    of_hybrid = process_of(HybridMixing(V, MASK, shift)).elbo_weight(log_snr, tokens, noised)
    assert of_hybrid.isfinite().all() and of_hybrid.dtype == dtype
    torch.testing.assert_close(of_hybrid, process_of(limit).elbo_weight(log_snr, tokens, noised))


def test_published_weights_of_the_full_vocabulary():
    def weight(shift, log_snr, noised, kind="loss_weight"):
        process = process_of(HybridMixing(131072, 3, shift))
        log_snr = torch.tensor(log_snr, dtype=torch.float64)
        return getattr(process, kind)(log_snr, torch.tensor(0), torch.tensor(noised)).item()

    assert weight(0.0, 0.0, 3) == pytest.approx(1.5)
    assert weight(0.0, 0.0, 9) == pytest.approx(0.5)
    assert weight(0.0, 0.0, 0) == pytest.approx(1.90736e-6, rel=1e-5)
    assert weight(0.0, 9.0, 3) == pytest.approx(1.999877, abs=1e-6)
    assert weight(1000.0, -9.0, 0) == pytest.approx(0.0582226, rel=1e-5)
    assert weight(1000.0, -9.0, 0, "elbo_weight") == pytest.approx(471.9, rel=1e-3)
    assert weight(1000.0, 0.0, 0) == pytest.approx(7.62939e-6, rel=1e-5)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_a_mask_weighs_one_more_than_a_noise_token(shift):
    """1 + s against s at scale 1; a token that was kept weighs s²/(s + (V − 1)·e^λ)."""
    process, token = process_of(HybridMixing(V, MASK, shift)), CLEAN_IDS[0]
    of_mask, of_noise, of_kept = (
        process.loss_weight(LOG_SNR, token, noised) for noised in (torch.tensor(MASK), CLEAN_IDS[1], token)
    )
    share = process.mixing.uniform_share(LOG_SNR)
    torch.testing.assert_close(of_mask - of_noise, torch.ones_like(share), rtol=1e-14, atol=0)
    torch.testing.assert_close(of_kept, share.square() / (share + (V - 1) * LOG_SNR.exp()), rtol=1e-12, atol=0)


def test_weight_of_rare_uniform_noise_keeps_its_relative_precision():
    process, log_snr = process_of(HybridMixing(V, MASK, -50.0)), torch.tensor(0.0, dtype=torch.float64)
    share = process.mixing.uniform_share(log_snr)
    assert share < 1e-20
    assert process.loss_weight(log_snr, torch.tensor(0), torch.tensor(1)) == share


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_marginal_is_a_distribution_and_agrees_with_its_gathers(mixing):
    process = process_of(mixing)
    one_hot = torch.eye(V, dtype=torch.float64)[CLEAN_IDS]
    marginal = process.marginal(LOG_SNR[:, None], one_hot)
    torch.testing.assert_close(marginal.sum(-1), torch.ones(LOG_SNR.numel(), V - 1, dtype=torch.float64))
    at_ids = process.marginal_at(LOG_SNR[:, None, None], CLEAN_IDS[:, None], torch.arange(V))
    torch.testing.assert_close(marginal, at_ids, rtol=1e-15, atol=0)
    uniform_mass = process.uniform_mass(LOG_SNR)
    torch.testing.assert_close(marginal[:, 0, CLEAN_IDS[1]], uniform_mass, rtol=1e-15, atol=0)
    torch.testing.assert_close(process.log_uniform_mass(LOG_SNR).exp(), uniform_mass, rtol=1e-13, atol=0)
    torch.testing.assert_close(process.alpha(LOG_SNR), torch.sigmoid(LOG_SNR))


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_transition_composes_with_the_marginal(mixing):
    process = process_of(mixing)
    for s in range(1, LOG_SNR.numel()):
        for t in range(s + 1):
            kernel = process.transition(LOG_SNR[t], LOG_SNR[s], torch.arange(V))
            assert (kernel >= 0).all()
            torch.testing.assert_close(kernel.sum(-1), torch.ones(V, dtype=torch.float64))
            xhat = random_xhat(3)
            composed = process.marginal(LOG_SNR[s], xhat) @ kernel
            torch.testing.assert_close(composed, process.marginal(LOG_SNR[t], xhat), rtol=1e-12, atol=1e-15)


def test_rounding_leaves_no_negative_transition():
    process = process_of(HybridMixing(V, MASK, 2.0))
    log_snr_s = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    kernel = process.transition(log_snr_s - 1e-15, log_snr_s, torch.tensor(0))
    assert (kernel >= 0).all()


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("t, s", [(0, 1), (0, 12), (4, 9), (11, 12), (6, 6)])
def test_posterior_obeys_bayes_and_carries_marginals_back(mixing, t, s):
    process = process_of(mixing)
    log_snr_t, log_snr_s, noised = LOG_SNR[t], LOG_SNR[s], torch.arange(V)
    clean = torch.eye(V, dtype=torch.float64)[CLEAN_IDS]
    for xhat in (*clean, *random_xhat(2)):
        marginal_t, marginal_s = process.marginal(log_snr_t, xhat), process.marginal(log_snr_s, xhat)
        posterior = process.posterior(log_snr_t, log_snr_s, noised, xhat.expand(V, V))
        assert (posterior >= 0).all()
        torch.testing.assert_close(posterior.sum(-1), torch.ones(V, dtype=torch.float64))
        joint = marginal_s[:, None] * process.transition(log_snr_t, log_snr_s, torch.arange(V))
        torch.testing.assert_close(posterior.T * marginal_t, joint, rtol=1e-11, atol=1e-16)
        torch.testing.assert_close(marginal_t @ posterior, marginal_s, rtol=1e-12, atol=1e-15)


def test_posterior_of_uniform_noise_equals_published_values():
    process = process_of(UniformMixing(5, 4))
    log_snr_t, log_snr_s = torch.logit(torch.tensor([0.5, 0.8], dtype=torch.float64))
    for xhat, expected in (
        ([0.5, 0.2, 0.2, 0.1, 0.0], [0.1875, 0.67083333, 0.0875, 0.05416667, 0.0]),
        ([1.0, 0.0, 0.0, 0.0, 0.0], [0.6375, 0.2875, 0.0375, 0.0375, 0.0]),
    ):
        xhat = torch.tensor(xhat, dtype=torch.float64)
        posterior = process.posterior(log_snr_t, log_snr_s, torch.tensor(1), xhat)
        assert posterior.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_clean_posterior_obeys_bayes(mixing):
    process, xhat = process_of(mixing), random_xhat()
    for log_snr in LOG_SNR:
        likelihood = process.marginal_at(log_snr, torch.arange(V)[:, None], torch.arange(V))
        joint = xhat[:, None] * likelihood
        posterior = process.clean_posterior(log_snr, torch.arange(V), xhat.expand(V, V))
        torch.testing.assert_close(posterior.T * joint.sum(0), joint, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(posterior.sum(-1), torch.ones(V, dtype=torch.float64))


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("t, s", [(0, 1), (0, 12), (4, 9), (11, 12), (6, 6)])
def test_renewal_carries_marginals_back_and_forgets_the_noise(mixing, t, s):
    process, xhat = process_of(mixing), random_xhat()
    log_snr_t, log_snr_s, noised = LOG_SNR[t], LOG_SNR[s], torch.arange(V)
    back = process.renewal(log_snr_t, log_snr_s, noised, xhat.expand(V, V))
    marginal_t, marginal_s = process.marginal(log_snr_t, xhat), process.marginal(log_snr_s, xhat)
    torch.testing.assert_close(marginal_t @ back, marginal_s, rtol=1e-12, atol=1e-15)
    known = torch.eye(V, dtype=torch.float64)[0]
    again = process.renewal(log_snr_t, log_snr_s, noised, known.expand(V, V))[0]
    torch.testing.assert_close(again, process.marginal(log_snr_s, known))


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.2])
def test_a_mixture_of_posterior_and_renewal_is_remdm_on_masked_noise(sigma):
    """From α = 0.5 to 0.8: published for σ = 0.1 are 0.70 to write a hidden token, 0.10 to hide a written one."""
    process, xhat = process_of(MaskedMixing(V, MASK)), random_xhat()
    level_t, level_s = torch.tensor([0.5, 0.8], dtype=torch.float64).logit()
    noised = torch.tensor([MASK, 0])
    ancestral, renewed = (
        step(level_t, level_s, noised, xhat.expand(2, V)) for step in (process.posterior, process.renewal)
    )
    hidden, written = ancestral.lerp(renewed, sigma / (1 - 0.8))
    is_mask = torch.arange(V) == MASK
    torch.testing.assert_close(hidden, torch.where(is_mask, 0.4 - sigma, (0.6 + sigma) * xhat))
    torch.testing.assert_close(written, torch.where(is_mask, sigma, (1 - sigma) * (torch.arange(V) == 0).double()))
    assert 0.5 * (hidden[MASK] + written[MASK]) == pytest.approx(1 - 0.8)  # as many hidden as without σ


def test_an_id_that_the_model_rules_out_stays():
    process = process_of(MaskedMixing(V, MASK))
    xhat = torch.eye(V, dtype=torch.float64)[5]
    expected = torch.eye(V, dtype=torch.float64)[2]
    assert torch.equal(process.posterior(LOG_SNR[3], LOG_SNR[6], torch.tensor(2), xhat), expected)
    assert torch.equal(process.clean_posterior(LOG_SNR[3], torch.tensor(2), xhat), expected)


def test_prior_is_the_noise_at_the_lowest_log_snr():
    mask_only = torch.eye(V, dtype=torch.float64)[MASK]
    assert torch.equal(process_of(MaskedMixing(V, MASK)).prior(), mask_only)
    hybrid = DiffusionProcess(NoiseSchedule(-4.0, 9.0), HybridMixing(V, MASK, 1.0))
    assert hybrid.prior()[MASK].item() == pytest.approx(1 - torch.sigmoid(torch.tensor(-3.0)).item())
    assert hybrid.prior(dtype=torch.float32).dtype == torch.float32


def test_any_uniform_mass_is_false_only_without_uniform_noise():
    flags = {str(mixing): process_of(mixing).any_uniform_mass for mixing in MIXINGS}
    without = {str(MaskedMixing(V, MASK)), str(HybridMixing(V, MASK, -1000.0))}
    assert {name for name, flag in flags.items() if not flag} == without
    assert process_of(HybridMixing(V, MASK, -60.0)).any_uniform_mass
