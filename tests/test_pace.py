"""Step time and days against sums done by hand, and the table of docs/ten_billion.md against the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ten_billion import FOLDER, RECIPES, RESERVE_GIB, alternatives, table

from megadiff.cli import main
from megadiff.config import load_recipe
from megadiff.pace import SAVING_STEPS, bubble, exchanged_bytes, pace
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
    assert bubble(config, 256) == 1 / (2 * 24)  # 3072 samples over 128 ranks
    plain = config.overridden(["--parallel.virtual-pipeline-model-parallel-size", "none"])
    assert bubble(plain, 256) == 1 / 24
    [first, _] = plan(config, 256, VOCAB).stages
    assert exchanged_bytes(first, 128) == (first.gradients + first.weights) * 127 // 128
    assert exchanged_bytes(first, 1) == 0


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
    for computed in (table(), alternatives()):
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
