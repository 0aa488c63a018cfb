"""The dense reference: numeric vectors, gradients, invariances, and finiteness at the ends of every range."""

import itertools
import math

import pytest
import torch

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    UniformMixing,
    nelbo_terms,
)

V, MASK = 5, 3
SHIFTS = (-1000.0, -2.0, 0.0, 2.0, 1000.0)


def process_of(mixing):
    return DiffusionProcess(NoiseSchedule(), mixing)


def hybrid(shift):
    return process_of(HybridMixing(V, MASK, shift))


def every_case(logits_scale=1.0, dtype=torch.float64):
    """Return logits, tokens, noised for all pairs of a clean and a noised id, [V - 1, V]."""
    clean = torch.tensor([i for i in range(V) if i != MASK])
    tokens, noised = (ids.contiguous() for ids in torch.broadcast_tensors(clean[:, None], torch.arange(V)))
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*tokens.shape, V, generator=generator, dtype=dtype) * logits_scale, tokens, noised


# shift, λ, z, w, KL, IS, w/p(λ)·(KL + IS) for logits (1, 0, −1, *, 0.5) and x = 0
VECTORS = [
    (-1000.0, 0.0, 3, 1, 0.373283635, 0, 1.49313454),
    (-1000.0, 3.0, 3, 1, 0.711160665, 0, 15.74177172),
    (-2.0, 0.0, 1, 0.119202922, 0.287104976, 1.070389730, 0.64726934),
    (0.0, -4.0, 3, 1.017986210, 0.005475244, 0, 0.31556448),
    (0.0, 0.0, 0, 0.055555556, 0.199446496, 0.247866920, 0.09940298),
    (0.0, 0.0, 1, 0.5, 0.199446496, 0.290912932, 0.98071885),
    (0.0, 0.0, 3, 1.5, 0.199446496, 0, 1.19667897),
    (0.0, 3.0, 1, 0.952574127, 0.618585047, 1.817764352, 51.37173521),
    (2.0, 3.0, 0, 0.012130738, 0.615979093, 0.348429340, 0.25896085),
    (1000.0, 0.0, 0, 0.2, 0.150950076, 0.180421085, 0.26509693),
    (1000.0, 0.0, 1, 1, 0.150950076, 0.118254800, 1.07681950),
    (1000.0, 3.0, 1, 1, 0.615555725, 1.775300331, 52.92237342),
]


@pytest.mark.parametrize("shift, log_snr, noised, weight, kl_div, is_div, nelbo", VECTORS)
def test_numeric_vectors(shift, log_snr, noised, weight, kl_div, is_div, nelbo):
    logits = torch.tensor([1.0, 0.0, -1.0, 17.0, 0.5], dtype=torch.float64)
    limits = {-1000.0: MaskedMixing(V, MASK), 1000.0: UniformMixing(V, MASK)}
    for mixing in {HybridMixing(V, MASK, shift), limits.get(shift, HybridMixing(V, MASK, shift))}:
        terms = nelbo_terms(logits, torch.tensor(0), torch.tensor(noised), torch.tensor(log_snr), process_of(mixing))
        assert terms.loss_weight.item() == pytest.approx(weight, abs=1e-9)
        assert terms.kl_div.item() == pytest.approx(kl_div, abs=1e-9)
        assert terms.is_div.item() == pytest.approx(is_div, abs=1e-9)
        assert terms.nelbo.item() == pytest.approx(nelbo, abs=1e-8)
        assert terms.elbo_weight.item() == pytest.approx(
            weight * math.exp(log_snr) * (1 + math.exp(-log_snr)) ** 2, rel=1e-7
        )


