"""The moving average of the weights: the plain recurrence, however it is divided, saved, resumed or exported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from tiny import tiny_config

from megadiff.hf.convert import convert_to_hf
from megadiff.hf.distcp import DistributedCheckpoint
from megadiff.training.optimizer import OptimizerConfig

DECAY, STEPS, SAVED_AFTER = 0.3, 4, 2
"""The decay grows over steps 1 and 2 (2/11, 3/12) and then stays."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 sharded": {"use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sharded": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
    "pp2 sharded": {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
}


class Said(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def recurrence_error(trainer: Any) -> float:
    """Train on to `STEPS`; how far the average is from the recurrence over copies of the fp32 weights, in float64.

    Weights are asked of the optimizer before and after every step, not of the average.
    """
    weights = [
        parameter.main_param if hasattr(parameter, "main_param") else parameter for parameter in all_weights(trainer)
    ]
    expected = [weight.detach().double().clone() for weight in weights]
    batches = trainer.training_batches()
    while trainer.completed_steps < STEPS:
        trainer.train_step(batches)
        decay = min(DECAY, (1 + trainer.completed_steps) / (10 + trainer.completed_steps))
        for average, weight in zip(expected, weights, strict=True):
            average.mul_(decay).add_(weight.detach().double(), alpha=1 - decay)
    found = [trainer.average._averages[parameter] for parameter in all_weights(trainer)]
    return max((a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def all_weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter for denoiser in trainer.denoisers for parameter in denoiser.parameters()]


def train_with_averages(corpus: Path, directory: Path) -> dict[str, Any]:
    """Runs that the tests look at: their checkpoints, and what was said on resuming."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer
    from megadiff.training.writer import CheckpointWriter

    said = Said()
    logging.getLogger("megadiff").addHandler(said)
    logging.getLogger("megadiff").setLevel(logging.INFO)

    def build(name: str, layout: str, decay: float | None = DECAY, precision: str = "fp32") -> Trainer:
        config = tiny_config(
            corpus,
            parallel=LAYOUTS[layout],
            optimizer={"ema_decay": decay},
            training={"precision": precision},
            checkpoint={"keep_last": 0},
        )
        trainer = Trainer(config, directory / name, parallel_groups.initialize(config.parallel))
        trainer.resume()
        return trainer

    def train(trainer: Trainer, until: int) -> None:
        batches = trainer.training_batches()
        while trainer.completed_steps < until:
            trainer.train_step(batches)
        trainer.save(is_final=True)

    errors = [recurrence_error(build("unused", "dp2", precision=precision)) for precision in ("fp32", "bf16")]
    for name, precision in (("dp2", "fp32"), ("dp2 sharded", "fp32"), ("dp2 sharded", "bf16")):
        run = f"{name} {precision}"
        trainer = build(run, name, precision=precision)
        train(trainer, SAVED_AFTER)
        train(trainer, STEPS)
        for path in (directory / run, directory / f"{run} resumed"):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        source = directory / run / "checkpoints" / f"step_{SAVED_AFTER:08d}"
        if trainer.groups.rank == 0:
            source.rename(directory / f"{run} resumed" / "checkpoints" / source.name)
        trainer.groups.control.barrier().wait()
        train(build(f"{run} resumed", name, precision=precision), STEPS)

    for layout in LAYOUTS:
        if "sharded" in layout:  # opened and saved again by another layout
            trainer = build("dp2 sharded fp32", layout)
            target = directory / f"opened by {layout}"
            trainer.writer = CheckpointWriter(target, trainer.config.checkpoint, trainer.groups)
            trainer.save(is_final=True)

    train(build("late", "dp2", decay=None), SAVED_AFTER)
    late = build("late", "dp2")
    assert late.average is not None
    begins_at_weights = all(torch.equal(late.average._averages[p], p) for p in all_weights(late))
    train(late, STEPS)
    build("late", "dp2", decay=None)
    parallel_groups.shutdown()
    return {"errors": errors, "begins_at_weights": begins_at_weights, "said": said.lines}


@pytest.fixture(scope="module")
def runs(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("averages")
    return directory, run_ranks(2, train_with_averages, corpus_dir, directory)


def averages(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    state = run / "checkpoints" / f"step_{step:08d}" / "state"
    found = dict(DistributedCheckpoint(state, ignore=lambda name: False, prefix="ema."))
    assert found and all(average.dtype == torch.float32 for average in found.values())
    return found


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_average_is_the_plain_recurrence(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    """Expected: fp32 rounding of weights below 1, a few times 6e-8."""
    for found in runs[1]:
        for error in found["errors"]:
            assert error < 3e-7


@pytest.mark.slow
@pytest.mark.parametrize("run", ["dp2 fp32", "dp2 sharded fp32", "dp2 sharded bf16"])
def test_resumed_average_is_that_of_an_unbroken_run(runs: tuple[Path, list[dict[str, Any]]], run: str) -> None:
    check_equal(averages(runs[0] / f"{run} resumed"), averages(runs[0] / run))
    before = averages(runs[0] / f"{run} resumed", SAVED_AFTER)
    assert not torch.equal(before["output_layer.weight"], averages(runs[0] / run)["output_layer.weight"])


@pytest.mark.slow
def test_divided_averages_are_the_undivided_one(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    whole = averages(runs[0] / "dp2 fp32")
    for name, average in averages(runs[0] / "dp2 sharded fp32").items():
        torch.testing.assert_close(average, whole[name], rtol=0, atol=1e-6)
    for layout in LAYOUTS:
        if "sharded" in layout:
            check_equal(averages(runs[0] / f"opened by {layout}"), averages(runs[0] / "dp2 sharded fp32"))


@pytest.mark.slow
def test_average_may_begin_and_end_with_any_resume(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in runs[1]:
        assert found["begins_at_weights"]
        assert "step_00000002 holds no average of the weights: it begins at the loaded ones" in found["said"]
        assert "the average of the weights in step_00000004 ends here: optimizer.ema_decay is none" in found["said"]


def averaged_denoisers(checkpoints: list[Path]) -> list[dict[str, torch.Tensor] | str]:
    """The parameters of the denoisers that evaluation and generation would use, or what they would say."""
    from megadiff.config import TrainConfig
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.state import load_denoiser

    found: list[dict[str, torch.Tensor] | str] = []
    for checkpoint in checkpoints:
        config = TrainConfig.from_yaml(checkpoint / "config.yaml")
        groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
        try:
            [denoiser] = load_denoiser(checkpoint, config.model, groups, sequence_length=32, weights="ema")
            found.append({name: weight.detach().clone() for name, weight in denoiser.named_parameters()})
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_average_is_evaluated_and_exported(runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    run = runs[0] / "dp2 sharded fp32"
    expected = averages(run)
    without = runs[0] / "late" / "checkpoints" / f"step_{SAVED_AFTER:08d}"
    [[loaded, said]] = run_ranks(1, averaged_denoisers, [run / "checkpoints" / f"step_{STEPS:08d}", without])
    check_equal(loaded, expected)
    assert "holds no average of the weights (it was trained without optimizer.ema_decay): use --weights model" in said

    with pytest.raises(ValueError, match=r"holds no average of the weights: the run had no optimizer.ema_decay"):
        convert_to_hf(without, tmp_path / "none", weights="ema")
    convert_to_hf(run, tmp_path / "average", weights="ema")
    convert_to_hf(run, tmp_path / "model")
    average, model = (load_file(tmp_path / name / "model.safetensors") for name in ("average", "model"))
    assert average.keys() == model.keys()
    assert torch.equal(average["lm_head.weight"], expected["output_layer.weight"][:400])
    assert torch.equal(average["model.norm.weight"], expected["decoder.final_layernorm.weight"])
    assert not torch.equal(average["lm_head.weight"], model["lm_head.weight"])
    assert "exponential moving average, decay 0.3" in (tmp_path / "average" / "README.md").read_text()
    assert "exponential moving average" not in (tmp_path / "model" / "README.md").read_text()


def test_refuses_decays_out_of_range() -> None:
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"optimizer.ema_decay is .*, but must lie in \[0, 1\)"):
            OptimizerConfig(ema_decay=decay)
