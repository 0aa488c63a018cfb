"""LaProp against its formulas, what it does not depend on, and what it is refused with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config
from torch import Tensor

from megadiff.integrity import read_manifest, write_manifest
from megadiff.training.adam import initialize_state
from megadiff.training.laprop import LaProp
from megadiff.training.optimizer import OptimizerConfig

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-2, 0.9, 0.99, 1e-3, 0.1
STEPS = 7


def gradients(step: int, scale: float = 1.0) -> list[Tensor]:
    """Of two weights of other shapes, float64; each step's are of another order of magnitude."""
    generator = torch.Generator().manual_seed(step)
    shapes = ((3,), (2, 4))
    return [scale * 10.0 ** (step % 3 - 1) * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def weights_after(num_steps: int, *, scale: float = 1.0, **settings: Any) -> list[Tensor]:
    """Weights, which begin at 1, after steps whose gradients are `scale` times those of every other call."""
    weights = [torch.ones_like(gradient) for gradient in gradients(0)]
    optimizer = LaProp([{"params": weights}, {"params": []}])
    initialize_state(optimizer)
    settings = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY, **settings}
    for group in optimizer.param_groups:
        group.update(settings)
    for step in range(num_steps):
        for weight, gradient in zip(weights, gradients(step, scale), strict=True):
            weight.grad = gradient
        optimizer.step()
        for weight, gradient in zip(weights, gradients(step, scale), strict=True):
            assert torch.equal(weight.grad, gradient)  # left as it was
    return weights


def weight_by_the_formulas(gradients_of_one: list[float]) -> float:
    """One number, which begins at 1, stepped as the module's docstring says."""
    mu, nu, theta = 0.0, 0.0, 1.0
    for k, g in enumerate(gradients_of_one, start=1):
        b1, b2 = (1 - (1 - beta) / (1 - beta**k) for beta in (BETA1, BETA2))
        nu = b2 * nu + (1 - b2) * g * g
        mu = b1 * mu + (1 - b1) * g / (math.sqrt(nu) + EPS)
        theta -= LR * (mu + WEIGHT_DECAY * theta)
    return theta


def test_steps_are_those_of_the_formulas() -> None:
    histories = [torch.stack(of_one).flatten(1).t() for of_one in zip(*map(gradients, range(STEPS)), strict=True)]
    for weight, history in zip(weights_after(STEPS), histories, strict=True):
        expected = [weight_by_the_formulas(of_one.tolist()) for of_one in history]
        torch.testing.assert_close(weight.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_first_step_is_the_sign_of_the_gradient(scale: float) -> None:
    for weight, gradient in zip(weights_after(1, scale=scale, eps=1e-30, weight_decay=0.0), gradients(0), strict=True):
        torch.testing.assert_close(weight, 1 - LR * gradient.sign(), rtol=1e-15, atol=0)


def test_steps_do_not_depend_on_the_scale_of_the_loss() -> None:
    """To the bit, where the scale is a power of two and nothing is added to the root."""
    for once, scaled in zip(weights_after(STEPS, eps=0.0), weights_after(STEPS, eps=0.0, scale=2.0**40), strict=True):
        assert torch.equal(once, scaled)


def test_refuses_what_only_adam_has() -> None:
    with pytest.raises(ValueError, match=r"optimizer_cpu_offload is on, but .* optimizer.algorithm is laprop: set one"):
        OptimizerConfig(algorithm="laprop", optimizer_cpu_offload=True)
    for implementation in ("apex", "transformer_engine"):
        with pytest.raises(ValueError, match=rf"implementation is {implementation}, whose kernels are Adam's, but"):
            OptimizerConfig(algorithm="laprop", implementation=implementation)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer.algorithm is 'lion', but must be one of adamw, laprop"):
        OptimizerConfig(algorithm="lion")  # type: ignore[arg-type]


def resume_with_the_other(corpus: Path, directory: Path) -> dict[str, str]:
    """What is said when a run that was saved with one algorithm is resumed with the other."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())

    def build(algorithm: str, run: str) -> Trainer:
        return Trainer(tiny_config(corpus, optimizer={"algorithm": algorithm}), directory / run, groups)

    said = {}
    for saved, resumed in (("laprop", "adamw"), ("adamw", "laprop")):
        trainer = build(saved, saved)
        trainer.train_step(trainer.training_batches())
        trainer.save(is_final=True)
        assert trainer.last_checkpoint is not None
        if saved == "adamw":  # as an older version would have written it, which knew no other
            manifest = read_manifest(trainer.last_checkpoint)
            del manifest["optimizer_algorithm"]
            write_manifest(trainer.last_checkpoint, manifest, manifest.pop("files"))
        try:
            build(resumed, saved).resume()
        except ValueError as error:
            said[resumed] = str(error)
        build(saved, saved).resume()
    parallel_groups.shutdown()
    return said


def test_moments_of_one_algorithm_are_not_taken_for_the_others(corpus_dir: Path, tmp_path: Path) -> None:
    [said] = run_ranks(1, resume_with_the_other, corpus_dir, tmp_path)
    checkpoint = tmp_path / "laprop" / "checkpoints" / "step_00000001"
    assert said["adamw"] == (
        f"{checkpoint} holds the moments of laprop, but optimizer.algorithm is adamw: set it to laprop, or choose "
        "another --run-dir, and begin there with its weights (training.init_from)"
    )
    assert "holds the moments of adamw, but optimizer.algorithm is laprop: set it to adamw" in said["laprop"]
