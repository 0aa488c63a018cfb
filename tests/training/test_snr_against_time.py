"""One objective by log-SNR and by time: the same words draw nearly the same noise, and training follows one curve.

What is expected. Over one schedule noised tokens are equal to the bit, and losses differ by the factor 1 − ε that
only the published density of time has; Adam does not see factors, so the curves agree beyond it, but for rounding. As
published the ends of the range differ too: 1 − α by less than 9e-4, so fewer than 1 in 1000 noised tokens are others,
and the smallest times weigh less. Both are far below what another seed changes. Bounds are estimated by levels here and
by exact counts there, on the same sequences, so they agree within the error of both.

Curves are compared by the median over steps: one token that is noised in one of them alone, at a small time, weighs as
much as a thousand others, and moves a mean as far as another seed does. With 40 seeds the medians compared below were
at most 1.1e-5 (allowed: 3e-4) and 0.06 (0.2), and the bounds are some six standard deviations of their logarithms away
(docs/log.md).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from chance import STANDARD_ERRORS
from distributed import run_ranks
from tiny import tiny_config

from megadiff.config import load_recipe
from megadiff.diffusion import LogLinearSchedule, Samples
from megadiff.objectives import GiddConfig, MdlmConfig, ObjectiveConfig, Vocabulary

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
BY_SNR, BY_TIME = (load_recipe(RECIPES / f"snr_against_time_{name}.py") for name in ("snr", "time"))
SAME_RANGE = GiddConfig(
    noise="masked",
    loss_weighting="nelbo",
    min_log_snr=LogLinearSchedule().min_log_snr,
    max_log_snr=LogLinearSchedule().max_log_snr,
)


def test_the_recipes_differ_in_the_objective_alone() -> None:
    assert dataclasses.replace(BY_SNR, objective=BY_TIME.objective) == BY_TIME
    assert BY_SNR.objective == GiddConfig(noise="masked", loss_weighting="nelbo") and BY_TIME.objective == MdlmConfig()


def test_the_noise_is_nearly_the_same() -> None:
    vocabulary = Vocabulary(size=400, mask_id=3, bos_id=1, eos_id=2, pad_id=0)
    tokens = torch.arange(4, 260).expand(1000, 256)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    samples = Samples(tokens_BL=tokens, counted_BL=counted, ordinal_B=torch.arange(1000))
    by_snr, by_time, same_range = (
        config.build(vocabulary).noised_batch(samples, 7).noised_BS
        for config in (BY_SNR.objective, BY_TIME.objective, SAME_RANGE)
    )
    assert torch.equal(same_range, by_time)
    assert 1e-4 < (by_snr != by_time).double().mean() < 1e-3


def train(corpus: Path, cases: list[tuple[ObjectiveConfig, int]]) -> list[tuple[torch.Tensor, float, float]]:
    """Losses of 24 steps, the bound after them, and its standard error, of each objective and seed."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    results = []
    groups = None
    for objective, seed in cases:
        config = tiny_config(
            corpus,
            objective=objective,
            training={"train_steps": 24, "seed": seed, "global_batch_size": 16, "micro_batch_size": 16},
            validation={"num_sequences": 1024},
        )
        groups = groups or parallel_groups.initialize(config.parallel)
        trainer = Trainer(config, Path("unused"), groups)
        batches = trainer.training_batches()
        losses = torch.tensor([trainer.train_step(batches)["loss"] for _ in range(24)], dtype=torch.float64)
        estimate = trainer.validate()
        results.append((losses, estimate.nelbo, estimate.stderr))
    parallel_groups.shutdown()
    return results


def typical(differences: torch.Tensor) -> float:
    return differences.abs().median().item()


def test_training_follows_the_same_curve(corpus_dir: Path) -> None:
    cases = [(BY_SNR.objective, 7), (BY_TIME.objective, 7), (SAME_RANGE, 7), (BY_TIME.objective, 8)]
    [results] = run_ranks(1, train, corpus_dir, cases)
    (snr, snr_bound, of_levels), (time, time_bound, of_counts), (same, same_bound, _), (other, _, _) = results
    untrained = math.log(399)
    assert time_bound + 10 * of_counts < untrained, "nothing is learned: nothing would be compared"

    epsilon = LogLinearSchedule().epsilon
    torch.testing.assert_close(same[0] * (1 - epsilon), time[0], rtol=1e-6, atol=0)
    assert typical(same * (1 - epsilon) / time - 1) < 0.3 * epsilon
    assert typical(snr - time) < 0.2 * typical(other - time)
    assert of_counts < 0.8 * of_levels
    for by_levels in (snr_bound, same_bound):
        assert abs(by_levels - time_bound) < STANDARD_ERRORS * math.hypot(of_levels, of_counts)
