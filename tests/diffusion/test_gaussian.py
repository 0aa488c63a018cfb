"""Uniform-state noise as an argmax of Gaussians: T against its vectors, draws against brute force."""

import math

import pytest
import torch
from chance import STANDARD_ERRORS, assert_frequencies, assert_uniform

from megadiff.diffusion import GaussianCurriculum, gamma_range
from megadiff.diffusion.gaussian import (
    PUBLISHED_ALPHA,
    _distinct_ids,
    _largest_log_uniforms,
    _log_mass_below,
    _normal_quantile,
    gamma_at,
    keep_probability,
)
from megadiff.philox import Purpose, random_words

V, SEED = 7, 41


def curriculum(**settings):
    return GaussianCurriculum(
        **{"vocab_size": V, "gamma": gamma_range(V), "end_sample": 100_000, "top_k": 3, **settings}
    )


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(of, gamma, batch_size=200, length=200, first_ordinal=0):
    """Draws for tokens of a fixed pattern, all at one γ."""
    tokens = torch.arange(batch_size * length).view(batch_size, length) % V
    ordinal = torch.arange(batch_size) + first_ordinal
    return tokens, of.draw(tokens, torch.full((batch_size,), gamma, dtype=torch.float64), ordinal, SEED)


def test_keep_probability_has_the_known_values():
    known = {30_522: (0.956, 0.638, 0.062), 32_000: (0.955, 0.634, 0.061)}
    known |= {50_257: (0.946, 0.596, 0.049), 131_072: (0.920, 0.516, 0.031)}
    for vocab_size, expected in known.items():
        alpha, _ = keep_probability(float64(-3.55, -3.0, -1.85), vocab_size)
        torch.testing.assert_close(alpha, float64(*expected), rtol=0, atol=6e-4)
    strength = float64(0.2, 0.6, 0.9)  # α̃
    mean = strength / (1 - strength.square()).sqrt()
    alpha, _ = keep_probability(-2 * mean.log(), 2)
    torch.testing.assert_close(alpha, 2 * torch.special.ndtr(mean / math.sqrt(2)) - 1, rtol=1e-13, atol=0)
    torch.testing.assert_close(alpha, float64(0.114766, 0.404117, 0.855708), rtol=0, atol=6e-7)


def test_keep_probability_falls_from_one_to_zero():
    alpha, slope = keep_probability(torch.linspace(-8, 30, 2000, dtype=torch.float64), 32_000)
    assert alpha[0] == pytest.approx(1.0, abs=1e-12) and alpha[-1] == pytest.approx(0.0, abs=1e-9)
    assert (alpha.diff() < 1e-15).all() and (slope < 1e-15).all()


