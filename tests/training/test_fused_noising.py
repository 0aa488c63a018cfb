"""The joiner of noise process and fused operator: the eager version's signature, its results, and its service."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from megadiff.diffusion import (
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    Rows,
    Samples,
    UniformMixing,
    noise_rows,
)
from megadiff.objectives import noising
from megadiff.objectives.noising import fused_noise_rows
from megadiff.ops import _library

V, MASK, SEED = 1271, 3, 7
MIXINGS = [MaskedMixing(V, MASK), UniformMixing(V, MASK, include_mask=True), HybridMixing(V, MASK, 0.0, scale=0.7)]
needs_kernels = pytest.mark.skipif(
    not _library.is_live("cpu"), reason=f"native CPU kernels are not live: {_library.state('cpu')}"
)


def test_both_have_one_signature() -> None:
    assert inspect.signature(fused_noise_rows) == inspect.signature(noise_rows)


@needs_kernels
@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("validation", [False, True])
def test_an_objective_may_take_either(mixing: MixingDistribution, validation: bool) -> None:
    process = DiffusionProcess(NoiseSchedule(), mixing)
    tokens_BL = 4 + torch.arange(16 * 96).view(16, 96) % (V - 4)
    batch = (Samples(tokens_BL=tokens_BL, counted_BL=tokens_BL % 7 > 0, ordinal_B=torch.arange(16) + 1000), SEED)
    fused, eager = (
        GiddObjective(process, beta_is_div=0.5, noise=noise).noised_batch(*batch, validation=validation)
        for noise in (fused_noise_rows, noise_rows)
    )
    assert torch.equal(fused.noised_BS, eager.noised_BS) and torch.equal(fused.rows.counted, eager.rows.counted)
    assert fused.log_snr_BS is not None and eager.log_snr_BS is not None
    assert torch.equal(fused.log_snr_BS, eager.log_snr_BS)
    for field in dataclasses.fields(Rows):
        if field.name not in ("any_uniform_mass", "counted"):
            torch.testing.assert_close(
                getattr(fused.rows, field.name), getattr(eager.rows, field.name), rtol=1.2e-7, atol=0
            )


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_without_a_kernel_the_eager_version_serves(mixing: MixingDistribution, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(noising.ops, "is_native", lambda device: asked.append(device))
    tokens_BL, log_snr_B1 = torch.arange(12).view(3, 4), torch.linspace(-3, 3, 3)[:, None]
    arguments = (tokens_BL, log_snr_B1, torch.arange(3), tokens_BL > 3, SEED, DiffusionProcess(NoiseSchedule(), mixing))
    position_L = torch.tensor([5, 6, 90, 91])
    fused = fused_noise_rows(*arguments, validation=True, position_L=position_L)
    eager = noise_rows(*arguments, validation=True, position_L=position_L)
    assert asked == [tokens_BL.device]
    for field in dataclasses.fields(eager):
        assert torch.equal(getattr(fused, field.name), getattr(eager, field.name))


@needs_kernels
def test_fp32_levels_are_raised_as_in_the_eager_version() -> None:
    process = DiffusionProcess(NoiseSchedule(), HybridMixing(V, MASK, 0.0))
    tokens_BL, log_snr_BL = torch.arange(5000).view(5, 1000) % V, torch.linspace(-9, 9, 5000).view(5, 1000)
    arguments = (tokens_BL, log_snr_BL, torch.arange(5), tokens_BL > 3, SEED, process)
    fused, eager = fused_noise_rows(*arguments), noise_rows(*arguments)
    assert torch.equal(fused.noised, eager.noised)
    torch.testing.assert_close(fused.elbo_weight, eager.elbo_weight, rtol=1.2e-7, atol=0)
