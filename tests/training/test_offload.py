"""Adam in host memory: the same update to rounding, whatever is offloaded, and no trace of it in checkpoints.

Megatron's hybrid optimizer runs here with "device" and "host" both in host memory: division, copies, both halves, state
and checkpoints are the real ones; only the transfers are not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.parallel.groups import ParallelConfig
from megadiff.training.adam import initialize_state, set_step_count, torch_adam
from megadiff.training.offload import DeepSpeedAdam, deepspeed_kernel
from megadiff.training.optimizer import OptimizerConfig

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SIZES = (1, 7, 64, 1001)


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, generator=generator) for size in SIZES]


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(size, generator=generator) for size in SIZES]


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> list[torch.Tensor]:
    """Steps first to last - 1 of one history of gradients; the weights afterwards."""
    for group in optimizer.param_groups:
        group.update(SETTINGS)
    for step in range(first, last):
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.clone() for parameter in optimizer.param_groups[0]["params"]]


def exact_adam(num_steps: int) -> list[torch.Tensor]:
    """AdamW as its paper states it (arXiv 1711.05101, algorithm 2), in float64."""
    weights = [w.double() for w in parameters()]
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    (beta1, beta2), lr = SETTINGS["betas"], SETTINGS["lr"]
    for step in range(num_steps):
        for i, gradient in enumerate(g.double() for g in gradients(step)):
            m[i] = beta1 * m[i] + (1 - beta1) * gradient
            v[i] = beta2 * v[i] + (1 - beta2) * gradient.square()
            m_hat, v_hat = m[i] / (1 - beta1 ** (step + 1)), v[i] / (1 - beta2 ** (step + 1))
            weights[i] = (1 - lr * SETTINGS["weight_decay"]) * weights[i] - lr * m_hat / (
                v_hat.sqrt() + SETTINGS["eps"]
            )
    return weights


@pytest.mark.slow
def test_deepspeed_adam_is_adamw_to_rounding() -> None:
    """Sixty steps of about lr each.

    Expected: DeepSpeed computes 1 − β₂ from an fp32 β₂, so v is off by up to 2⁻²⁵/0.01 = 3e-6 of itself, an update by
    half of that, and 60 updates of 1e-2 together by 1e-6. Weights near 1 round by 6e-8 sixty times.
    """
    ours, torchs = DeepSpeedAdam([{"params": parameters()}]), torch_adam([{"params": parameters()}])
    initialize_state(ours)
    initialize_state(torchs)
    found, other, exact = steps(ours, 0, 60), steps(torchs, 0, 60), exact_adam(60)
    for a, b, c in zip(found, other, exact, strict=True):
        assert (c - parameters()[SIZES.index(len(c))]).abs().max() > 0.05
        torch.testing.assert_close(a.double(), c, rtol=0, atol=3e-6)
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6)


@pytest.mark.slow
def test_deepspeed_adam_depends_on_state_and_step_alone() -> None:
    unbroken, first = DeepSpeedAdam([{"params": parameters()}]), DeepSpeedAdam([{"params": parameters()}])
    initialize_state(unbroken)
    initialize_state(first)
    expected = steps(unbroken, 0, 40)

    saved, state = steps(first, 0, 23), first.state_dict()["state"]
    resumed = DeepSpeedAdam([{"params": saved}])
    initialize_state(resumed)
    for i, weight in enumerate(saved):
        for name in ("exp_avg", "exp_avg_sq"):
            resumed.state[weight][name].copy_(state[i][name])
    set_step_count(resumed, 23)
    for a, b in zip(steps(resumed, 23, 40), expected, strict=True):
        assert torch.equal(a, b)


OFF: dict[str, Any] = {}


def offloaded(fraction: float, cpu_adam: str) -> dict[str, Any]:
    return {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction, "cpu_adam": cpu_adam}


def train_sequences(
    corpus: Path, directory: Path, precision: str, sequences: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Six steps of each sequence of optimizers, which follow each other through checkpoints.

    Returns:
        By sequence: loss and gradient norm of every step, the sum of the averaged weights of this rank at the end, and
        how many elements its optimizer has offloaded.
    """
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.offload import OffloadedAdam
    from megadiff.training.trainer import Trainer

    found = {}
    for name, optimizers in sequences.items():
        lines = []
        for optimizer in optimizers:
            config = tiny_config(
                corpus,
                parallel={"use_distributed_optimizer": True},
                training={"precision": precision},
                optimizer={"ema_decay": 0.9, **optimizer},
            )
            trainer = Trainer(config, directory / precision / name, parallel_groups.initialize(config.parallel))
            trainer.resume()
            batches = trainer.training_batches()
            lines += [trainer.train_step(batches) for _ in range(6 // len(optimizers))]
            trainer.save(is_final=True)
        assert trainer.average is not None
        inner = trainer.optimizer.optimizer
        host_weights = inner.cpu_copys_map_gpu_param if isinstance(inner, OffloadedAdam) else ()
        found[name] = {
            "curve": [line[quantity] for line in lines for quantity in ("loss", "grad_norm")],
            "average": sum(average.double().sum().item() for average in trainer.average._averages.values()),
            "offloaded": sum(weight.numel() for weight in host_weights),
            "optimizer": trainer.manifest()["optimizer"],
        }
    parallel_groups.shutdown()
    return found


def largest_difference(found: dict[str, Any], reference: dict[str, Any]) -> float:
    pairs = zip(found["curve"], reference["curve"], strict=True)
    return max(abs(a / b - 1) for a, b in pairs)


def check_exact(found: dict[str, dict[str, Any]], name: str) -> None:
    """What torch's Adam does on the host is, to the bit, what it does on the device."""
    reference, other = found["on the device"], found[name]
    assert reference["curve"][-2] < reference["curve"][0] and reference["offloaded"] == 0 < other["offloaded"]
    assert (other["curve"], other["average"]) == (reference["curve"], reference["average"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloading_half_of_the_weights_changes_no_bit(corpus_dir: Path, tmp_path: Path, precision: str) -> None:
    sequences = {"on the device": [OFF], "half, resumed": [offloaded(0.5, "torch")] * 2}
    [found] = run_ranks(1, train_sequences, corpus_dir, tmp_path, precision, sequences)
    check_exact(found, "half, resumed")
    assert found["on the device"]["optimizer"] == "AdamW by torch"
    description = "AdamW, 50 % on the host by torch, the rest on the device by torch"
    assert found["half, resumed"]["optimizer"] == description


@pytest.mark.slow
def test_offload_and_its_adam_may_change_at_any_resume(corpus_dir: Path, tmp_path: Path) -> None:
    """Expected of DeepSpeed: weights that differ near 1e-7 and now and then round to bf16 neighbours, 2⁻⁸ apart."""
    sequences = {
        "on the device": [OFF],
        "torch: all, off, half": [offloaded(1.0, "torch"), OFF, offloaded(0.5, "torch")],
        "deepspeed": [offloaded(0.5, "deepspeed")],
        "deepspeed, resumed": [offloaded(0.5, "deepspeed")] * 2,
        "deepspeed: none, off, all": [offloaded(0.0, "deepspeed"), OFF, offloaded(1.0, "deepspeed")],
    }
    for found in run_ranks(2, train_sequences, corpus_dir, tmp_path, "bf16", sequences):
        check_exact(found, "torch: all, off, half")
        assert found["deepspeed, resumed"] == found["deepspeed"]
        for name in sequences:
            worst = largest_difference(found[name], found["on the device"])
            print(f"{name}: {worst:.1e}")
            assert worst <= 1e-3, name


def test_says_how_to_get_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", None)
    with pytest.raises(ValueError, match=r"DeepSpeed is not installed: pip install .*megadiff\[offload\]"):
        deepspeed_kernel()

    class Builder:
        def load(self, verbose: bool) -> None:
            raise RuntimeError("Ninja is required\nto load C++ extensions")

    builders = ModuleType("deepspeed.ops.op_builder")
    builders.CPUAdamBuilder = Builder  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", builders)
    with pytest.raises(ValueError, match=r"cannot compile its CPU Adam \(Ninja is required to load C\+\+ extensions\)"):
        deepspeed_kernel()


def test_refuses_offload_that_cannot_be() -> None:
    offload = OptimizerConfig(optimizer_cpu_offload=True)
    with pytest.raises(ValueError, match=r"set parallel.use_distributed_optimizer true"):
        offload.check_layout(ParallelConfig())
    offload.check_layout(ParallelConfig(use_distributed_optimizer=True))
    with pytest.raises(ValueError, match=r"optimizer.optimizer_offload_fraction is 1.5, but must lie in \[0, 1\]"):
        OptimizerConfig(optimizer_offload_fraction=1.5)
    with pytest.raises(ValueError, match=r"implementation is apex, but with optimizer.optimizer_cpu_offload torch's"):
        OptimizerConfig(optimizer_cpu_offload=True, implementation="apex")
