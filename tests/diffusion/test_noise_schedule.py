"""The schedule: its ends, its inverse, its density, and its precision where α is close to 0 or 1."""

import math

import pytest
import torch

from megadiff.diffusion import NoiseSchedule


def test_ends_are_exact_and_alpha_is_linear_in_time():
    schedule = NoiseSchedule()
    time = torch.linspace(0, 1, 1001, dtype=torch.float64)
    log_snr = schedule.log_snr(time)
    assert log_snr[0] == 9.0 and log_snr[-1] == -9.0
    alpha = torch.sigmoid(log_snr)
    torch.testing.assert_close(alpha, alpha[0] + time * (alpha[-1] - alpha[0]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("bounds", [(-9.0, 9.0), (-3.0, 1.0), (20.0, 30.0), (-30.0, -20.0)])
def test_time_inverts_log_snr(bounds):
    schedule = NoiseSchedule(*bounds)
    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.log_snr(time)), time, rtol=1e-10, atol=1e-13)
    assert schedule.log_snr(time).diff().lt(0).all()


def test_range_beyond_float64_is_clamped():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert NoiseSchedule(-1000, 1000).log_snr(ends).tolist() == [1000.0, -1000.0]


def test_density_is_the_un_normalised_slope_of_alpha():
    schedule = NoiseSchedule(-9.0, 9.0)
    assert schedule.mass == pytest.approx(1 - 2.468e-4, abs=1e-7)
    log_snr = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    assert torch.trapezoid(schedule.log_snr_pdf(log_snr), log_snr).item() == pytest.approx(schedule.mass)
    time = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.log_snr(time).sum(), time)
    density = schedule.log_snr_pdf(schedule.log_snr(time.detach()))
    torch.testing.assert_close(-slope * density, torch.full_like(density, schedule.mass))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    schedule, time = NoiseSchedule(), torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
    log_snr = schedule.log_snr(time)
    assert log_snr.dtype == schedule.time(log_snr).dtype == schedule.log_snr_pdf(log_snr).dtype == dtype
    assert log_snr.tolist() == pytest.approx([9.0, 0.0, -9.0], abs=0.02)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (9.0, -9.0)])
def test_bounds_out_of_order_are_refused(bounds):
    with pytest.raises(ValueError, match="min_log_snr must be below max_log_snr, got"):
        NoiseSchedule(*bounds)


@pytest.mark.parametrize("bounds", [(-math.inf, 9.0), (-9.0, math.nan)])
def test_bounds_that_are_not_finite_are_refused(bounds):
    with pytest.raises(ValueError, match="must be finite, got"):
        NoiseSchedule(*bounds)
