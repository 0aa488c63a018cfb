"""Step time and days against sums done by hand, and the table of docs/ten_billion.md against the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ten_billion import ALTERNATIVES, DIVIDED_LAYERS, FOLDER, RECIPES, RESERVE_GIB, alternatives, sums, table

from megadiff.cli import main
from megadiff.config import load_recipe
from megadiff.pace import (
    SAVING_STEPS,
    Rates,
    accumulated_bytes,
    bubble,
    exchanged_bytes,
    pace,
    step_costs,
    tensor_parallel_bytes,
)
from megadiff.planning import GIB, plan

VOCAB = 131_072


def test_a_step_takes_its_operations_over_what_devices_do() -> None:
    config = load_recipe(RECIPES[1])
    planned = plan(config, 256, VOCAB)
    # Published: 5.583e10 without head; the head adds 6·V·H.
    per_token = 72 * 34 * 4608**2 + 12 * 34 * 4608 * 2048 + 6 * VOCAB * 4608
    found = pace(planned, 256, mfu=0.4, device_tflops=1000.0)
    assert found.step_flops == per_token * 3072 * 2048
    assert found.step_seconds == pytest.approx(found.step_flops / (256 * 0.4e15))
    assert found.tokens_per_second == pytest.approx(256 * 0.4e15 / per_token)
    assert found.days == pytest.approx(29_000 * found.step_seconds / 86_400)
    assert found.saving_bytes_per_second * SAVING_STEPS * found.step_seconds == pytest.approx(14 * planned.parameters)
    half = pace(planned, 128, mfu=0.2, device_tflops=1000.0)
    assert half.days == pytest.approx(4 * found.days)


def test_pipelines_wait_less_with_more_micro_batches_and_virtual_stages() -> None:
    config = load_recipe(RECIPES[0])
    assert bubble(config, 256) == 1 / (2 * 16)  # 3072 samples over 64 ranks, 3 at once
    plain = config.overridden(["--parallel.virtual-pipeline-model-parallel-size", "none"])
    assert bubble(plain, 256) == 1 / 16
    [first, _] = plan(config, 256, VOCAB).stages
    assert exchanged_bytes(first, 128) == (first.gradients + first.weights) * 127 // 128
    assert exchanged_bytes(first, 1) == 0


def test_gradients_are_added_up_in_every_micro_batch() -> None:
    """The layout with one sample at once, by hand: 5.19 B parameters of the first stage, 62 GB, 48 micro-batches."""
    config = load_recipe(RECIPES[0]).overridden(DIVIDED_LAYERS.split())
    planned = plan(config, 128, VOCAB)
    first = planned.stages[0]
    assert first.parameters == VOCAB * 4608 + 18 * (12 * 4608**2 + 2 * 4608 + 2 * 128)
    assert accumulated_bytes(first) == 12 * first.parameters == pytest.approx(62.3e9, rel=1e-3)
    assert tensor_parallel_bytes(config) == 0
    costs = step_costs(config, planned, 128, Rates(products=500e12, memory=2.5e12, network=40e9))
    assert costs.products == pytest.approx(planned.flops_per_token.total * 3072 * 2048 / (128 * 500e12))
    assert costs.accumulation == pytest.approx(48 * 12 * first.parameters / 2.5e12)
    assert costs.bubble == pytest.approx((costs.products + costs.accumulation) / (2 * 48))
    assert costs.gradients == pytest.approx(exchanged_bytes(first, 64) / 40e9)
    assert costs.total == pytest.approx(costs.products + costs.accumulation + costs.bubble + costs.gradients)


def test_matrices_by_two_exchange_rows_and_halve_what_is_added_up() -> None:
    """The recipe: half of the parameters, a third as many micro-batches per copy, rows ten times a layer."""
    config = load_recipe(RECIPES[0])
    planned = plan(config, 256, VOCAB)
    rows = 2 * 3 * 2048 * 4608  # bytes of three samples in bf16
    assert tensor_parallel_bytes(config) == 10 * 18 * rows // 2
    costs = step_costs(config, planned, 256, Rates(memory=2.5e12, node=400e9))
    assert costs.tensor_parallel == pytest.approx(16 * 10 * 18 * rows / 2 / 400e9)
    assert costs.accumulation == pytest.approx(16 * 12 * planned.stages[0].parameters / 2.5e12)
    again = config.overridden(["--parallel.recompute-granularity", "full"])
    assert step_costs(again, plan(again, 256, VOCAB), 256).products == pytest.approx(
        4 / 3 * planned.flops_per_token.total * 3072 * 2048 / (256 * Rates().products)
    )


def test_the_recipe_has_the_least_sum_of_what_fits() -> None:
    for world_size in (64, 128, 256, 512):
        found = {}
        for name, settings in ALTERNATIVES.items():
            config = load_recipe(RECIPES[0]).overridden(settings.split())
            planned = plan(config, world_size, VOCAB)
            if planned.worst.peak <= (80 - RESERVE_GIB) * GIB:
                found[name] = step_costs(config, planned, world_size).total
        assert min(found, key=found.__getitem__) == "both by two, three at once (the recipe)"


def test_assumptions_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(RECIPES[0]), "--world-size", "64", "--vocab-size", str(VOCAB)]
    for options, message in (
        (["--mfu", "0"], "--mfu is 0.0, but must lie in (0, 1]: the share of the device's peak that the model gets"),
        (["--mfu", "40"], "--mfu is 40.0, but must lie in (0, 1]"),
        (["--mfu", "0.4", "--device-tflops", "0"], "--device-tflops is 0.0, but must be positive"),
        (["--device-tflops", "900"], "--device-tflops says nothing without a share of it: give --mfu"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_documented_tables_are_what_the_code_computes() -> None:
    document = (Path(__file__).parents[1] / "docs" / "ten_billion.md").read_text()
    for computed in (table(), alternatives(), sums()):
        assert computed in document, "docs/ten_billion.md differs: put there what `python tests/ten_billion.py` prints"


@pytest.mark.parametrize(
    "name, parameters, tokens, operations",
    [
        ("gidd_3b_masked", 2.0390e9, 73.9e9, 1.00e21),
        ("gidd_3b_uniform", 2.1523e9, 70.8e9, 1.02e21),
        ("gidd_10b_uniform", 8.6651e9, 182.5e9, 1.02e22),
    ],
)
def test_recipes_are_the_published_runs(name: str, parameters: float, tokens: float, operations: float) -> None:
    """arXiv 2512.10858, whose layers also have biases; and they fit, with the reserve."""
    config = load_recipe(FOLDER / f"{name}.py")
    planned = plan(config, 64, VOCAB)
    all_tokens = planned.tokens_per_step * planned.train_steps
    assert planned.parameters - 2 * VOCAB * config.model.hidden_size == pytest.approx(parameters, rel=1e-3)
    assert all_tokens == pytest.approx(tokens, rel=1e-3)
    assert planned.flops_per_token.without_head * all_tokens == pytest.approx(operations, rel=5e-3)
    assert planned.worst.peak <= (80 - RESERVE_GIB) * GIB


def test_both_recipes_differ_in_noise_alone() -> None:
    masked, uniform = map(load_recipe, RECIPES)
    assert dataclasses.replace(uniform, objective=masked.objective) == masked
    assert masked.objective != uniform.objective
    assert plan(masked, 256, VOCAB) == plan(uniform, 256, VOCAB)
