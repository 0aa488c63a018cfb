"""What training and validation estimate is what it should be: Monte Carlo over ordinals against enumeration.

Standard errors are those of independent samples; levels spread evenly over ordinals only make the averages better.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from chance import assert_mean
from diffusion.rows_reference import make_samples, row_losses
from diffusion.toy import (
    MASK,
    TOKENS_L,
    L,
    V,
    all_sequences,
    levels,
    random_table,
    sequence_index,
    sequence_probabilities,
)
from torch import Tensor

from megadiff.diffusion import (
    CosineSchedule,
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    Rows,
    UniformMixing,
    nelbo_terms,
)

NUM_SAMPLES = 60_000
MIXINGS = [
    MaskedMixing(V, MASK),
    UniformMixing(V, MASK),
    UniformMixing(V, MASK, include_mask=True),
    HybridMixing(V, MASK, -2.0),
    HybridMixing(V, MASK, 0.0, 0.6),
    HybridMixing(V, MASK, 2.0),
]


def exact_losses(process: DiffusionProcess, *, independent: bool) -> tuple[float, float]:
    """Expected training loss (weighted by w) and NELBO of the toy sequence, in nats, for the random table.

    With one level per sequence the tokens are independent given the level; with levels of their own, the other tokens
    of a row have the marginal averaged over levels.
    """
    log_snr_N, weight_N = levels(process.schedule)
    one_hot_LV = torch.nn.functional.one_hot(TOKENS_L, V).double()
    marginal_NLV = process.marginal(log_snr_N[:, None], one_hot_LV)
    sequences_ML = all_sequences()
    shape = (len(log_snr_N), *sequences_ML.shape)
    terms = nelbo_terms(
        random_table().expand(*shape, V),
        TOKENS_L.expand(shape),
        sequences_ML.expand(shape),
        log_snr_N[:, None, None],
        process,
    )
    loss_NML = torch.where(terms.loss_weight != 0, terms.loss_weight * (terms.kl_div + terms.is_div), 0.0)
    if independent:
        average_LV = torch.einsum("n,nlv->lv", weight_N, marginal_NLV)
        of_rows = []
        for row in range(L):
            of_row_NLV = average_LV.expand_as(marginal_NLV).clone()
            of_row_NLV[:, row] = marginal_NLV[:, row]
            of_rows.append(sequence_probabilities(of_row_NLV))
        probability_NML = torch.stack(of_rows, dim=-1)
    else:
        probability_NML = sequence_probabilities(marginal_NLV)[..., None]
    loss, nelbo = (torch.einsum("n,nml->", weight_N, probability_NML * x).item() for x in (loss_NML, terms.nelbo))
    return loss, nelbo


def losses(rows: Rows) -> tuple[Tensor, Tensor]:
    """Training loss and NELBO of each sample, float64 [B]."""
    loss_BL, nelbo_BL = row_losses(random_table()[sequence_index(rows.noised)], rows, MASK)
    return loss_BL.sum(-1), nelbo_BL.sum(-1)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("schedule", [NoiseSchedule(), CosineSchedule()], ids=["linear", "cosine"])
@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_losses_are_unbiased(mixing: MixingDistribution, schedule: NoiseSchedule, independent: bool) -> None:
    """Both weightings, and the bound reported beside them."""
    process = DiffusionProcess(schedule, mixing)
    exact_loss, exact_nelbo = exact_losses(process, independent=independent)
    objective = GiddObjective(process, independent_level_fraction=float(independent))
    samples = make_samples(TOKENS_L.expand(NUM_SAMPLES, L))
    loss_B, nelbo_B = losses(objective.noised_batch(samples, seed=3).rows)
    assert_mean(loss_B, exact_loss, at_most=0.03 * exact_loss)
    assert_mean(nelbo_B, exact_nelbo, at_most=0.03 * exact_nelbo)
    of_bound = dataclasses.replace(objective, loss_weighting="nelbo").noised_batch(samples, seed=3).rows
    torch.testing.assert_close(losses(of_bound)[0], nelbo_B, rtol=1e-12, atol=0)  # KL and IS are added up elsewhere


def test_levels_of_their_own_estimate_something_else() -> None:
    """Else the tests above could not tell the two apart."""
    process = DiffusionProcess(NoiseSchedule(), MaskedMixing(V, MASK))
    (_, shared), (_, independent) = (exact_losses(process, independent=choice) for choice in (False, True))
    assert abs(shared - independent) > 0.02 * shared


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_validation_is_unbiased_whatever_training_does(mixing: MixingDistribution) -> None:
    process = DiffusionProcess(NoiseSchedule(), mixing)
    objective = GiddObjective(process, independent_level_fraction=0.5, linear_level_fraction=0.5, max_loss_weight=0.1)
    samples = make_samples(TOKENS_L.expand(NUM_SAMPLES, L))
    _, nelbo_B = losses(objective.noised_batch(samples, seed=3, validation=True).rows)
    exact = exact_losses(process, independent=False)[1]
    assert_mean(nelbo_B, exact, at_most=0.03 * exact)


def test_enumerations_agree_with_their_definitions() -> None:
    sequences_ML = all_sequences()
    assert sequences_ML.tolist() == [list(ids) for ids in itertools.product(range(V), repeat=L)]
    assert torch.equal(sequence_index(sequences_ML), torch.arange(V**L))
    marginal_LV = torch.rand(L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    probability_M = sequence_probabilities(marginal_LV)
    assert probability_M.sum().item() == pytest.approx(1)
    assert probability_M[7].item() == pytest.approx((marginal_LV[0, 0] * marginal_LV[1, 1] * marginal_LV[2, 3]).item())
    assert levels(NoiseSchedule())[1].sum().item() == pytest.approx(1)