@pytest.mark.parametrize(
    "mixing",
    [*(HybridMixing(V, MASK, s) for s in (-2.0, 0.0, 2.0)), UniformMixing(V, MASK, include_mask=True)],
    ids=str,
)
def test_divergences_equal_their_definition_on_marginals(mixing):
    process, (logits, tokens, noised) = process_of(mixing), every_case()
    for log_snr in torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64):
        terms = nelbo_terms(logits, tokens, noised, log_snr, process)
        xhat = logits.masked_fill(torch.arange(V) == MASK, -torch.inf).softmax(-1)
        q = process.marginal(log_snr, torch.nn.functional.one_hot(tokens, V).double())
        p = process.marginal(log_snr, xhat)
        torch.testing.assert_close(terms.kl_div, (q * (q / p).log()).sum(-1), rtol=1e-10, atol=1e-13)
        ratio = (q / p).gather(-1, noised[..., None]).squeeze(-1)
        torch.testing.assert_close(terms.is_div, ratio - ratio.log() - 1, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(terms.nelbo, terms.elbo_weight * (terms.kl_div + terms.is_div))
        assert (terms.kl_div > 0).all() and (terms.is_div >= 0).all()


@pytest.mark.parametrize("shift", SHIFTS)
def test_perfect_predictions_cost_nothing(shift):
    _, tokens, noised = every_case()
    logits = torch.nn.functional.one_hot(tokens, V).double() * 1e3
    for log_snr in (-9.0, 0.0, 9.0):
        terms = nelbo_terms(logits, tokens, noised, torch.tensor(log_snr), hybrid(shift))
        for divergence in (terms.kl_div, terms.is_div, terms.nelbo):
            torch.testing.assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("log_snr", [-6.0, 0.0, 3.0])
def test_gradients_match_finite_differences(shift, log_snr):
    logits, tokens, noised = every_case()
    process, log_snr = hybrid(shift), torch.tensor(log_snr, dtype=torch.float64)

    def divergences(logits):
        terms = nelbo_terms(logits, tokens, noised, log_snr, process)
        return terms.kl_div, terms.is_div, terms.loss_weight * (terms.kl_div + terms.is_div)

    assert torch.autograd.gradcheck(divergences, logits.requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", (-2.0, 0.0, 2.0, 1000.0))
def test_gradient_equals_the_closed_form(shift):
    process, (logits, tokens, noised) = hybrid(shift), every_case()
    log_snr = torch.tensor(0.7, dtype=torch.float64)
    logits.requires_grad_()
    terms = nelbo_terms(logits, tokens, noised, log_snr, process)
    (of_kl,) = torch.autograd.grad(terms.kl_div.sum(), logits, retain_graph=True)
    (of_is,) = torch.autograd.grad(terms.is_div.sum(), logits)

    is_mask = torch.arange(V) == MASK
    xhat = logits.detach().masked_fill(is_mask, -torch.inf).softmax(-1)
    alpha, mass = process.alpha(log_snr), process.uniform_mass(log_snr)
    sigma = alpha * xhat / (alpha * xhat + mass)  # σ(a_v), 0 at the mask
    target, at_noised = (torch.nn.functional.one_hot(ids, V).double() for ids in (tokens, noised))
    q_ratio = (alpha * target + mass) / (alpha * xhat + mass)
    g_kl = -mass * sigma - alpha * target * sigma
    g_is = at_noised * sigma * (1 - q_ratio)
    for autograd, g in ((of_kl, g_kl), (of_is, g_is)):
        closed_form = g - xhat * g.sum(-1, keepdim=True)
        torch.testing.assert_close(autograd, closed_form, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shift", SHIFTS)
def test_invariance_to_a_constant_and_to_the_mask_logit(shift):
    logits, tokens, noised = every_case()
    log_snr, process = torch.tensor(1.0), hybrid(shift)

    def value_and_gradient(logits):
        logits = logits.clone().requires_grad_()
        nelbo = nelbo_terms(logits, tokens, noised, log_snr, process).nelbo
        nelbo.sum().backward()
        return nelbo.detach(), logits.grad

    value, gradient = value_and_gradient(logits)
    assert (gradient[..., MASK] == 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros_like(value), rtol=0, atol=1e-12)
    for mask_logit in (-50.0, 1e30, math.inf, math.nan):
        changed = logits.clone()
        changed[..., MASK] = mask_logit
        for result, expected in zip(value_and_gradient(changed), (value, gradient), strict=True):
            assert torch.equal(result, expected)
    for result, expected in zip(value_and_gradient(logits + 3.0), (value, gradient), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logits_scale", [0.0, 1.0, 300.0])
def test_value_and_gradient_are_finite_at_every_end(dtype, logits_scale):
    mixings = [
        MaskedMixing(V, MASK),
        UniformMixing(V, MASK),
        UniformMixing(V, MASK, include_mask=True),
        *(HybridMixing(V, MASK, shift) for shift in SHIFTS),
    ]
    for mixing, log_snr in itertools.product(mixings, (-9.0, 0.0, 9.0)):
        logits, tokens, noised = every_case(logits_scale, dtype)
        logits.requires_grad_()
        terms = nelbo_terms(logits, tokens, noised, torch.tensor(log_snr), process_of(mixing))
        terms.nelbo.sum().backward()
        assert terms.nelbo.dtype == dtype
        for name in ("kl_div", "loss_weight", "elbo_weight", "nelbo"):
            assert getattr(terms, name).isfinite().all(), (mixing, log_snr, name)
        assert not terms.is_div.isnan().any()
        assert logits.grad.isfinite().all(), (mixing, log_snr)


def test_log_snr_broadcasts_and_low_precision_logits_are_raised():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, V, generator=generator)
    tokens, noised = torch.tensor([[0, 1, 2], [4, 4, 1]]), torch.tensor([[3, 1, 4], [3, 0, 1]])
    per_sequence = torch.tensor([[1.5], [-2.0]], dtype=torch.float64)
    of_sequence = nelbo_terms(logits, tokens, noised, per_sequence, hybrid(0.0))
    of_token = nelbo_terms(logits, tokens, noised, per_sequence.expand(2, 3), hybrid(0.0))
    of_scalar = nelbo_terms(logits[1:], tokens[1:], noised[1:], per_sequence[1, 0], hybrid(0.0))
    for a, b, c in zip(of_sequence, of_token, of_scalar, strict=True):
        assert a.shape == tokens.shape and a.dtype == torch.float32
        assert torch.equal(a, b) and torch.equal(a[1:], c)
    of_bfloat16 = nelbo_terms(logits.bfloat16(), tokens, noised, per_sequence, hybrid(0.0)).nelbo
    of_raised = nelbo_terms(logits.bfloat16().float(), tokens, noised, per_sequence, hybrid(0.0)).nelbo
    assert of_bfloat16.dtype == torch.float32 and torch.equal(of_bfloat16, of_raised)


@pytest.mark.parametrize(
    "logits_shape, noised_shape, log_snr_shape, message",
    [
        ((2, 3, V + 1), (2, 3), (), "logits and noised must have shapes"),
        ((2, 3, V), (3, 2), (), "logits and noised must have shapes"),
        ((2, 3, V), (2, 3), (2,), "log_snr must broadcast"),
        ((2, 3, V), (2, 3), (1, 2, 3), "log_snr must broadcast"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits_shape, noised_shape, log_snr_shape, message):
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    noised = torch.zeros(noised_shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        nelbo_terms(torch.zeros(logits_shape), tokens, noised, torch.zeros(log_snr_shape), hybrid(0.0))
