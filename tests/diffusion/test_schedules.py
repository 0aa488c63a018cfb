"""Schedules other than the linear one: ends, inverses, densities, precision; and that the bound ignores them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusion.toy import MASK, TOKENS_L, V, all_sequences, gauss_legendre, levels, random_table, sequence_probabilities

from megadiff.diffusion import (
    CosineSchedule,
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    TabulatedSchedule,
    UniformMixing,
    ancestral_sample,
    nelbo_terms,
)
from megadiff.diffusion.schedule import LogLinearSchedule

RAGGED = (1.0, 0.9, 0.4, 0.35, 0.05, 0.0)


def schedules(minimum: float = -9.0, maximum: float = 9.0) -> list[NoiseSchedule]:
    return [
        NoiseSchedule(minimum, maximum),
        CosineSchedule(minimum, maximum),
        TabulatedSchedule(minimum, maximum, RAGGED),
        TabulatedSchedule.of(lambda time: (1 - time) ** 3, minimum, maximum, num_values=9),
    ]


def name_of(schedule: object) -> str:
    return type(schedule).__name__


EVERY = [*schedules(), *schedules(-3.0, 1.0), LogLinearSchedule(), LogLinearSchedule(epsilon=0.1)]


def times_of_values(schedule: NoiseSchedule) -> torch.Tensor | None:
    """Times where the density of a tabulated schedule jumps; None for smooth ones."""
    if not isinstance(schedule, TabulatedSchedule):
        return None
    log_snr = torch.tensor(schedule.alphas, dtype=torch.float64).logit()
    inside = (log_snr > schedule.min_log_snr) & (log_snr < schedule.max_log_snr)
    return schedule.time(log_snr[inside])


@pytest.mark.parametrize("schedule", EVERY, ids=name_of)
def test_times_run_through_the_range_and_back(schedule: NoiseSchedule) -> None:
    time = torch.linspace(0, 1, 1001, dtype=torch.float64)
    log_snr = schedule.log_snr(time)
    assert log_snr[0].item() == pytest.approx(schedule.max_log_snr, abs=1e-11)
    assert log_snr[-1].item() == pytest.approx(schedule.min_log_snr, abs=1e-11)
    assert log_snr.diff().lt(0).all()
    torch.testing.assert_close(schedule.time(log_snr), time, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("schedule", EVERY, ids=name_of)
def test_densities_are_slopes_of_time_scaled_to_the_mass(schedule: NoiseSchedule) -> None:
    """p = −mass·dt/dλ, by central differences, and so ∫p = mass."""
    log_snr = torch.linspace(schedule.min_log_snr, schedule.max_log_snr, 103, dtype=torch.float64)[1:-1]
    step = 1e-5
    slope = (schedule.time(log_snr - step) - schedule.time(log_snr + step)) / (2 * step)
    torch.testing.assert_close(schedule.log_snr_pdf(log_snr), schedule.mass * slope, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("schedule", schedules(), ids=name_of)
def test_schedules_on_one_range_have_one_mass(schedule: NoiseSchedule) -> None:
    assert schedule.mass == NoiseSchedule().mass == pytest.approx(1 - 2.468e-4, abs=1e-7)


def test_published_mass_of_the_log_linear_schedule() -> None:
    """t is drawn from [ε, 1], and w/p is 1/t at a mask."""
    schedule = LogLinearSchedule(epsilon=0.01)
    assert schedule.mass == 0.99
    time = torch.linspace(0, 1, 11, dtype=torch.float64)
    elbo_weight = 1.0 / schedule.log_snr_pdf(schedule.log_snr(time))
    # α·w/p is the weight of the cross-entropy.
    published = 1.0 / (0.01 + 0.99 * time)
    torch.testing.assert_close(torch.sigmoid(schedule.log_snr(time)) * elbo_weight, published, rtol=1e-10, atol=0)


def test_cosine_is_the_published_curve() -> None:
    schedule = CosineSchedule(-30.0, 30.0)
    time = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(
        torch.sigmoid(schedule.log_snr(time)), 0.5 + 0.5 * torch.cos(math.pi * time), atol=1e-6, rtol=0
    )
    # Over the whole line the density is √(σ(λ)·σ(−λ))/π.
    assert schedule.log_snr_pdf(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(0.5 / math.pi, rel=1e-6)


@pytest.mark.parametrize("bounds", [(20.0, 30.0), (-30.0, -20.0), (-1000.0, 1000.0)])
def test_cosine_keeps_its_precision_far_out(bounds: tuple[float, float]) -> None:
    schedule = CosineSchedule(*bounds)
    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    log_snr = schedule.log_snr(time)
    assert [log_snr[0].item(), log_snr[-1].item()] == pytest.approx(bounds[::-1], rel=1e-12)
    if bounds[1] - bounds[0] < 100:
        torch.testing.assert_close(schedule.time(log_snr), time, rtol=1e-9, atol=1e-13)


def test_a_table_of_a_formula_is_close_to_the_formula_and_of_two_values_linear() -> None:
    time = torch.linspace(0, 1, 1001, dtype=torch.float64)
    two = TabulatedSchedule()
    torch.testing.assert_close(two.log_snr(time), NoiseSchedule().log_snr(time), rtol=1e-11, atol=1e-11)
    log_snr = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(two.log_snr_pdf(log_snr), NoiseSchedule().log_snr_pdf(log_snr))
    cosine, errors = CosineSchedule(), []
    for num_values in (65, 129):
        table = TabulatedSchedule.of(lambda t: (math.pi * t / 2).cos().square(), num_values=num_values)
        errors.append((table.log_snr(time).sigmoid() - cosine.log_snr(time).sigmoid()).abs().max().item())
    assert errors[0] < 4e-3 and errors[1] < errors[0] / 1.5


@pytest.mark.parametrize("schedule", schedules(), ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_kept(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    time = torch.tensor([[0.0, 0.5], [0.75, 1.0]], dtype=dtype)
    log_snr = schedule.log_snr(time)
    for result in (log_snr, schedule.time(log_snr), schedule.log_snr_pdf(log_snr), schedule.log_snr(time[0, 1])):
        assert result.dtype == dtype
    assert log_snr.shape == schedule.time(log_snr).shape == schedule.log_snr_pdf(log_snr).shape == (2, 2)
    assert schedule.log_snr(time[0, 1]).shape == ()


@pytest.mark.parametrize(
    "alphas, message",
    [
        ((1.0,), "alphas must be two or more values that fall strictly, got 1 values"),
        ((1.0, 0.5, 0.5, 0.0), "alphas must be two or more values that fall strictly, got 4 values"),
        ((1.0, math.nan, 0.0), "fall strictly"),
        ((0.99, 0.0), r"alphas must fall from \[0.9998766, 1\] to \[0, 0.0001233946\] .* got 0.99 to 0"),
        ((1.0, 0.01), "narrow the range, or go on to the ends"),
        ((1.1, 0.0), "alphas must fall from"),
        ((1.0, -0.1), "alphas must fall from"),
    ],
)
def test_tables_that_are_no_schedule_are_refused(alphas: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabulatedSchedule(-9.0, 9.0, alphas)


@pytest.mark.parametrize("build", [CosineSchedule, TabulatedSchedule])
def test_bounds_out_of_order_are_refused_by_all(build: type[NoiseSchedule]) -> None:
    with pytest.raises(ValueError, match="min_log_snr must be below max_log_snr"):
        build(9.0, -9.0)


MIXINGS = [
    MaskedMixing(V, MASK),
    UniformMixing(V, MASK),
    UniformMixing(V, MASK, include_mask=True),
    HybridMixing(V, MASK, -2.0),
    HybridMixing(V, MASK, 0.0, 0.6),
    HybridMixing(V, MASK, 2.0),
]


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_the_bound_does_not_depend_on_the_schedule(mixing: MixingDistribution) -> None:
    """Enumerated over all noised sequences; averaged over each schedule's own times by quadrature; for any denoiser."""
    table_MLV, sequences_ML = random_table(), all_sequences()
    one_hot_LV = torch.nn.functional.one_hot(TOKENS_L, V).double()

    def integrand(process: DiffusionProcess, log_snr_N: torch.Tensor) -> torch.Tensor:
        """E over z of Σ w·(KL + IS), [N]."""
        probability_NM = sequence_probabilities(process.marginal(log_snr_N[:, None], one_hot_LV))
        shape = (len(log_snr_N), *sequences_ML.shape)
        terms = nelbo_terms(
            table_MLV.expand(*shape, V),
            TOKENS_L.expand(shape),
            sequences_ML.expand(shape),
            log_snr_N[:, None, None],
            process,
        )
        weighted_NM = (terms.nelbo / terms.elbo_weight.where(terms.elbo_weight != 0, 1.0) * terms.loss_weight).sum(-1)
        return (probability_NM * weighted_NM).sum(-1)

    log_snr_N, weight_N = gauss_legendre(torch.linspace(-9, 9, 37, dtype=torch.float64))
    integral = (weight_N * integrand(DiffusionProcess(NoiseSchedule(), mixing), log_snr_N)).sum().item()
    for schedule in schedules():
        process = DiffusionProcess(schedule, mixing)
        log_snr_N, weight_N = levels(schedule, times_of_values(schedule))
        average = (weight_N * integrand(process, log_snr_N) / schedule.log_snr_pdf(log_snr_N)).sum().item()
        assert average * schedule.mass == pytest.approx(integral, rel=1e-9), schedule


def test_samplers_step_through_alpha_whatever_the_schedule() -> None:
    """A schedule weighs levels in training; what a sampler writes does not depend on it."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    canvas = torch.zeros(8, 32, dtype=torch.int64)
    written = [
        ancestral_sample(
            lambda noised, log_snr: logits.expand(8, 32, V),
            DiffusionProcess(schedule, HybridMixing(V, MASK, 0.0)),
            canvas,
            torch.zeros_like(canvas, dtype=torch.bool),
            seed=5,
            num_denoising_steps=6,
        )
        for schedule in schedules()
    ]
    assert all(torch.equal(written[0], other) for other in written[1:])
