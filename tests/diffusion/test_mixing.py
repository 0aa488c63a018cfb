"""Mixing distributions: they are distributions, derivatives are derivatives, and limits are limits."""

import math

import pytest
import torch

from megadiff.diffusion import HybridMixing, MaskedMixing, UniformMixing

V, MASK = 7, 3
MIXINGS = [
    MaskedMixing(V, MASK),
    UniformMixing(V, MASK),
    UniformMixing(V, MASK, include_mask=True),
    *(HybridMixing(V, MASK, shift) for shift in (-1000.0, -2.0, 0.0, 2.0, 1000.0)),
    HybridMixing(V, MASK, 0.5, scale=0.3),
    HybridMixing(V, MASK, -1.0, scale=-0.7),
]
LOG_SNR = torch.linspace(-9, 9, 37, dtype=torch.float64)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_probs_sum_to_one_and_derivatives_to_zero(mixing):
    probs, slope = mixing.probs(LOG_SNR), mixing.probs_derivative(LOG_SNR)
    assert probs.shape == slope.shape == (*LOG_SNR.shape, V)
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(LOG_SNR))
    torch.testing.assert_close(slope.sum(-1), torch.zeros_like(LOG_SNR), rtol=0, atol=1e-15)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_derivatives_match_central_differences(mixing):
    step = 1e-5
    difference = (mixing.probs(LOG_SNR + step) - mixing.probs(LOG_SNR - step)) / (2 * step)
    torch.testing.assert_close(mixing.probs_derivative(LOG_SNR), difference, rtol=1e-7, atol=1e-10)
    share_rise = mixing.uniform_share(LOG_SNR + step) - mixing.uniform_share(LOG_SNR - step)
    slope = mixing.uniform_share_derivative(LOG_SNR)
    torch.testing.assert_close(slope, share_rise / (2 * step), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_values_at_ids_are_gathers(mixing):
    ids = torch.arange(LOG_SNR.numel()) % V
    derivatives = mixing.probs_derivative, mixing.probs_derivative_at
    for whole, at_ids in ((mixing.probs, mixing.probs_at), derivatives):
        gathered = whole(LOG_SNR).gather(-1, ids[:, None]).squeeze(-1)
        assert torch.equal(at_ids(LOG_SNR, ids), gathered)
        assert torch.equal(at_ids(LOG_SNR[:, None], torch.arange(V)), whole(LOG_SNR))


@pytest.mark.parametrize("shift, limit", [(-1000.0, MaskedMixing(V, MASK)), (1000.0, UniformMixing(V, MASK))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_shifts_are_the_limits(shift, limit, dtype):
    hybrid, log_snr = HybridMixing(V, MASK, shift), LOG_SNR.to(dtype)
    for name in ("uniform_share", "mask_share", "uniform_share_derivative", "probs", "probs_derivative"):
        of_hybrid, of_limit = getattr(hybrid, name)(log_snr), getattr(limit, name)(log_snr)
        assert of_hybrid.dtype == dtype and of_hybrid.isfinite().all()
        assert torch.equal(of_hybrid, of_limit), name


def test_limits_have_one_kind_of_noise_at_infinite_levels_too():
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    assert MaskedMixing(V, MASK).uniform_share(ends).tolist() == [0, 0]
    assert UniformMixing(V, MASK).uniform_share(ends).tolist() == [1, 1]


def test_published_shares():
    log_snr = torch.tensor(-9.0, dtype=torch.float64)
    shares = [HybridMixing(V, MASK, shift).uniform_share(log_snr).item() for shift in (-2.0, 0.0, 2.0)]
    assert shares == pytest.approx([1.7e-5, 1.2e-4, 9.1e-4], rel=0.03)
    crossing = HybridMixing(V, MASK, shift=1.5, scale=0.5).uniform_share(torch.tensor(-3.0))
    assert crossing.item() == 0.5


def test_uniform_noise_leaves_the_mask_out_unless_told():
    log_snr = torch.tensor(0.0, dtype=torch.float64)
    without, within = UniformMixing(V, MASK), UniformMixing(V, MASK, include_mask=True)
    assert without.num_uniform_states == V - 1 and within.num_uniform_states == V
    assert without.probs(log_snr)[MASK] == 0
    torch.testing.assert_close(within.probs(log_snr), torch.full((V,), 1 / V, dtype=torch.float64))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MaskedMixing(1, 0), "vocab_size must be at least 2"),
        (lambda: UniformMixing(5, 5), r"mask_id must lie in \[0, 5\), got 5"),
        (lambda: HybridMixing(5, -1, 0.0), r"mask_id must lie in \[0, 5\), got -1"),
        (lambda: HybridMixing(5, 3, math.inf), "shift and scale must be finite, got inf"),
        (lambda: HybridMixing(5, 3, 0.0, scale=math.nan), "shift and scale must be finite"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