@pytest.mark.parametrize("vocab_size", [2, 32_000, 131_072])
def test_slope_is_the_derivative(vocab_size):
    gamma, step = torch.linspace(-4, 0, 33, dtype=torch.float64), 1e-4
    above, below = (keep_probability(gamma + s, vocab_size)[0] for s in (step, -step))
    torch.testing.assert_close(keep_probability(gamma, vocab_size)[1], (above - below) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab_size", [4, 400, 131_072])
def test_gamma_range_has_the_published_ends_at_every_vocabulary(vocab_size):
    gamma_min, gamma_max = gamma_range(vocab_size)
    alpha, _ = keep_probability(float64(gamma_max, gamma_min), vocab_size)
    torch.testing.assert_close(alpha, float64(*PUBLISHED_ALPHA), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0.001, 0.999\], got 1.0"):
        gamma_at(1.0, vocab_size)


def test_largest_numbers_are_order_statistics():
    count, size, num_draws = 6, 4, 20_000
    words = random_words(SEED, torch.arange(num_draws)[:, None], torch.arange(size), Purpose.GAUSSIAN)[..., 0]
    log_cdf = _largest_log_uniforms(words, count)
    normal = _normal_quantile(log_cdf)
    torch.testing.assert_close(torch.special.log_ndtr(normal), log_cdf, rtol=1e-9, atol=1e-15)
    assert (normal.diff(dim=-1) < 0).all()
    below = log_cdf.exp()
    for place in range(size):  # the place-th largest is below x when at most place numbers are above it
        x = below[:, place]
        cdf = sum(math.comb(count, above) * (1 - x) ** above * x ** (count - above) for above in range(place + 1))
        assert_uniform(cdf)
    # Jointly: what of brute force lies between the largest and the last of them.
    brute = torch.rand(num_draws, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    brute = brute.sort(dim=-1, descending=True).values
    spans, brute_spans = below[:, 0] - below[:, -1], (brute[:, 0] - brute[:, size - 1]).sort().values
    assert_uniform(torch.searchsorted(brute_spans, spans) / num_draws, error=math.sqrt(2))


def test_quantiles_are_exact_in_both_tails():
    log_probability = float64(-700.0, -50.0, -1.0, -math.log(2), -1e-3, -1e-14)
    quantile = _normal_quantile(log_probability)
    torch.testing.assert_close(torch.special.log_ndtr(quantile), log_probability, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count, size", [(5, 3), (4, 4), (6, 1)])
def test_ids_are_different_and_in_any_order(count, size):
    words = random_words(SEED, torch.arange(30_000)[:, None], torch.arange(size), Purpose.GAUSSIAN)
    ids = _distinct_ids(words[..., 1], words[..., 2], count)
    sequences = torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)
    allowed = torch.tensor([len(set(sequence)) == size for sequence in sequences.tolist()])
    index = (ids * count ** torch.arange(size - 1, -1, -1)).sum(dim=-1)
    assert_frequencies(index, allowed.double() / allowed.sum())


@pytest.mark.parametrize("scale", [torch.tensor(s, dtype=torch.float64) for s in (0.0, 0.5, 3.0, 900.0)], ids=float)
def test_mass_of_the_tail_is_the_truncated_mean(scale):
    bound = 2.5
    x = torch.linspace(-14, bound, 400_001, dtype=torch.float64)
    density = torch.exp(scale * (x - bound) - x.square() / 2) / math.sqrt(2 * math.pi)
    log_cdf = torch.special.log_ndtr(float64(bound))
    expected = math.log(11) + scale * bound + torch.trapezoid(density, x).log() - log_cdf
    torch.testing.assert_close(_log_mass_below(scale, float64(bound), log_cdf, 11), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("gamma", [-2.0, 0.0, 3.0])
def test_argmax_is_uniform_noise_of_keep_probability_t(gamma):
    tokens, (noised, _, _) = drawn(curriculum(), gamma)
    alpha = keep_probability(float64(gamma), V)[0]
    expected = torch.full((V,), (1 - alpha.item()) / V, dtype=torch.float64)
    expected[0] += alpha.item()
    assert_frequencies((noised - tokens) % V, expected)


def test_soft_inputs_are_those_of_all_gaussians():
    """With k = V − 1 nothing is left out: the mean share of each place is that of brute-force draws."""
    temperature, gamma = 0.5, 0.3
    of = curriculum(top_k=V - 1, log10_temperature=(math.log10(temperature),) * 2)
    tokens, (noised, ids, weights) = drawn(of, gamma)
    assert torch.equal(ids[..., 0], tokens)
    assert torch.equal(ids.sort(dim=-1).values, torch.arange(V).expand_as(ids))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(tokens.shape))
    assert torch.equal(ids.gather(-1, weights.argmax(dim=-1, keepdim=True)).squeeze(-1), noised)
    signal, noise = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
    w = noise * torch.randn(40_000, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w[:, 0] += signal
    shares = (w / temperature).softmax(dim=-1)
    brute = torch.cat([shares[:, :1], shares[:, 1:].sort(dim=-1, descending=True).values], dim=-1)
    ours = weights.flatten(0, 1).double()
    error = ((ours.var(dim=0) + brute.var(dim=0)) / 40_000).sqrt()
    assert ((ours.mean(dim=0) - brute.mean(dim=0)).abs() < STANDARD_ERRORS * error).all()


def test_the_tail_has_its_expected_share():
    """Cut after k ids, the weights fall short of 1 by about what those of all V fall on the rest."""
    temperature = (math.log10(0.4),) * 2
    _, (_, _, cut) = drawn(curriculum(top_k=2, log10_temperature=temperature), 0.0)
    _, (_, _, whole) = drawn(curriculum(top_k=V - 1, log10_temperature=temperature), 0.0)
    missing, rest = 1 - cut.sum(dim=-1).double(), whole[..., 3:].sum(dim=-1).double()
    assert (missing > 0).all() and missing.mean() > 0.1
    # Jensen: the share of a mean is above the mean of shares, a little.
    assert missing.mean() == pytest.approx(rest.mean().item(), rel=0.05) and missing.mean() > rest.mean()


def test_cold_inputs_are_the_noised_token():
    _, (noised, ids, weights) = drawn(curriculum(log10_temperature=(-6.0, -6.0)), 0.0)
    largest, place = weights.max(dim=-1)
    assert torch.equal(ids.gather(-1, place[..., None]).squeeze(-1), noised)
    assert (largest == 1).double().mean() > 0.9999  # but for ties of 1e-5 among 40 000


def test_draws_are_functions_of_ordinal_and_position():
    of = curriculum(log10_temperature=(-0.5, -1.5))
    _, whole = drawn(of, 0.0, batch_size=8, length=21)
    tokens = torch.arange(8 * 21).view(8, 21) % V
    some = torch.tensor([5, 2])
    part = of.draw(tokens[some, :13], torch.zeros(2, dtype=torch.float64), some, SEED)
    for ours, all_of_them in zip(part, whole, strict=True):
        assert torch.equal(ours, all_of_them[some, :13])
    assert not torch.equal(drawn(of, 0.0, 8, 21, first_ordinal=8)[1].noised_BL, whole.noised_BL)


def test_temperature_and_end_are_functions_of_the_ordinal():
    of = curriculum(start_sample=100, end_sample=300, log10_temperature=(-1.0, -3.0))
    ordinal = torch.tensor([0, 100, 200, 299, 300])
    assert of.covers(ordinal).tolist() == [True, True, True, True, False]
    torch.testing.assert_close(of.temperature(ordinal[:3]), float64(0.1, 0.1, 0.01))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(gamma=(1.0, -1.0)), r"gamma must rise, .* got \(1.0, -1.0\)"),
        (dict(gamma=(-math.inf, 1.0)), r"probabilities in \[0.001, 0.999\]"),
        (dict(gamma=(-9.0, 1.0)), "which keep 1.000000 and 0.172936 of 7 ids"),
        (dict(start_sample=100, end_sample=100), "start_sample must be at least 0 and below end_sample 100, got 100"),
        (dict(start_sample=-1), "start_sample must be at least 0"),
        (dict(log10_temperature=(-3.0, -7.0)), r"log10_temperature must lie in \[-6, 2\]"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(top_k=V), "below the vocabulary's 7 ids, got 7"),
    ],
)
def test_bad_settings_of_a_curriculum_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        curriculum(**settings)
