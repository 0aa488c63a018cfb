"""The measured bound is the bound: unbiased, repeatable, and the same whatever the run's own seed is."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chance import STANDARD_ERRORS
from distributed import run_ranks
from tiny import tiny_config

from megadiff.diffusion import DiffusionProcess, NoiseSchedule, UniformMixing, nelbo_terms
from megadiff.evaluation.likelihood import ValidationConfig, summarize
from megadiff.training.step import VALIDATION_SEED


def untrained_bounds(corpus: Path, cases: list[dict[str, dict[str, Any]]]) -> list[dict[str, float]]:
    """Bounds of models whose head is still zero: every prediction is uniform over V - 1 tokens."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    found = []
    for sections in cases:
        config = tiny_config(corpus, **sections)
        trainer = Trainer(config, Path("unused"), parallel_groups.initialize(config.parallel))
        estimate = trainer.validate()
        held_out, length = trainer.corpus.split("validation"), config.data.sequence_length
        windows = [held_out.window(i, length) for i in range(held_out.num_windows(length))]
        num_bytes = trainer.corpus.token_bytes_V[torch.tensor(windows)].sum().item()
        found.append(
            {
                "nelbo": estimate.nelbo,
                "stderr": estimate.stderr,
                "bits_per_byte": estimate.bits_per_byte,
                "tokens_per_byte": len(windows) * length / num_bytes,
                "vocab_size": trainer.step.vocab_size,
                "num_sequences": estimate.num_sequences,
            }
        )
    parallel_groups.shutdown()
    return found


@pytest.fixture(scope="module")
def bounds(corpus_dir: Path) -> dict[str, dict[str, float]]:
    def case(noise: str, **training: Any) -> dict[str, dict[str, Any]]:
        return {
            "objective": {"noise": noise},
            "training": {"micro_batch_size": 8, **training},
            "validation": {"num_sequences": 700},
        }

    cases = {"masked": case("masked"), "uniform": case("uniform"), "other seed": case("masked", seed=99)}
    return dict(zip(cases, run_ranks(1, untrained_bounds, corpus_dir, list(cases.values()))[0], strict=True))


def test_untrained_masked_bound_is_log_of_the_vocabulary(bounds: dict[str, dict[str, float]]) -> None:
    found = bounds["masked"]
    assert found["num_sequences"] == 700
    assert found["stderr"] < 0.2
    assert abs(found["nelbo"] - math.log(found["vocab_size"] - 1)) < STANDARD_ERRORS * found["stderr"]


def test_untrained_uniform_bound_is_the_integral_for_a_uniform_prediction(
    bounds: dict[str, dict[str, float]],
) -> None:
    """Quadrature over levels of the exact expectation over z, for x_θ uniform, as the schedule draws them."""
    found = bounds["uniform"]
    vocab_size, mask_id = int(found["vocab_size"]), 3
    process = DiffusionProcess(NoiseSchedule(), UniformMixing(vocab_size, mask_id))
    time = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    log_snr = process.schedule.log_snr(time)
    tokens = torch.full((4000,), 7)
    logits = torch.zeros(4000, vocab_size, dtype=torch.float64)
    expected = 0.0
    for noised, count in ((tokens, 1), (torch.full((4000,), 9), vocab_size - 2)):
        terms = nelbo_terms(logits, tokens, noised, log_snr, process)
        expected += count * (process.marginal_at(log_snr, tokens, noised) * terms.nelbo).mean().item()
    assert expected == pytest.approx(math.log(vocab_size - 1), rel=0.02)
    assert abs(found["nelbo"] - expected) < STANDARD_ERRORS * found["stderr"]


def test_validation_does_not_depend_on_the_seed_of_the_run(bounds: dict[str, dict[str, float]]) -> None:
    assert bounds["other seed"] == bounds["masked"]
    assert VALIDATION_SEED == 0


def test_bits_per_byte_counts_the_bytes_behind_the_tokens(bounds: dict[str, dict[str, float]]) -> None:
    found = bounds["masked"]
    per_byte = found["nelbo"] / math.log(2) * found["tokens_per_byte"]
    assert found["bits_per_byte"] == pytest.approx(per_byte, rel=0.02)  # windows repeat unevenly


def test_refuses_what_gives_no_error_bar() -> None:
    with pytest.raises(ValueError, match="num_sequences is 1"):
        ValidationConfig(num_sequences=1)


def test_the_error_of_ragged_sequences_is_that_of_their_ratio() -> None:
    """Against the spread of the estimate over many draws of sequences of 1 to 50 tokens."""
    generator = torch.Generator().manual_seed(0)
    alone: Any = SimpleNamespace(sum_over_context=lambda sums: sums, reduce_over_job=lambda sums: sums)
    estimates = []
    for _ in range(1600):
        tokens_N = torch.randint(1, 51, (60,), generator=generator).double()
        level_N = 1 + torch.rand(60, generator=generator, dtype=torch.float64)  # nats per token of a sequence
        estimates.append(summarize(torch.stack([level_N * tokens_N, tokens_N, tokens_N]), alone))
    spread = torch.tensor([estimate.nelbo for estimate in estimates]).std().item()
    claimed = sum(estimate.stderr for estimate in estimates) / len(estimates)
    assert claimed == pytest.approx(spread, rel=0.12)  # 1600 draws tell a spread to 1.8 %
